"""What changed between two sets of records: matching, tests, refusals, exit statuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.record import FILE_NAME, Record, Value, write_record
from reports.__main__ import main
from reports.blocks import Block, Grid, Head
from reports.blocks_text import blocks_text
from reports.diff.command import difference, document
from reports.diff.facts import facts, key_sentences, load_sentence, one_sided
from reports.diff.figures import MEMORY_NOISE, Change, figures
from reports.diff.match import match
from reports.render import ReportError
from tests.reports.synthetic import (
    PERPLEXITY,
    SPEED,
    Synthetic,
    changed,
    environment,
    failed,
    simulated,
    with_tasks,
)
from tests.reports.test_render import raw_html

Edit = Callable[[Record], Record]
Write = Callable[[str, list[Record]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write records into a folder of this name, as a sweep leaves them."""

    def made(name: str, records: list[Record]) -> Path:
        for index, record in enumerate(records):
            write_record(record, tmp_path / name / f"cell{index}")
        return tmp_path / name

    return made


def other(record: Record, **config: Any) -> Record:
    """Return the cell as another version of the code would leave it: other ids, same question."""
    keys = {"cell_key": "other key", "artefact_key": "other artefact"}
    return replace(record, cell=f"{record.cell}-other", config={**record.config, **keys, **config})


def with_options(record: Record, **nodes: Any) -> Record:
    """Return the record with nodes of its resolved configuration replaced."""
    resolved = {**record.config["resolved"], **nodes}
    return replace(record, config={**record.config, "resolved": resolved})


def on_machine(record: Record, **facts_: Any) -> Record:
    """Return the record as measured elsewhere."""
    return replace(record, environment=environment(**facts_))


def shifted(record: Record, by: float) -> Record:
    """Return the record with its losses of every window moved by about `by` nats."""
    values = []
    for value in record.values:
        if value.metric == "perplexity":
            # Not one shift for all: that would leave no error to test against.
            samples = tuple(s + by * (1 + 0.1 * (-1) ** i) for i, s in enumerate(value.samples))
            figure = math.exp(sum(samples) / len(samples))
            value = replace(value, samples=samples, value=figure)
        values.append(value)
    return replace(record, values=tuple(values))


def of(changes: tuple[Change, ...], metric: str, name: str = "") -> list[Change]:
    """Return the changes of one metric, of one cell if named."""
    return [c for c in changes if c.metric == metric and name in ("", c.pair.name)]


def test_cells_are_matched_by_what_was_asked_for(grid: list[Record]) -> None:
    found = match(grid, [other(record) for record in reversed(grid[:12])])
    assert len(found.pairs) == 12
    assert all(p.second.record.cell == f"{p.first.record.cell}-other" for p in found.pairs)
    assert [row.record for row in found.only_first] == [grid[12]]
    assert not found.only_second
    assert not found.ambiguous


def test_another_option_of_the_method_is_another_cell(grid: list[Record]) -> None:
    rtn = grid[-1]
    method = {**rtn.config["resolved"]["method"], "symmetric": True}
    found = match([rtn], [with_options(rtn, method=method)])
    assert not found.pairs
    assert len(found.only_first) == len(found.only_second) == 1


def test_an_option_that_one_version_does_not_know_does_not_part_cells(grid: list[Record]) -> None:
    rtn = grid[-1]
    newer = with_options(rtn, method={**rtn.config["resolved"]["method"], "kernel": "auto"})
    found = match([rtn], [newer])
    assert len(found.pairs) == 1
    assert one_sided(found.pairs) == ["Recorded in B alone: method.kernel auto."]


def test_places_are_not_what_was_asked_for(grid: list[Record]) -> None:
    ends = [
        with_options(grid[0], model={"name": "embedded", "path": path}, data={"path": path})
        for path in ("/here", "/there")
    ]
    assert len(match([ends[0]], [ends[1]]).pairs) == 1


