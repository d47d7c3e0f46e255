from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from harness.record import Record
from reports.blocks import Interval, Intervals, Line, Panel, Panels
from reports.drawing import pictures
from reports.drawing.intervals import DRAWN, MOST, interval_blocks
from reports.drawing.multiples import multiple_blocks
from reports.drawing.scale import difference_scale, positive_scale
from reports.drawing.scene_pictures import intervals, panels
from reports.drawing.scenes import TONES, WIDTH, Field, Mark, Scene, Stroke, Words, drawing
from reports.gather import make_groups, make_rows
from reports.rows import Group
from reports.verdicts import judge
from tests.reports.synthetic import Synthetic, changed, with_tasks


def group_of(records: list[Record]) -> Group:
    (group,) = make_groups(make_rows(records))
    return group


def intervals_of(records: list[Record]) -> dict[str, Intervals]:
    """Return the pictures of intervals, by what they show."""
    (block,) = interval_blocks(group_of(records))
    return {p.across.partition(":")[0]: p for p in block.pictures if isinstance(p, Intervals)}


def multiples_of(records: list[Record]) -> Panels:
    (block,) = multiple_blocks(group_of(records))
    (found,) = block.pictures
    assert isinstance(found, Panels)
    return found


def texts(scene: Scene) -> list[str]:
    return [item.text for item in scene.items if isinstance(item, Words)]


def test_every_figure_with_a_verdict_has_its_differences_drawn(grid: list[Record]) -> None:
    records = [with_tasks(record) for record in grid]
    group = group_of(records)
    found = intervals_of(records)
    assert {"Perplexity", "KL, mean", "gsm8k exact_match_strict"} <= set(found)
    judged = judge(group).of("perplexity", "embedded_gptq_1024")
    assert [line.label for line in found["Perplexity"].lines] == [one.row.label for one in judged]
    for line, one in zip(found["Perplexity"].lines, judged, strict=True):
        made = one.comparison
        assert (line.difference, line.low, line.high) == pytest.approx(
            (100 * made.difference, 100 * made.low, 100 * made.high)
        )
        assert line.word == one.word


def test_the_margin_is_what_counts_as_equivalent(grid: list[Record]) -> None:
    found = intervals_of([with_tasks(record) for record in grid])
    assert found["Perplexity"].margin == pytest.approx(3.0)
    (base,) = group_of([with_tasks(grid[0])]).rows
    share = base.values["exact_match_strict", "gsm8k_5shot"].value
    assert found["gsm8k exact_match_strict"].margin == pytest.approx(3.0 * share)
    assert found["KL, mean"].margin is None


def test_of_many_rows_those_closest_to_the_baseline_are_drawn_in_their_order() -> None:
    made = Synthetic()
    records = [made.cell("fp32", 32, None, "packed", "torch.linear")]
    records += [
        made.cell("rtn", bits, size, "packed", "k")
        for bits in (8, 4, 3, 2)
        for size in range(1, 17)
    ]
    drawn = intervals_of(records)["Perplexity"]
    assert len(records) - 1 > MOST
    assert len(drawn.lines) == DRAWN
    assert f"the {DRAWN} of {len(records) - 1} rows that are closest" in drawn.caption
    judged = judge(group_of(records)).of("perplexity", "embedded_gptq_1024")
    sizes = sorted(abs(100 * one.comparison.difference) for one in judged)
    assert max(abs(line.difference) for line in drawn.lines) == pytest.approx(sizes[DRAWN - 1])
    order = [one.row.label for one in judged]
    assert [line.label for line in drawn.lines] == sorted(
        (line.label for line in drawn.lines), key=order.index
    )


def test_without_a_baseline_there_is_no_picture_of_differences(grid: list[Record]) -> None:
    assert interval_blocks(group_of(grid[1:])) == []


def test_a_line_has_a_mark_a_whisker_and_its_verdict() -> None:
    lines = (
        Interval("a", 1.0, 0.5, 1.5, "worse"),
        Interval("b", -1.0, -2.0, 0.5, "not distinguishable"),
        Interval("c", 0.1, -math.inf, math.inf, "not distinguishable"),
        Interval("d", math.inf, math.inf, math.inf, "worse"),
    )
    scene = intervals(Intervals("intervals", "", "", "loss", lines, 3.0))
    marks = [item for item in scene.items if isinstance(item, Mark)]
    assert [(mark.shape, mark.filled) for mark in marks] == [
        ("down", True),
        ("octagon", False),
        ("octagon", False),
    ]
    assert marks[0].x > marks[2].x > marks[1].x
    whiskers = [i for i in scene.items if isinstance(i, Stroke) and i.width == 1.6]
    flat = [w.points for w in whiskers if w.points[0][1] == w.points[1][1]]
    assert len(flat) == 2
    assert flat[0][0][0] < marks[0].x < flat[0][1][0]
    assert sum(bool(i.dashes) for i in scene.items if isinstance(i, Stroke)) == 2
    (band,) = [item for item in scene.items if isinstance(item, Field)]
    assert band.x < marks[1].x
    assert band.x + band.width > marks[0].x
    assert texts(scene).count("worse") == 2
    assert all(0 <= item.x <= WIDTH for item in scene.items if isinstance(item, Words))


