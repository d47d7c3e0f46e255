"""The colours of drawings, which CSS variables of a page stand for, and what a drawing is."""

from __future__ import annotations

from dataclasses import dataclass

INK, MUTED, GRID, SURFACE = "#1b1f25", "#59616d", "#e1e5ea", "#fefefe"
SERIES = (
    *("#1767a8", "#b8420e", "#14773b", "#7a3aa5"),
    *("#8a5a06", "#b3174f", "#0c6f6a", "#4a5568"),
)
VARIABLES = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "surface": SURFACE,
    **{f"series-{place}": colour for place, colour in enumerate(SERIES)},
}
"""CSS variable -> its colour in the light theme."""


@dataclass(frozen=True)
class Drawing:
    """One figure in both forms."""

    png: bytes
    svg: str
