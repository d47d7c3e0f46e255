"""Measures a long sweep: `python -m tests.long_sweep --cells 5000 --folder FOLDER`.

The sweep runs, its report is made again, the finished sweep is resumed, and beside that stands what
Hydra alone costs on this machine at this time. Simulated figures; the costs are real. A folder that
a run has stopped in is gone on with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.long_sweep.grid import CONFIG, Grid, arguments
from tests.long_sweep.watch import QUIET, Watched, watch

FIRST_CELL = 100
"""Growth is counted from here: before, modules and caches fill."""

MIB = 2**20


def main() -> int:
    """Print the figures; the exit status is 1 where a command failed."""
    options = _parser().parse_args()
    grid = Grid.of(options.cells)
    with tempfile.TemporaryDirectory(prefix="quantbench-long-") as temporary:
        folder = Path(options.folder or temporary).absolute()
        grid.write_config(folder / "conf")
        print(f"{grid.cells} cells, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
        for measure in (_sweep, _report, _resume):
            if measure(grid, folder).status:
                return 1
        _hydra(options.hydra_jobs)
    return 0


def _sweep(grid: Grid, folder: Path) -> Watched:
    command = ["run.py", *arguments(folder / "conf", folder / "runs")]
    found = watch(command, max(1, min(FIRST_CELL, grid.cells // 20)), QUIET)
    _failed(found)
    ran = sum(found.ended.values())
    if found.status:
        return found
    print(f"\nsweep: {found.seconds:.0f} s, {ran} cells ran: {found.ended}")
    if ran:
        first, last = found.samples[0], found.samples[-1]
        each = (last.seconds - first.seconds) / max(1, last.cell - first.cell)
        print(f"  {each:.3f} s a cell; {first.seconds:.0f} s before the first had ended")
        for sample in found.samples:
            _memory(f"cell {sample.cell}", sample.rss, sample.uss)
        growth = found.growth(FIRST_CELL)
        if growth is not None:
            print(f"  growth from cell {FIRST_CELL} to {last.cell}: {growth / MIB:.1f} MiB")
        print(f"  tables and report behind the last cell: {found.seconds - found.last_cell:.1f} s")
    return found


def _report(grid: Grid, folder: Path) -> Watched:
    found = watch(["-m", "reports", str(folder / "runs")], 1, QUIET)
    _failed(found)
    if found.status:
        return found
    report = folder / "runs/report"
    pages = sorted((report / "cells").glob("*.html"))
    print(
        f"\nreport: {found.seconds:.1f} s ({found.cpu:.1f} s of the processor), "
        f"peak {found.peak / MIB:.0f} MiB"
    )
    for name in ("report.html", "report.md"):
        print(f"  {name}: {(report / name).stat().st_size / 1e6:.2f} MB")
    size = sum(page.stat().st_size for page in pages)
    print(f"  {len(pages)} pages of {grid.cells} cells: {size / 1e6:.1f} MB")
    return found


def _resume(grid: Grid, folder: Path) -> Watched:
    clocks = folder / "clocks.json"
    command = ["-m", "tests.long_sweep.timed", str(clocks)]
    found = watch([*command, *arguments(folder / "conf", folder / "runs")], 1, QUIET)
    _failed(found)
    if found.status:
        return found
    times = json.loads(clocks.read_text())
    print(f"\nresume of the finished sweep: {found.seconds:.1f} s, report included")
    for kind, name in (("wall", "wall clock"), ("cpu", "processor")):
        whole, composed = times["sweep"][kind], times["compose"][kind]
        calls = times["compose"]["calls"]
        print(
            f"  {name}: {1e3 * whole / calls:.2f} ms a cell, of which Hydra composing "
            f"{1e3 * composed / calls:.2f}, ours {1e3 * (whole - composed) / calls:.2f}"
        )
    print(f"  {grid.cells} cells, {times['compose']['calls']:.0f} composed; {_last(found)}")
    return found


def _hydra(jobs: int) -> None:
    """Print what Hydra's basic sweeper takes for jobs that do nothing, start-up left out."""
    seconds: dict[int, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, jobs + 1):
            # A sweeper of Hydra's, one axis, and the callback left out that writes reports.
            found = watch(
                [
                    *("-m", "tests.long_sweep.nothing", "-m", f"--config-dir={CONFIG}"),
                    *("hydra/sweeper=basic", "~hydra.callbacks.closing", f"runs_dir={folder}"),
                    *("job=simulated", "suite=smoke", "method=rtn", "bits=4", "group_size=32"),
                    *("repeat=none", "model.name=simulated_0"),
                    "seed=" + ",".join(map(str, range(count))),
                ],
                1,
                QUIET,
            )
            _failed(found)
            seconds[count] = found.seconds, found.cpu
    each = [(long - short) / jobs for short, long in zip(*seconds.values(), strict=True)]
    print(f"\nHydra alone, {jobs} jobs that do nothing: {1e3 * each[0]:.1f} ms a job, ", end="")
    print(f"{1e3 * each[1]:.1f} ms of the processor (composed twice, as its basic sweeper does)")


def _memory(name: str, rss: int, uss: int) -> None:
    print(f"  {name:>10}: resident {rss / MIB:7.1f} MiB, unshared {uss / MIB:7.1f} MiB")


def _last(found: Watched) -> str:
    return next((line for line in reversed(found.said) if "of them there already" in line), "")


def _failed(found: Watched) -> None:
    if found.status:
        print("\n".join(found.said[-20:]), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.long_sweep", description=__doc__)
    parser.add_argument("--cells", type=int, default=5000, help="about how many (5000)")
    parser.add_argument("--folder", help="where the run goes; without, a temporary folder")
    parser.add_argument("--hydra-jobs", type=int, default=200, help="for Hydra's own cost (200)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