def test_a_cell_that_failed_before_it_knew_its_bits_is_still_matched(grid: list[Record]) -> None:
    broken = replace(failed(grid[0]), config={**grid[0].config, "bits": None})
    assert len(match([grid[0]], [broken]).pairs) == 1


def test_the_closest_cell_is_taken_first_and_several_are_ambiguous(grid: list[Record]) -> None:
    def threads(count: int) -> Record:
        record = with_options(grid[0], hardware={"name": "cpu", "threads": count})
        return replace(record, cell=f"threads {count}")

    exact = match([threads(1), threads(2)], [threads(2)])
    assert [pair.first.record.cell for pair in exact.pairs] == ["threads 2"]
    assert [row.record.cell for row in exact.only_first] == ["threads 1"]
    unsure = match([threads(1), threads(2)], [threads(4)])
    assert not unsure.pairs
    (one,) = unsure.ambiguous
    assert (len(one.first), len(one.second)) == (2, 1)


def test_another_suite_matches_last_and_lends_only_equal_protocols(grid: list[Record]) -> None:
    ends = [
        with_options(grid[0], suite={"measures": {"speed": {"depth": depth}}}) for depth in (1, 2)
    ]
    moved = changed(ends[1], "decode_tokens_per_second", protocol="prompt1_batch1")
    found = figures(match([ends[0]], [moved]).pairs)
    (refused,) = [one for one in found.uncompared if one.metric == "decode_tokens_per_second"]
    assert refused.why == f"protocol {SPEED} in A, prompt1_batch1 in B"
    assert not of(found.changes, "decode_tokens_per_second")
    assert of(found.changes, "perplexity")


def test_the_same_samples_are_identical_whatever_their_number(grid: list[Record]) -> None:
    found = figures(match(grid, [other(record) for record in grid]).pairs)
    tested = [change for change in found.changes if change.kind == "tested"]
    assert {change.verdict for change in tested} == {"identical", "same answers"}
    assert {c.verdict for c in found.changes if c.kind == "counted"} == {"same"}
    assert not any(change.worse for change in found.changes)
    assert not found.uncompared


def test_a_shift_of_every_window_is_found_and_corrected_over_the_cells(grid: list[Record]) -> None:
    moved = [shifted(record, 0.002 if record is grid[-1] else 0.0) for record in grid]
    pairs = match(grid, [other(record) for record in moved]).pairs
    found = figures(pairs)
    (worse,) = [change for change in found.changes if change.worse]
    assert (worse.metric, worse.verdict) == ("perplexity", "worse")
    assert worse.loss == pytest.approx(0.002, rel=0.01)
    assert worse.difference == "+0.20 %"
    assert worse.samples == "16 windows"
    alone = figures([pair for pair in pairs if pair.name == worse.pair.name])
    (single,) = of(alone.changes, "perplexity")
    assert float(single.p.lstrip("< ")) < float(worse.p.lstrip("< "))
    better = figures(match(moved, [other(record) for record in grid]).pairs)
    (gain,) = [one for one in of(better.changes, "perplexity") if one.verdict == "better"]
    assert not gain.worse


def test_answers_are_tested_by_flips() -> None:
    record = with_tasks(Synthetic().grid()[5])
    values = [
        replace(v, samples=tuple(0.0 for _ in v.samples), value=0.0)
        if v.protocol == "hellaswag_0shot"
        else v
        for v in record.values
    ]
    found = figures(match([record], [other(replace(record, values=tuple(values)))]).pairs)
    (worse,) = [c for c in of(found.changes, "acc") if c.protocol == "hellaswag_0shot"]
    assert worse.verdict == "worse"
    assert (int(worse.lost) > 50, worse.gained) == (True, "0")
    # Subjects of MMLU are parts of it and are not tested one by one.
    assert not any("anatomy" in change.protocol for change in found.changes)


