from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.record import Record, Value
from reports.addresses import cell_page
from reports.cells import Node, cell_files, cell_pages, tree
from reports.drawing.strips import strip
from reports.page import make_page
from reports.render import write_report
from tests.reports.advanced import deploy_record, every_kind, search_record, sensitivity_record
from tests.reports.synthetic import (
    Synthetic,
    awkward_sweep,
    failed,
    partial,
    repetition,
    simulated,
)
from tests.reports.test_render import Outline

Write = Callable[[list[Record]], Path]

EVIL = "<script>alert(1)</script>"


def pages_of(records: list[Record]) -> dict[str, Outline]:
    """Return the page of each cell, read again, by its address."""
    files = dict(cell_files(make_page(records)))
    return {name: Outline(content.decode()) for name, content in files.items()}


def page_of(record: Record, *others: Record) -> Outline:
    return pages_of([record, *others])[cell_page(record.cell)]


def resolved(record: Record, **options: Any) -> Record:
    """Return `record` with a resolved configuration of more than one level."""
    nodes = {
        "method": {"name": "rtn", "calibration": {"samples": 32, "seed": 7}, "keep": []},
        "suite": {"tasks": ["one", "two"], "limit": None},
        "history": list(range(40)),
        **options,
    }
    return replace(record, config={**record.config, "resolved": nodes})


def test_every_cell_has_a_page_that_is_whole_and_asks_for_nothing() -> None:
    records = awkward_sweep() + every_kind()
    files = dict(cell_files(make_page(records)))
    assert {cell_page(record.cell) for record in records} == set(files)
    for content in files.values():
        page = Outline(content.decode())
        assert page.open == []
        assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
        for _, attributes in page.tags:
            assert not {"src", "onclick", "onload"} & set(attributes)
            address = attributes.get("href") or ""
            assert re.fullmatch(r"|\.\./report\.html#[\w.-]+|[\w.-]+\.html", address)


def test_a_page_holds_command_axes_identities_and_configuration(grid: list[Record]) -> None:
    page = page_of(resolved(grid[7]), grid[0])
    record = grid[7]
    for text in (
        record.config["command"],
        record.config["cell_key"],
        record.config["artefact_key"],
        record.cell,
        record.started,
        "9.5",
        "rtn 4 bits g32",
        "one, two",
        "40 entries, in record.json",
        "2.13.0",
        "Synthetic CPU",
    ):
        assert text in page.text
    assert "calibration samples: 32seed: 7" in page.text
    assert re.search(r"limit:\s+none", page.text)
    links = {attributes.get("href") for tag, attributes in page.tags if tag == "a"}
    row = make_page([record, grid[0]]).anchors[record.cell]
    assert links == {f"../report.html#{row}", Path(cell_page(grid[0].cell)).name}


def test_values_have_protocol_samples_and_what_they_say_of_the_baseline(
    grid: list[Record],
) -> None:
    (shown,) = [p for p in cell_pages(make_page(grid)) if p.row.label == "rtn 2 bits g32"]
    figures = {f.value.metric: f for part in shown.parts for f in part.figures}
    perplexity = figures["perplexity"]
    assert perplexity.judged is not None
    assert perplexity.judged.verdict == "worse"
    assert perplexity.test == "paired bootstrap, 16 windows"
    assert perplexity.strip is not None
    assert len(perplexity.strip.listed.split()) == 16
    assert figures["artefact_bytes"].against.startswith("×0.")
    page = page_of(grid[11], *grid[:11])
    assert "worse" in page.text
    assert "embedded_gptq_1024" in page.text
    assert re.search(r"\d+ of 100 answers right", page.text)


def test_few_samples_are_listed_and_many_are_left_to_the_files() -> None:
    few = strip(Value("speed", "tpot_seconds", "p", 0.002, "s", False, None, (0.003, 0.001, 0.002)))
    assert few is not None
    assert few.listed == "0.003 0.001 0.002"
    assert few.said == "3 samples: 1.00 to 3.00, median 2.00 ms"
    assert few.path.count("M") == 3
    many = strip(
        Value("x", "kl_mean", "p", 1.0, "nats", False, None, tuple(map(float, range(500))))
    )
    assert many is not None
    assert many.listed == ""
    assert 1 < many.path.count("M") <= 36
    broken = strip(Value("x", "kl_mean", "p", math.inf, "nats", False, None, (1.0, math.inf, 2.0)))
    assert broken is not None
    assert "3 samples, 1 not finite: 1.0" in broken.said
    assert strip(Value("x", "kl_mean", "p", 1.0, "nats", False)) is None


def test_answers_are_counted_and_losses_are_in_nats() -> None:
    answers = Value("tasks", "acc", "facts_5shot", 0.75, "share", True, None, (1.0, 0.0, 1.0, 1.0))
    losses = Value("perplexity", "perplexity", "t", 7.4, "perplexity", False, None, (1.0, 3.0))
    none_right = replace(answers, samples=(0.0, 0.0))
    for value, said in (
        (answers, "3 of 4 answers right"),
        (none_right, "0 of 2 answers right"),
        (losses, "2 samples: 1.000 to 3.000, median 2.000 nats"),
    ):
        found = strip(value)
        assert found is not None
        assert found.said == said


