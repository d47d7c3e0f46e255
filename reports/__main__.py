"""`python -m reports`: the report of a folder of runs, a recommendation from it, or two compared.

The first word decides: `recommend`, `diff` and `track` have a command line of their own
(`reports.recommend`, `reports.diff`, `reports.track`), everything else is a folder. A folder of
such a name is given as `./diff`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from reports.comparisons import UnknownRowError, compare_text
from reports.render import ReportError, read_runs, write_report
from reports.repetitions import MODES

PLAIN_WIDTH = 160
"""Columns of a comparison that goes to a file or a pipe."""

EXIT_UNKNOWN_ROW = 1
EXIT_USER_ERROR = 2

COMMANDS = {
    "recommend": "reports.recommend.command",
    "diff": "reports.diff.command",
    "track": "reports.track",
}
"""First words that are no folder, and the modules whose `main` takes the words behind them."""

USAGE = """\
python -m reports RUNS_DIR [--repeat MODE]
       python -m reports RUNS_DIR --compare A B
       python -m reports recommend RUNS_DIR [KEY=VALUE ...]
       python -m reports diff RUNS_A RUNS_B
       python -m reports track RUNS_DIR --project NAME"""

OTHERS = """\
Three first words are commands, each with a --help of its own:
  recommend RUNS_DIR   which measured rows meet your conditions, and which to take
  diff RUNS_A RUNS_B   what changed between two sets of records: another version of a
                       library, another machine, another commit of a model
  track RUNS_DIR       every row as a run of Weights & Biases, on disk until you send it
A folder that is called by one of these words is given as ./recommend, ./diff or ./track."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print where it is, or do what the first word says; returns the status.

    Of `--compare`, an unknown row is status 1; every other mistake of the user is 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        # Imported when asked for: a report needs neither, and takes no longer for them.
        return int(import_module(COMMANDS[given[0]]).main(given[1:]))
    options = _parser().parse_args(given)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports",
        usage=USAGE,
        description="Write RUNS_DIR/report/: report.html, report.md, and the tables results, "
        "values and comparisons, from the records that sweeps left in RUNS_DIR.",
        epilog=OTHERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