def test_every_byte_on_disk_counts_and_memory_beyond_its_noise(grid: list[Record]) -> None:
    record = grid[-1]
    size, memory = (
        next(v.value for v in record.values if v.metric == name)
        for name in ("artefact_bytes", "peak_memory_bytes")
    )

    def after(metric: str, value: float) -> Change:
        moved = other(changed(record, metric, value=value))
        (found,) = of(figures(match([record], [moved]).pairs).changes, metric)
        return found

    larger = after("artefact_bytes", size + 8)
    assert (larger.verdict, larger.difference, larger.worse) == ("larger", "+8 B", True)
    assert not after("artefact_bytes", size - 8).worse
    within, beyond = (memory * (1 + share * MEMORY_NOISE) for share in (0.9, 1.1))
    assert not after("peak_memory_bytes", int(within)).worse
    assert after("peak_memory_bytes", int(beyond)).worse


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(0.95, "within noise"), (1.05, "within noise"), (0.9, "worse, beyond noise")],
)
def test_speed_is_held_against_both_spreads(grid: list[Record], ratio: float, verdict: str) -> None:
    # The synthetic timing spreads by 3 % in each record.
    record = changed(grid[1], "decode_tokens_per_second", value=100.0)
    moved = other(changed(record, "decode_tokens_per_second", value=100.0 * ratio))
    (found,) = of(figures(match([record], [moved]).pairs).changes, "decode_tokens_per_second")
    assert found.verdict == verdict
    assert found.beside == "3 % and 3 %"


def test_a_busy_machine_leaves_a_speed_unjudged(grid: list[Record]) -> None:
    slow = changed(grid[1], "decode_tokens_per_second", value=1.0)
    moved = other(on_machine(slow, load_average=3.5))
    pairs = match([grid[1]], [moved]).pairs
    (found,) = of(figures(pairs).changes, "decode_tokens_per_second")
    assert (found.verdict, found.worse) == ("busy machine", False)
    assert load_sentence(pairs).endswith(
        "above 1.5 a core: a speed that differs there is not judged."
    )


def test_own_samples_make_the_spread_and_one_time_says_nothing(grid: list[Record]) -> None:
    times = (1.0, 1.0, 1.2, 1.4, 1.4)
    record = replace(
        grid[0],
        values=(
            Value("speed", "ttft_seconds", SPEED, 1.2, "s", False, samples=times),
            Value("load", "load_seconds", "artefact", 1.0, "s", False),
        ),
    )
    moved = changed(other(record), "load_seconds", value=2.0)
    found = figures(match([record], [moved]).pairs)
    by_metric = {change.metric: change for change in found.changes}
    assert by_metric["ttft_seconds"].beside == "33 % and 33 %"
    assert by_metric["load_seconds"].verdict == "noise not known"


@pytest.mark.parametrize(
    ("facts_", "verdict"),
    [({"cpu": "Another CPU"}, "another machine"), ({"threads": 8}, "other threads")],
)
def test_speed_is_never_the_softwares_alone_between_machines(
    grid: list[Record], facts_: dict[str, Any], verdict: str
) -> None:
    moved = on_machine(changed(grid[1], "decode_tokens_per_second", value=1.0), **facts_)
    found = figures(match([grid[1]], [other(moved)]).pairs)
    timed = {change.verdict for change in found.changes if change.kind == "timed"}
    assert timed == {verdict, "same"}
    assert not any(change.worse for change in found.changes)


def test_a_simulated_row_has_no_size_or_speed_to_compare(grid: list[Record]) -> None:
    found = figures(match([simulated(grid[-1])], [simulated(other(grid[-1]))]).pairs)
    made = {c.metric for c in found.changes if c.kind in ("counted", "timed")}
    assert made == {"quantize_seconds", "quantize_peak_bytes"}


