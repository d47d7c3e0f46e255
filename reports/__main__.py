"""`python -m reports RUNS_DIR`: write the report of a folder of runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reports.render import ReportError, write_report

EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print where it is; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m reports",
        description="Write RUNS_DIR/report/: report.html, report.md, results.csv, results.parquet "
        "and values.parquet, from the records that sweeps left in RUNS_DIR.",
    )
    parser.add_argument("runs_dir", metavar="RUNS_DIR", type=Path, help="runs_dir of the sweeps")
    options = parser.parse_args(arguments)
    try:
        paths = write_report(options.runs_dir)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"report: {paths.html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
