from __future__ import annotations

from dataclasses import replace

import pytest

from harness.record import Record
from reports.blocks import Curves
from reports.compression import compression_blocks
from reports.drawing import pictures
from reports.gather import make_groups, make_rows
from reports.paired import compare
from reports.rows import Group
from reports.training import equality, recovery, training_blocks
from tests.reports.advanced import distilled, made_by, pruned, trained
from tests.reports.synthetic import Synthetic, changed


def group_of(*records: Record, untrained: float = 10.0) -> Group:
    """Return the group of a baseline at 6, rtn with 3 bits at `untrained`, and `records`."""
    grid = Synthetic().grid()
    base = changed(grid[0], "perplexity", value=6.0, samples=())
    (rtn,) = (r for r in grid if (r.config["bits"], r.config["group_size"]) == (3, 128))
    rounded = changed(rtn, "perplexity", value=untrained, samples=())
    (group,) = make_groups(make_rows([base, rounded, *records]))
    return group


@pytest.mark.parametrize(
    ("perplexity", "share", "said"),
    [
        (7.0, 0.75, "recovers 75 % of the perplexity that rtn 3 bits g128 loses"),
        (12.0, -0.5, "recovers nothing: it is worse than rtn 3 bits g128"),
        (5.0, 1.25, "and ends below the baseline"),
    ],
)
def test_what_is_recovered_is_a_share_of_the_loss(
    perplexity: float, share: float, said: str
) -> None:
    group = group_of(trained(perplexity=perplexity))
    (row,) = (row for row in group.rows if row.method == "qat")
    found = recovery(group, row)
    assert found is not None
    assert found.share == pytest.approx(share)
    (block,) = training_blocks(group)
    assert said in block.sentences[0]


def test_no_row_of_the_same_bits_is_said() -> None:
    group = group_of(trained(bits=4))
    assert "cannot be told" in training_blocks(group)[0].sentences[0]


def test_a_ternary_model_is_held_against_the_untrained_one() -> None:
    plain = changed(made_by("bitnet", 2, 128, {}), "perplexity", value=20.0, samples=())
    ternary = replace(trained("bitnet", 2, 13.0), cell="trained")
    group = group_of(replace(plain, cell="untrained"), ternary)
    (row,) = (row for row in group.rows if row.record.cell == "trained")
    found = recovery(group, row)
    assert found is not None
    assert found.share == pytest.approx(0.5)


def test_curves_of_all_rows_are_one_figure() -> None:
    (block,) = training_blocks(group_of(trained(), trained("lsq")))
    (picture,) = block.pictures
    assert isinstance(picture, Curves)
    assert [line.label for line in picture.lines] == ["lsq 3 bits g128", "qat 3 bits g128"]
    assert picture.lines[0].points[0] == (0, 3.0)
    drawing = pictures.draw(picture)
    assert drawing.png.startswith(b"\x89PNG")
    assert "qat 3 bits g128" in drawing.svg
    runs = block.grids[0].lines[0]
    assert [field.text for field in runs[3:6]] == ["200", "8 × 128", "204,800"]
    assert "100" in [field.text for field in runs]


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (None, "not checked"),
        ({"difference": 1e-6, "tolerance": 1e-5}, "1.0e-06 (1.0e-05), within"),
        ({"difference": 1e-3, "tolerance": 1e-5}, "0.00100 (1.0e-05), OUTSIDE"),
    ],
)
def test_the_equality_is_put_into_words(facts: object, text: str) -> None:
    assert equality({"equality": facts}) == text


def test_trained_rows_are_ranked_among_equal_bits() -> None:
    qat = replace(made_by("qat", 3, 128, {}), cell="qat")
    (group,) = make_groups(make_rows([*Synthetic().grid(), qat]))
    titles = {found.title: len(found.rows) for found in compare(group)}
    assert titles["3 bits, groups of 128"] == 2


def test_pruned_rows_tell_what_their_zeros_cost() -> None:
    dense = replace(pruned("dense"), cell="dense")
    (block,) = compression_blocks(group_of(pruned(), dense))
    assert "saves 17.0 %" in block.sentences[0]
    assert "they save nothing" in block.sentences[1]
    first = block.grids[0].lines[0]
    assert first[0].text == "prune_quant 30 % -> rtn 8 bits g128 (store=bitmap)"
    assert first[7].text == "4.67"


def test_students_stand_beside_their_teacher() -> None:
    (block,) = compression_blocks(group_of(distilled()))
    line = block.grids[0].lines[0]
    assert line[0].text == "distill_quant -> rtn 8 bits g128"
    assert [field.text for field in line[1:4]] == ["3,000,000", "1,900,000 (63 %)", "0, 3"]


def test_rows_of_other_methods_have_no_such_blocks() -> None:
    (group,) = make_groups(make_rows(Synthetic().grid()))
    assert training_blocks(group) == []
    assert compression_blocks(group) == []