@pytest.mark.parametrize("what", ["model", "text"])
def test_quality_of_another_model_or_text_is_not_compared(grid: list[Record], what: str) -> None:
    ends = [
        replace(record, config={**record.config, "evaluation_digest": "a" * 64})
        for record in (grid[0], other(grid[0]))
    ]
    if what == "model":
        model = {**ends[1].details["model"], "sha256": "b" * 64}
        ends[1] = replace(ends[1], details={**ends[1].details, "model": model})
    else:
        ends[1] = replace(ends[1], config={**ends[1].config, "evaluation_digest": "b" * 64})
    pairs = match([ends[0]], [ends[1]]).pairs
    found = figures(pairs)
    tested = [change for change in found.changes if change.kind == "tested"]
    # Questions of tasks have digests of their own.
    assert {c.metric for c in tested} == (set() if what == "model" else {"acc"})
    assert any(change.metric == "artefact_bytes" for change in found.changes)
    (why,) = {o.why.partition(": ")[2] for o in found.uncompared if o.metric == "perplexity"}
    assert why.startswith("another model: weights" if what == "model" else "another evaluation te")
    assert {fact.kind for fact in facts(pairs)} == {what}


def test_facts_name_what_differs_once_with_its_cells(grid: list[Record]) -> None:
    newer = {"torch": "2.14.0", "quantbench": "0.1.0", "triton": "3.0"}
    moved = [other(on_machine(record, packages=newer)) for record in grid]
    pairs = match(grid, moved).pairs
    (fact,) = facts(pairs)
    assert (fact.kind, fact.name, fact.first, fact.second) == (
        *("software", "torch"),
        *("2.13.0", "2.14.0"),
    )
    assert fact.pairs == len(grid)
    assert one_sided(pairs) == ["Recorded in B alone: triton 3.0."]
    assert "13 pairs hold no digest of the evaluation text" in key_sentences(pairs)[1]
    same = match(grid, grid).pairs
    assert key_sentences(same)[0].startswith("The keys of all 13 matched cells are equal")


def run(*arguments: object) -> int:
    return main(["diff", *map(str, arguments)])


