"""Bits a weight of GGUF's block types, from the fields of a block.

Source: the block structs of ggml (`ggml-common.h`), one entry a field: its bytes and what it holds.
A type of a file that ends in `_S`, `_M` or `_L` mixes block types by layer: most matrices have the
base type, the more sensitive ones a wider one, so that the base type is the least it can come to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A block: how many weights share it, and (bytes, what they hold) of its fields."""

    weights: int
    fields: tuple[tuple[int, str], ...]

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return sum(size for size, _ in self.fields)

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / self.weights

    @property
    def sum(self) -> str:
        """The bits a weight written out."""
        parts = " + ".join(f"{size} ({what})" for size, what in self.fields)
        return (
            f"{parts} = {self.bytes} bytes a block of {self.weights} weights: "
            f"{8 * self.bytes} bits / {self.weights} = {self.bits:g} bits a weight"
        )


_SCALE, _LEAST = (2, "scale"), (2, "scale of minima")

LAYOUTS: Mapping[str, Layout] = {
    "f32": Layout(1, ((4, "value"),)),
    "f16": Layout(1, ((2, "value"),)),
    "bf16": Layout(1, ((2, "value"),)),
    "q4_0": Layout(32, (_SCALE, (16, "32 codes of 4 bits"))),
    "q4_1": Layout(32, (_SCALE, (2, "minimum"), (16, "32 codes of 4 bits"))),
    "q5_0": Layout(32, (_SCALE, (4, "fifth bits"), (16, "32 codes of 4 bits"))),
    "q5_1": Layout(32, (_SCALE, (2, "minimum"), (4, "fifth bits"), (16, "32 codes of 4 bits"))),
    "q8_0": Layout(32, (_SCALE, (32, "32 codes of 8 bits"))),
    "q2_k": Layout(256, (_SCALE, _LEAST, (16, "4-bit scales and minima"), (64, "2-bit codes"))),
    "q3_k": Layout(
        256, (_SCALE, (12, "6-bit scales"), (32, "third bits"), (64, "lower 2 bits of codes"))
    ),
    "q4_k": Layout(256, (_SCALE, _LEAST, (12, "6-bit scales and minima"), (128, "4-bit codes"))),
    "q5_k": Layout(
        256,
        (
            *(_SCALE, _LEAST),
            *((12, "6-bit scales and minima"), (32, "fifth bits"), (128, "lower 4 bits of codes")),
        ),
    ),
    "q6_k": Layout(
        256,
        (
            _SCALE,
            *((16, "8-bit scales"), (64, "upper 2 bits of codes"), (128, "lower 4 bits of codes")),
        ),
    ),
}
"""Block types by name, in small letters."""


def layout_of(name: str) -> tuple[Layout, bool] | None:
    """Return the layout of a GGUF type and whether files of it mix it with wider ones."""
    plain = name.lower()
    base = re.sub(r"_[sml]$", "", plain)
    if base not in LAYOUTS:
        return None
    return LAYOUTS[base], base != plain or base in ("q2_k", "q3_k")