def test_differences_of_very_unlike_sizes_are_drawn_apart() -> None:
    scale = difference_scale((-1, 20_000), (0.1, 20_000), 3.0)
    assert not scale.linear
    places = [scale.place(x) for x in (-3, 0, 3, 30, 300, 20_000)]
    assert places == sorted(places)
    assert places[0] > 0
    assert places[-1] < 1
    assert places[2] - places[1] == pytest.approx(places[1] - places[0])
    assert {-3.0, 0.0, 3.0} <= {*scale.ticks()}
    assert difference_scale((-1, 2), (1.0,), 3.0).linear
    assert difference_scale((), (), 0.0).ticks()


@pytest.mark.parametrize("values", [(5.0,), (1e-7, 3.0), (2.0, 2.5), (1e-9, 1e-9)])
def test_scales_of_positive_values_hold_them_and_name_some(values: tuple[float, ...]) -> None:
    scale = positive_scale(values)
    assert all(0 < scale.place(value) < 1 for value in values)
    assert scale.ticks()


def test_a_chart_a_method_a_line_a_group_size_a_point_a_width(grid: list[Record]) -> None:
    found = multiples_of(grid)
    assert [panel.title for panel in found.panels] == ["rtn"]
    assert [line.label for line in found.panels[0].lines] == ["groups of 32", "groups of 128"]
    for line in found.panels[0].lines:
        assert [bits for bits, _ in line.points] == [2, 3, 4, 8]
    rows = {row.label: row for row in make_rows(grid)}
    lowest = rows["rtn 4 bits g32"].values["kl_mean", "embedded_gptq_1024"].value
    assert (4, lowest) in found.panels[0].lines[0].points
    assert {line.label for line in found.points} == {"fp16", "bf16", "int8_dynamic", "int8_static"}
    assert found.level is not None


def test_what_a_logarithm_cannot_show_is_named(grid: list[Record]) -> None:
    found = multiples_of([changed(r, "kl_mean", value=0.0) if r is grid[1] else r for r in grid])
    assert "Not drawn on a logarithmic scale: fp16 (0.0)" in found.caption
    assert "fp16" not in {line.label for line in found.points}


def test_perplexity_stands_in_where_there_is_no_divergence(grid: list[Record]) -> None:
    plain = [
        replace(r, values=tuple(v for v in r.values if v.measure != "divergence")) for r in grid
    ]
    found = multiples_of(plain)
    assert found.up == "Perplexity"
    assert found.level is not None
    base = make_rows(plain)[0].values["perplexity", "embedded_gptq_1024"].value
    assert found.level == ("baseline", base)


def test_without_a_choice_there_are_no_charts(grid: list[Record]) -> None:
    assert multiple_blocks(group_of(grid[:5])) == []


def test_charts_wrap_and_every_point_lies_within_its_own() -> None:
    lines = (Line("groups of 32", ((2, 1.0), (4, 0.1))), Line("per channel", ((2, 2.0), (4, 0.3))))
    many = tuple(Panel(f"method {place}", lines) for place in range(6))
    single = (Line("other", ((16, 0.001),)),)
    scene = panels(Panels("multiples", "", "", "bits", "KL", many, "rest", single, ("base", 0.5)))
    titles = [i for i in scene.items if isinstance(i, Words) and i.text.startswith("method")]
    assert len({item.y for item in titles}) == 2
    marks = [item for item in scene.items if isinstance(item, Mark)]
    # Two of the marks are the legend's.
    assert len(marks) == 6 * 4 + 1 + 2
    assert all(0 < mark.x < WIDTH and 0 < mark.y < scene.height for mark in marks)
    assert len({mark.shape for mark in marks}) == 2


def test_both_forms_show_names_as_text_in_the_colours_of_the_page() -> None:
    name = "<script>alert(1)</script> & 日本"
    lines = (Interval(name, 1.0, 0.5, 1.5, "worse"),)
    made = pictures.draw(Intervals("intervals", "", "", name, lines, 3.0))
    assert "<script" not in made.svg
    root = ET.fromstring(made.svg)
    written = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]
    assert any(text.startswith("<script>alert(1)") for text in written)
    assert not any(colour in made.svg for colour in TONES.values())
    assert "var(--bad)" in made.svg
    image = Image.open(io.BytesIO(made.png))
    assert image.format == "PNG"
    assert image.width == WIDTH * 3 // 2
    assert made == pictures.draw(Intervals("intervals", "", "", name, lines, 3.0))


def test_dashes_cover_their_share_of_a_stroke() -> None:
    scene = Scene(20, (Stroke(((0, 10), (760, 10)), "ink", 4.0, (10, 30)),))
    image = Image.open(io.BytesIO(drawing(scene).png)).convert("L")
    dark = np.asarray(image)[15] < 128
    assert float(dark.mean()) == pytest.approx(0.25, abs=0.02)