def test_nothing_worse_is_status_0(
    grid: list[Record], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = write("a", grid), write("b", [other(record) for record in grid])
    assert run(*folders) == 0
    said = capsys.readouterr().out
    assert "13 cells matched, 0 in A alone, 0 in B alone, 0 ambiguous" in said
    assert "Nothing is worse in B, of what could be compared" in said
    assert max(map(len, said.splitlines())) <= 160


def test_worse_is_status_1_and_a_tolerance_lets_it_pass(
    grid: list[Record], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = write("a", grid), write("b", [other(shifted(record, 0.002)) for record in grid])
    assert run(*folders) == 1
    assert "Worse in B: fp32, perplexity" in capsys.readouterr().out
    assert run(*folders, "--tolerance", "1%") == 0
    assert "Nothing is worse in B by more than 1 %" in capsys.readouterr().out


def test_a_cell_that_failed_is_worse_whatever_the_tolerance(
    grid: list[Record], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = write("a", grid[:2]), write("b", [other(grid[0]), failed(other(grid[1]))])
    assert run(*folders, "--tolerance", "50%") == 1
    assert "fp16 is ok in A and failed in B (quantize: the quantize" in capsys.readouterr().out


def test_a_slower_cell_counts_where_asked_for(grid: list[Record], write: Write) -> None:
    slow = changed(grid[1], "decode_tokens_per_second", value=1.0)
    folders = write("a", [grid[1]]), write("b", [other(slow)])
    assert run(*folders) == 0
    assert run(*folders, "--speed") == 1


def test_what_is_in_one_set_alone_is_named_with_its_command(
    grid: list[Record], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write("a", grid[:2]), write("b", grid[1:3]))
    said = capsys.readouterr().out
    assert "In A alone" in said
    assert grid[0].config["command"] in said
    assert grid[2].config["command"] in said


def test_refusals_are_one_sentence_and_status_2(
    grid: list[Record], write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = write("a", [grid[0]])
    there = write("b", [other(with_options(grid[0], method={"name": "fp32", "dtype": "x"}))])
    twice = write("twice", [grid[0], replace(grid[0], cell="again")])
    for arguments, expected in (
        ((twice, here), "were asked the same; move all but one of each set out of its folder"),
        ((here, write("c", [grid[1]])), "no cell of"),
        ((here, tmp_path / "none"), "there is no folder"),
        ((tmp_path / "one", tmp_path / "two"), f"{tmp_path / 'two'}"),
        ((here, here, "--html", tmp_path / "none" / "x.html"), "there is no folder"),
    ):
        assert run(*arguments) == 2
        said = capsys.readouterr()
        assert expected in said.err
        assert said.err.count("\n") == 1
        assert not said.out
    assert run(here, there) == 0
    with pytest.raises(SystemExit, match="2"):
        run(here, here, "--tolerance", "much")
    assert "'much' is no share; write it like 1% or 0.01" in capsys.readouterr().err


def test_another_schema_and_damage_are_named_for_both_sets(
    grid: list[Record], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = write("a", grid[:2]), write("b", grid[:2])
    path = folders[0] / "cell1" / FILE_NAME
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 7'))
    (folders[1] / "cell1" / FILE_NAME).write_text("{")
    assert run(*folders) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "has schema 7; this version reads schema 1" in said
    assert "is not a record" in said
    assert "1 cell, 1 unreadable" in said


def test_pages_escape_what_records_say_and_ask_for_nothing(
    grid: list[Record], write: Write, tmp_path: Path
) -> None:
    evil = "<script>alert(1)</script>"
    ends = [
        replace(grid[1], config={**grid[1].config, "model": evil}),
        on_machine(shifted(grid[1], 0.01), packages={"torch": evil}),
    ]
    ends[1] = other(ends[1], model=evil)
    pages = tmp_path / "x.html", tmp_path / "x.md"
    folders = write("a", [ends[0]]), write("b", [ends[1]])
    assert run(*folders, "--html", pages[0], "--markdown", pages[1]) == 1
    html, markdown = (page.read_text() for page in pages)
    assert evil not in html
    assert "&lt;script&gt;" in html
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert {piece for piece in raw_html(markdown) if "script" in piece} == set()
    assert "## In detail" in markdown


def test_json_holds_everything_with_numbers(
    grid: list[Record], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = write("a", grid), write("b", [other(shifted(record, 0.002)) for record in grid[1:]])
    assert run(*folders, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(document(difference(*folders))))
    assert len(found["matched"]) == 12
    assert [one["label"] for one in found["only_a"]] == ["fp32"]
    assert {one["protocol"] for one in found["worse"]} == {PERPLEXITY}
    assert all(one["loss"] > 0 for one in found["worse"])


def test_nothing_that_can_be_compared_names_why(grid: list[Record], tmp_path: Path) -> None:
    only = replace(grid[0], values=tuple(v for v in grid[0].values if v.metric == "perplexity"))
    for name, protocol in (("a", "one_gptq_1024"), ("b", "two_gptq_1024")):
        write_record(changed(only, "perplexity", protocol=protocol), tmp_path / name / "cell")
    with pytest.raises(ReportError, match="perplexity, protocol one_gptq_1024 in A, two_gptq"):
        difference(tmp_path / "a", tmp_path / "b")


def test_blocks_as_text_fold_long_tables_and_keep_to_the_width() -> None:
    heads = (Head("name"), Head("bytes", "B", numeric=True))
    folded = Grid("Long", heads, (), folded=True)
    block = Block("Title", ("A sentence. " * 20,), (), (folded,), "Legend")
    lines = blocks_text([block], 60).splitlines()
    assert lines[0] == "Title"
    assert max(map(len, lines)) <= 60
    assert "  Long: 0 lines, on the pages only." in lines


def test_the_first_word_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    for words in ("RUNS_DIR --compare A B", "recommend RUNS_DIR", "diff RUNS_A RUNS_B", "./diff"):
        assert words in said
    with pytest.raises(SystemExit, match="0"):
        main(["diff", "--help"])
    assert "Exit status: 0 nothing is worse in B" in capsys.readouterr().out
    # A folder of that name is given as a path.
    assert main(["./diff"]) == 2
    assert "there is no folder diff" in capsys.readouterr().err
