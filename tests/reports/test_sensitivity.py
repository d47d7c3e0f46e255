from __future__ import annotations

import pytest

from reports.blocks import Map
from reports.drawing import pictures
from reports.sensitivity import analyses, edges, sensitivity_blocks, sensitivity_text
from reports.table import summary_text
from tests.reports.advanced import job_record, sensitivity, sensitivity_record
from tests.reports.synthetic import Synthetic


def test_one_scheme_and_several_are_read_alike() -> None:
    (one,) = analyses(sensitivity_record())
    two = analyses(sensitivity_record(sensitivity(), sensitivity("rtn 3 bits g128")))
    assert [found.scheme for found in two] == ["rtn 4 bits g128", "rtn 3 bits g128"]
    assert two[0] == one
    assert len(one.modules) == 16
    assert [module.kl for module in one.ordered] == sorted(m.kl for m in one.modules)[::-1]


def test_records_of_one_model_and_text_are_joined() -> None:
    records = [sensitivity_record(), sensitivity_record(sensitivity("rtn 3 bits g128"))]
    (block,) = sensitivity_blocks(records)
    assert len(block.pictures) == 2
    summary, *tables = block.grids
    assert [line[0].text for line in summary.lines] == ["rtn 4 bits g128", "rtn 3 bits g128"]
    assert [field.text for field in summary.lines[0][5:8]] == ["16", "44", "68"]
    assert summary.lines[0][4].text == "0.93"
    assert all(table.folded and len(table.lines) == 16 for table in tables)
    other = sensitivity_record(sensitivity(text="another text"))
    assert len(sensitivity_blocks([*records, other])) == 2


def test_the_map_holds_every_matrix_and_darkens_with_its_kl() -> None:
    (block,) = sensitivity_blocks([sensitivity_record()])
    (picture,) = block.pictures
    assert isinstance(picture, Map)
    assert picture.rows == ("block 0", "block 1", "block 2", "block 3")
    assert picture.columns[-1] == "mlp.down_proj"
    assert len(picture.spots) == 16
    assert picture.spots[0, 0].text == "noise"
    assert picture.spots[0, 0].shade == 0
    shades = {place: spot.shade for place, spot in picture.spots.items()}
    assert min(shades[row, 3] for row in range(4)) > max(shades[row, 1] for row in range(4))
    assert max(shades.values()) == pytest.approx(1)
    drawing = pictures.draw(picture)
    assert drawing.png.startswith(b"\x89PNG")
    assert "mlp." in drawing.svg
    assert pictures.draw(picture) == drawing


def test_matrices_outside_blocks_have_a_row_of_their_own() -> None:
    facts = sensitivity()
    facts["modules"].append({"name": "lm_head", "block": None, "module": "lm_head", "kl": 0.2})
    (block,) = sensitivity_blocks([sensitivity_record(facts)])
    (picture,) = block.pictures
    assert isinstance(picture, Map)
    assert picture.rows[-1] == "no block"
    assert picture.spots[4, 4].text == "0.2"


def test_the_edges_are_held_against_an_even_share() -> None:
    modules = [
        {"name": f"m{b}", "block": b, "module": "m", "kl": kl}
        for b, kl in enumerate([0.5, 0.1, 0.1, 0.3])
    ]
    (found,) = analyses(sensitivity_record(sensitivity(modules=modules)))
    shares = edges(found)
    assert shares == pytest.approx((0.5, 0.3, 0.25))
    (few,) = analyses(sensitivity_record(sensitivity(modules=modules[:2])))
    assert edges(few) is None


def test_the_terminal_names_the_five_most_sensitive_and_the_cost() -> None:
    text = sensitivity_text(sensitivity_record())
    assert text.count("of the sum") == 5
    assert "rank correlation of predicted and measured KL 0.93 over 20 mixes" in text
    assert "44 block forwards (68 without kept prefixes)" in text
    assert sensitivity_text(Synthetic().grid()[0]) == ""
    assert summary_text([sensitivity_record()]).startswith("sensitivity of embedded to rtn 4 bits")
    assert summary_text([job_record("deploy", {})]) == ""


@pytest.mark.parametrize("strange", [None, 3, [], [1], {"modules": None}, {"modules": [[1], {}]}])
def test_details_of_any_shape_are_survived(strange: object) -> None:
    record = job_record("sensitivity", {"sensitivity": strange})
    assert sensitivity_blocks([record]) == []
    assert sensitivity_text(record) == ""
