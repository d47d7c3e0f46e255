"""`python -m reports RUNS_DIR`: write the report of a folder of runs, or compare two rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reports.comparisons import UnknownRowError, compare_text
from reports.render import ReportError, read_runs, write_report
from reports.repetitions import MODES

PLAIN_WIDTH = 160
"""Columns of a comparison that goes to a file or a pipe."""

EXIT_UNKNOWN_ROW = 1
EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print where it is, or print a comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m reports",
        description="Write RUNS_DIR/report/: report.html, report.md, and the tables results, "
        "values and comparisons, from the records that sweeps left in RUNS_DIR.",
    )
    parser.add_argument("runs_dir", metavar="RUNS_DIR", type=Path, help="runs_dir of the sweeps")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="print the comparison of two rows, named as in the report, and write nothing",
    )
    parser.add_argument(
        "--repeat",
        choices=MODES,
        help="what makes repetitions of one row, instead of what each record says",
    )
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            records, _ = read_runs(options.runs_dir)
            width = None if sys.stdout.isatty() else PLAIN_WIDTH
            print(compare_text(records, tuple(options.compare), options.repeat, width), end="")
            return 0
        paths = write_report(options.runs_dir, options.repeat)
    except UnknownRowError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNKNOWN_ROW
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"report: {paths.html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
