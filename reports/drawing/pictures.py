"""Draws the pictures of blocks, each kind in its own way; a drawing is a PNG and an SVG."""

from __future__ import annotations

from reports.blocks import Intervals, Panels, Picture
from reports.drawing import scene_pictures
from reports.drawing.palette import Drawing
from reports.drawing.scenes import drawing


def is_scene(picture: Picture) -> bool:
    """Whether the picture is drawn without matplotlib, so that threads may draw several."""
    return isinstance(picture, Panels | Intervals)


def draw(picture: Picture) -> Drawing:
    """Draw `picture`; its name stands before every id of the SVG, which shares a page."""
    if isinstance(picture, Panels):
        return drawing(scene_pictures.panels(picture))
    if isinstance(picture, Intervals):
        return drawing(scene_pictures.intervals(picture))
    # Matplotlib takes half a second to import, and few reports have such a picture.
    from reports.drawing import charts

    return charts.draw(picture)
