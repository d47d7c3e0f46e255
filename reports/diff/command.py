"""`python -m reports diff RUNS_A RUNS_B`: what changed between two sets of records.

Exit status: 0 nothing is worse in B; 1 something is: a figure of quality by its test, a size or a
memory by counting, a cell that failed, and with `--speed` a speed beyond noise; 2 nothing could be
compared, or the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.record import Record, write_atomically
from reports import words
from reports.blocks_text import blocks_text
from reports.diff.facts import facts
from reports.diff.figures import Change, figures
from reports.diff.match import match
from reports.diff.page import Difference, Side, blocks
from reports.gather import is_row
from reports.layout import html_page, markdown_page
from reports.render import ReportError, read_runs
from reports.rows import Row

EXIT_WORSE, EXIT_REFUSED = 1, 2


def main(arguments: Sequence[str]) -> int:
    """Print or write what changed between two folders of runs; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        found = difference(options.first, options.second, options.tolerance, options.speed)
        _put(found, options)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return EXIT_WORSE if found.worse or found.broken else 0


def difference(
    first: Path, second: Path, tolerance: float = 0.0, speed: bool = False
) -> Difference:
    """Return what changed from the records under `first` to those under `second`.

    Raises:
        ReportError: a folder has no record that can be read, or nothing can be compared.
    """
    sides, sets = _read(first, second)
    matching = match(sets[0], sets[1])
    found = Difference(
        sides[0],
        sides[1],
        matching,
        tuple(facts(matching.pairs)),
        figures(matching.pairs),
        tolerance,
        speed,
    )
    if not found.figures.changes and not found.broken:
        raise ReportError(_nothing(found))
    return found


def document(found: Difference) -> dict[str, Any]:
    """Return everything that was found as plain data."""
    matching = found.matching
    return {
        "a": asdict(found.first),
        "b": asdict(found.second),
        "tolerance": found.tolerance,
        "matched": [
            {"name": pair.name, "a": pair.first.record.cell, "b": pair.second.record.cell}
            for pair in matching.pairs
        ],
        "only_a": [_cell(row) for row in matching.only_first],
        "only_b": [_cell(row) for row in matching.only_second],
        "ambiguous": [
            {"a": [_cell(row) for row in one.first], "b": [_cell(row) for row in one.second]}
            for one in matching.ambiguous
        ],
        "facts": [asdict(fact) for fact in found.facts],
        "figures": [_figure(change) for change in found.figures.changes],
        "not_compared": [asdict(one) for one in found.figures.uncompared],
        "broken": [pair.name for pair in found.broken],
        "worse": [_figure(change) for change in found.worse],
    }


def _put(found: Difference, options: argparse.Namespace) -> None:
    """Write the pages that were asked for, and print the rest."""
    shown = blocks(found)
    context = {"title": f"{found.first.name} and {found.second.name} compared", "content": shown}
    if options.html is not None:
        _write(options.html, html_page("diff.html.jinja", {}, **context))
    if options.markdown is not None:
        _write(options.markdown, markdown_page("diff.md.jinja", **context))
    if options.json:
        print(json.dumps(document(found), indent=1, ensure_ascii=False))
        return
    written = [path for path in (options.html, options.markdown) if path is not None]
    width = Console().width if sys.stdout.isatty() else None
    print(blocks_text(shown[:1] if written else shown, width), end="")
    for path in written:
        print(f"  written: {path}")


def _write(path: Path, text: str) -> None:
    if not path.parent.is_dir():
        raise ReportError(f"there is no folder {path.parent} to write {path.name} into")
    write_atomically(path, text.encode())


def _read(*folders: Path) -> tuple[list[Side], list[list[Record]]]:
    """Return both sets; what is wrong with either stands in one error."""
    sides, sets, wrong = [], [], []
    for folder in folders:
        try:
            records, problems = read_runs(folder)
        except ReportError as error:
            wrong.append(str(error))
        else:
            sides.append(_side(folder, records, problems))
            sets.append(records)
    if wrong:
        raise ReportError("; ".join(wrong))
    return sides, sets


def _side(folder: Path, records: Sequence[Record], problems: Sequence[str]) -> Side:
    rows = sum(is_row(record) for record in records)
    return Side(str(folder), rows, len(records) - rows, tuple(problems))


def _nothing(found: Difference) -> str:
    matching = found.matching
    if found.figures.uncompared:
        one = found.figures.uncompared[0]
        return (
            f"{len(matching.pairs)} cells match, and no figure of them can be compared: "
            f"{one.metric}, {one.why}"
        )
    if matching.ambiguous:
        several = matching.ambiguous[0]
        names = words.listed([row.record.cell for row in (*several.first, *several.second)])
        return (
            f"no cell can be told to be the other set's: {names} were asked the same; move all but "
            "one of each set out of its folder"
        )
    return (
        f"no cell of {found.first.name} ({found.first.records}) was asked what one of "
        f"{found.second.name} ({found.second.records}) was: model, method with its options, bits, "
        "group size, data, hardware and seed must be the same"
    )


def _cell(row: Row) -> dict[str, Any]:
    return {"label": row.label, "cell": row.record.cell, "command": row.command}


def _figure(change: Change) -> dict[str, Any]:
    rest = {key: value for key, value in vars(change).items() if key != "pair"}
    return {"cell": change.pair.name, **rest}


def _tolerance(text: str) -> float:
    """Return `1%` or `0.01` as a share."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if matched is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write it like 1% or 0.01")
    return float(matched[1]) / (100 if matched[2] else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports diff",
        description="Say what changed between two sets of records: another version of a library, "
        "another machine, another commit of a model. Cells are matched by what was asked for, "
        "not by their ids; figures only meet under one protocol.",
        epilog="Exit status: 0 nothing is worse in B, 1 something is, 2 nothing could be compared.",
    )
    parser.add_argument("first", metavar="RUNS_A", type=Path, help="runs_dir of the older set")
    parser.add_argument("second", metavar="RUNS_B", type=Path, help="runs_dir of the newer set")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the page into FILE")
    parser.add_argument(
        "--markdown", metavar="FILE", type=Path, help="write it as Markdown, for a pull request"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--tolerance",
        metavar="SHARE",
        type=_tolerance,
        default=0.0,
        help="relative loss up to which nothing counts as worse, like 1%% (default: 0)",
    )
    parser.add_argument(
        "--speed",
        action="store_true",
        help="count a speed that is worse beyond noise on one machine, too",
    )
    return parser