def test_kernels_coverage_and_texts_beside_the_baselines(grid: list[Record]) -> None:
    page = page_of(grid[5], grid[0])
    for text in (
        "SyntheticLinear",
        "model.layers.0.self_attn.q_proj",
        "2,359,296 of 3,000,000",
        "an embedding",
        "Anna lives in",
        "Lima and sells 12 apples a day.",
        "a synthetic record: nothing was measured",
    ):
        assert text in page.text
    marked = re.search(
        r"Lima and sells 12 <ins>pears a day\.</ins>",
        dict(cell_files(make_page(grid)))[cell_page(grid[5].cell)].decode(),
    )
    assert marked is not None


def test_markup_in_names_texts_and_paths_shows_as_text(grid: list[Record]) -> None:
    path = """/models/it's "7b" & <b>/x"""
    entry = {"prompt": EVIL, "reference": f"{EVIL} a", "text": f"{EVIL} b"}
    kernel = {**grid[5].details["kernels"][0], "kernel": EVIL, "example": path}
    record = resolved(
        replace(
            grid[5],
            cell=f"cell {EVIL} \"'",
            config={**grid[5].config, "model": EVIL, "command": f"python run.py model={path}"},
            details={**grid[5].details, "generation": [entry], "kernels": [kernel]},
        ),
        evil={EVIL: EVIL},
    )
    base = replace(grid[0], config={**grid[0].config, "model": EVIL})
    files = dict(cell_files(make_page([record, base])))
    name = cell_page(record.cell)
    assert re.fullmatch(r"cells/[A-Za-z0-9._-]+\.html", name)
    content = files[name].decode()
    assert "<script" not in content
    page = Outline(content)
    assert page.open == []
    assert page.text.count(EVIL) > 6
    assert path in page.text


def test_a_failed_and_a_partial_cell_tell_their_errors_in_full(grid: list[Record]) -> None:
    page = page_of(failed(grid[6]), grid[0])
    assert "it needed more memory than its limit of 64 MiB" in page.text
    assert "failed" in page.text
    assert "the tasks had <no> answers | at all" in page_of(partial(grid[6]), grid[0]).text


def test_what_a_simulated_row_keeps_back_is_named(grid: list[Record]) -> None:
    page = page_of(simulated(grid[9]), grid[0])
    assert "Not shown, since the row is simulated: artefact_bytes" in page.text


def test_repetitions_have_a_page_each_that_leads_to_their_row(grid: list[Record]) -> None:
    records = [grid[0], *(repetition(grid[7], seed) for seed in (0, 1, 2))]
    page = make_page(records)
    shown = [p for p in cell_pages(page) if p.repeated]
    assert [p.row.record.cell for p in shown] == [record.cell for record in records[1:]]
    assert {p.back for p in shown} == {f"../report.html#{page.anchors[records[1].cell]}"}
    assert "One of 3 seeds" in page_of(*reversed(records)).text


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (sensitivity_record(), ("KL (nats a token) of each matrix", "block 3", "mlp.down_proj")),
        (deploy_record(), ("perplexity increase", "PASSED", "cpu_server")),
        (search_record(), ("Chosen: rtn 8 bits g128", "its interval lies above the limit")),
    ],
)
def test_cells_of_other_jobs_show_what_they_found(record: Record, wanted: tuple[str, ...]) -> None:
    page = page_of(record)
    for text in (*wanted, record.config["command"]):
        assert text in page.text
    assert ("a", "../report.html#jobs") in [(tag, at.get("href")) for tag, at in page.tags]


def test_an_allocation_is_a_map_of_blocks_by_modules() -> None:
    page = make_page(every_kind())
    with_map = [shown for shown in cell_pages(page) if shown.maps]
    assert with_map
    content = dict(cell_files(page))[cell_page(with_map[0].row.record.cell)].decode()
    assert "--shade:" in content
    assert with_map[0].maps[0].rows[0] in content


def test_pages_of_cells_that_are_gone_are_removed(runs: Write, grid: list[Record]) -> None:
    folder = runs(grid[:2])
    stale = folder / "report" / "cells" / "old.html"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    write_report(folder)
    assert {path.name for path in stale.parent.iterdir()} == {
        Path(cell_page(record.cell)).name for record in grid[:2]
    }


def test_nested_entries_and_empty_ones() -> None:
    found = tree({"a": {"b": None, "c": []}, "d": [{"e": True}], "f": [1, "x"], "g": 0})
    assert found == (
        Node("a", "", (Node("b", "none"), Node("c", "none"))),
        Node("d", "", (Node("1", "", (Node("e", "true"),)),)),
        Node("f", "1, x"),
        Node("g", "0"),
    )


def test_equal_records_give_equal_pages() -> None:
    first, second = (dict(cell_files(make_page(Synthetic().grid()))) for _ in range(2))
    assert first == second


def test_a_page_that_cannot_be_written_leaves_no_half_of_one(
    runs: Write, grid: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs(grid[:2])
    paths = write_report(folder)
    before = paths.html.read_bytes()

    def full(path: Path, target: Path) -> Path:
        raise OSError(f"no space for {target}")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report(folder)
    assert paths.html.read_bytes() == before
    assert not list(paths.folder.rglob("*.tmp"))
