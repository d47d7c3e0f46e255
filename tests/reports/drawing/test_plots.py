from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from harness.record import Record
from reports.drawing import palette, plots
from reports.drawing.palette import Drawing
from reports.gather import make_groups, make_rows
from reports.pareto import Plane, plane
from tests.reports.synthetic import changed

PNG = b"\x89PNG\r\n"


def plane_of(records: list[Record], metric: str = "artefact_bytes") -> Plane:
    (group,) = make_groups(make_rows(records))
    found = plane(group, metric)
    assert found is not None
    return found


def anchors_of(drawn: Plane) -> dict[str, str]:
    return {point.row.record.cell: f"row-{i}" for i, point in enumerate(drawn.points)}


def draw(records: list[Record], metric: str = "artefact_bytes") -> Drawing:
    found = plane_of(records, metric)
    return plots.draw(found, anchors_of(found))


def texts(svg: str) -> list[str]:
    return [
        "".join(node.itertext()) for node in ET.fromstring(svg).iter() if node.tag.endswith("}text")
    ]


@pytest.mark.parametrize("metric", ["artefact_bytes", "decode_tokens_per_second"])
def test_every_row_is_drawn_labelled_and_linked(grid: list[Record], metric: str) -> None:
    drawing = draw(grid, metric)
    assert drawing.png.startswith(PNG)
    assert {row.label for row in make_rows(grid)} <= set(texts(drawing.svg))
    for index in range(13):
        assert f'href="#row-{index}"' in drawing.svg
    assert "<title>rtn 4 bits g32: " in drawing.svg


def test_equal_records_give_equal_bytes(grid: list[Record]) -> None:
    assert draw(grid) == draw(grid)


def test_the_svg_follows_the_theme_of_its_page_and_asks_for_nothing(grid: list[Record]) -> None:
    svg = draw(grid).svg
    assert svg.startswith("<svg")
    for colour in (palette.INK, palette.MUTED, palette.GRID, palette.SURFACE):
        assert colour not in svg
    assert "var(--ink)" in svg
    assert "var(--surface)" in svg
    for forbidden in ("<script", "<style", "<image", "http://www.w3.org/Graphics", "url(http"):
        assert forbidden not in svg


def test_a_drawing_has_no_ids_that_could_meet_those_of_its_page(grid: list[Record]) -> None:
    root = ET.fromstring(draw(grid).svg)
    assert not [node for node in root.iter() if "id" in node.attrib]
    assert len([node for node in root.iter() if node.tag.endswith("}a")]) == len(grid)


def test_names_are_text_never_markup_nor_mathematics(grid: list[Record]) -> None:
    name = "<script>alert(1)</script> $\\frac{a}{b}$ & 日本"
    evil = replace(grid[5], config={**grid[5].config, "method": name})
    drawing = draw([grid[0], evil])
    assert "<script" not in drawing.svg
    assert f"{name} 8 bits g32" in texts(drawing.svg)


def test_an_axis_is_logarithmic_only_where_values_explode(grid: list[Record]) -> None:
    def names(records: list[Record]) -> str:
        return " ".join(texts(draw(records).svg))

    assert "Perplexity (logarithmic)" in names(grid)
    assert "Perplexity, " in names(grid[:4])


def test_labels_cover_neither_each_other_nor_points() -> None:
    bounds = (0.0, 0.0, 760.0, 440.0)
    spots = [(100.0 + 3 * i, 100.0) for i in range(9)]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    for spot in spots:
        place = plots._place(spot, (90.0, 11.0), taken, bounds, True)
        assert place is not None
        box = place[0]
        assert all(plots._overlap(box, other) == 0 for other in taken)
        assert plots._outside(np.array([box]), bounds) == 0
        taken.append(box)


def test_a_label_without_a_place_is_left_out_unless_it_must_stand() -> None:
    everywhere = [(0.0, 0.0, 1000.0, 1000.0)]
    bounds = (0.0, 0.0, 1000.0, 1000.0)
    assert plots._place((500.0, 500.0), (50.0, 10.0), everywhere, bounds, False) is None
    assert plots._place((500.0, 500.0), (50.0, 10.0), everywhere, bounds, True) is not None


def test_the_front_has_steps_on_its_worse_side(grid: list[Record]) -> None:
    drawn = plane_of(
        [
            changed(changed(grid[0], "perplexity", value=6.0), "artefact_bytes", value=9e6),
            changed(changed(grid[3], "perplexity", value=7.0), "artefact_bytes", value=4e6),
        ]
    )
    assert plots._front(drawn) == [(4e6, 7.0), (9e6, 7.0), (9e6, 6.0)]
    faster = replace(drawn, higher_is_better=True)
    assert plots._front(faster) == [(4e6, 7.0), (4e6, 6.0), (9e6, 6.0)]


def test_two_equal_points_can_be_drawn(grid: list[Record]) -> None:
    twin = replace(grid[0], cell="twin", config={**grid[0].config, "method": "other"})
    assert draw([grid[0], twin]).png.startswith(PNG)
