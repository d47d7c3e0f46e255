"""`python -m reports recommend RUNS_DIR key=value ...`: which measured row to take, and why.

How rows are chosen: `choice`; conditions: `conditions`; beside it the documents' own advice for
the case: `counsel`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.record import Record
from reports import words
from reports.gather import make_groups, make_rows
from reports.recommend.choice import select
from reports.recommend.conditions import KNOWN, ConditionError, Conditions, closest, read_conditions
from reports.recommend.counsel import case_of, counsel
from reports.recommend.readings import task_scores
from reports.recommend.text import Answer, answer_json, answer_text
from reports.render import ReportError, read_runs
from reports.rows import Group, Row

PLAIN_WIDTH = 160
"""Columns of an answer that goes to a file or a pipe."""

EXIT_NOTHING, EXIT_USER_ERROR = 1, 2


def main(arguments: Sequence[str]) -> int:
    """Print what is recommended; returns 0 where a row qualifies, 1 where none, 2 for a mistake."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        records, problems = read_runs(options.runs_dir)
        answers = recommend(records, options.conditions)
    except (ConditionError, ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    for problem in problems:
        print(f"not read: {words.one_line(problem)}", file=sys.stderr)
    if options.json:
        print(json.dumps([answer_json(answer) for answer in answers], indent=1))
    else:
        terminal = sys.stdout.isatty()
        width = None if terminal else PLAIN_WIDTH
        if len(answers) > 1:
            names = [answer.selection.group.title for answer in answers]
            print(
                f"{options.runs_dir} has {words.listed(names)}; rows compare only within one of "
                "them, so each is answered: model= and hardware= name one.\n"
            )
        print("\n".join(answer_text(answer, width, colour=terminal) for answer in answers), end="")
    return 0 if any(answer.selection.qualifying for answer in answers) else EXIT_NOTHING


def recommend(records: Sequence[Record], given: Sequence[str]) -> list[Answer]:
    """Return what is recommended of `records` under the conditions `given` as key=value.

    Rows compare only within one model on one hardware, so each of these has its own answer.

    Raises:
        ConditionError: a condition cannot be read, or names what no row has.
        ReportError: no record is a row.
    """
    rows = make_rows(records)
    if not rows:
        raise ReportError("no record is of a cell: there is nothing to choose from")
    conditions = read_conditions(given, task_scores(rows))
    groups = [group for group in make_groups(rows) if _is_asked(group, conditions)]
    for name, wanted in conditions.exact.items():
        _check_known(name, wanted, rows)
    if not groups:
        raise ConditionError("no model of these was run on that hardware")
    return [_answer(group, conditions) for group in groups]


def _answer(group: Group, conditions: Conditions) -> Answer:
    selection = select(group, conditions)
    case = case_of(group, conditions)
    return Answer(selection, case, tuple(counsel(selection, case)))


def _is_asked(group: Group, conditions: Conditions) -> bool:
    own = {"model": group.model, "hardware": group.hardware}
    return all(own[key] in conditions.exact.get(key, (own[key],)) for key in own)


def _check_known(name: str, wanted: Sequence[str], rows: Sequence[Row]) -> None:
    found = {
        "model": {row.model for row in rows},
        "hardware": {row.hardware for row in rows},
        "method": {row.plain_method for row in rows},
    }.get(name)
    for one in wanted:
        if found is not None and one not in found:
            known = sorted(found, key=words.natural)
            raise ConditionError(
                f"no row has {name}={one}{closest(one, known)}; there are {words.listed(known)}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports recommend",
        description="Which measured row to take under your conditions, and why; beside it what the "
        "documents advise for the case.",
        epilog=f"Conditions: {KNOWN}. Units: %, GB, GiB, MB, s, ms, points. Several values: "
        "method=gptq,awq. priority=accuracy (default), size or speed chooses on the front; the "
        "others choose the documents' advice. Exit status: 0 something qualifies, 1 nothing does, "
        "2 a condition cannot be read.",
    )
    parser.add_argument("runs_dir", metavar="RUNS_DIR", type=Path, help="runs_dir of the sweeps")
    parser.add_argument(
        "conditions", metavar="KEY=VALUE", nargs="*", help="as max_perplexity_increase=3%%"
    )
    parser.add_argument("--json", action="store_true", help="the same as data")
    return parser
