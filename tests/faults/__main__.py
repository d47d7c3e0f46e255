"""`python -m tests.faults`: the long form of every series, and the table of docs/reliability.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.faults.series import SERIES, UNABLE
from tests.faults.tally import Tally, table

BEGIN, END = "<!-- counts: python -m tests.faults -->", "<!-- end of the counts -->"


def main() -> int:
    """Run the series that were asked for; status 1 where a count says that something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("series", nargs="*", help=f"of {', '.join(SERIES)}; none: all of them")
    parser.add_argument("--short", action="store_true", help="the form that CI runs")
    parser.add_argument("--write", type=Path, help="Markdown file between whose lines the table is")
    options = parser.parse_args()
    unknown = [name for name in options.series if name not in SERIES]
    if unknown:
        parser.error(f"{unknown[0]} is no series; there are {', '.join(SERIES)}")
    begun = time.monotonic()
    tallies = []
    with tempfile.TemporaryDirectory(prefix="quantbench-faults-") as folder:
        for number, name in enumerate(options.series or SERIES):
            tally = _run(name, Path(folder) / str(number), options.short)
            if tally is not None:
                tallies.append(tally)
    text = _text(tallies, time.monotonic() - begun)
    print(f"\n{text}")
    if options.write is not None:
        _write(options.write, text)
    return 1 if any(tally.sentences for tally in tallies) else 0


def _run(name: str, folder: Path, short: bool) -> Tally | None:
    form = SERIES[name][0 if short else 1]
    begun = time.monotonic()
    try:
        tally = form(folder)
    except UNABLE as error:
        print(f"{name}: left out: {error}", flush=True)
        return None
    print(f"{tally.row} {time.monotonic() - begun:.0f} s", flush=True)
    for sentence in tally.sentences:
        print(f"  wrong: {sentence}", file=sys.stderr, flush=True)
    return tally


def _text(tallies: list[Tally], seconds: float) -> str:
    date = datetime.now(UTC).date().isoformat()
    wrong = sum(len(tally.sentences) for tally in tallies)
    faults = sum(tally.faults for tally in tallies)
    return (
        f"{table(tallies)}\n\n{faults} faults on {date}, in {seconds / 60:.0f} minutes; "
        f"{wrong} things went wrong."
    )


def _write(path: Path, text: str) -> None:
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: {path} has no lines {BEGIN} and {END} for the table to stand in")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
