"""`python -m tests.fuzz.run [TARGET ...]`: searches for inputs that break a reader, by coverage.

Each target runs in a process of its own under atheris (libFuzzer), with a limit of memory and of
seconds an input, in a folder on tmpfs where there is one. It ends after `--executions` inputs, or
after `--seconds`. One line a target says how many inputs were run, how many of them the reader
took, and what coverage was reached; a finding is printed with its traceback and its input kept.
The status is 1 where anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.registry import GROUPS, load

EXECUTIONS = 1_000_000
RSS_MEGABYTES = 2048
SECONDS_AN_INPUT = 10
ADDRESS_SPACE_BYTES = 1 << 30
"""What a reader may take beyond what its process has at the start; a believed length fails."""

INSTRUMENTED = ["harness", "kernels", "methods", "reports", "pickletools"]
LINES_SHOWN = 40
FOUND = 1
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz the targets that are named, all of them by default; return the exit status."""
    options = _parser().parse_args(arguments)
    unknown = sorted(set(options.targets) - set(GROUPS))
    if unknown:
        print(f"error: no target {unknown[0]}; there are {', '.join(GROUPS)}", file=sys.stderr)
        return USER_ERROR
    if options.child:
        return _fuzz(options.targets[0], options)
    found = 0
    for name in options.targets or GROUPS:
        found += not _run(name, options)
    return FOUND if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("targets", metavar="TARGET", nargs="*", help=", ".join(GROUPS))
    parser.add_argument("--executions", type=int, default=EXECUTIONS, metavar="N")
    parser.add_argument(
        "--seconds", type=int, default=0, help="longest for each target; 0: no limit"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), metavar="FOLDER")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def _run(name: str, options: Any) -> bool:
    """Run one target in its own process and print its line; return whether nothing was found."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    options.findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantbench-fuzz-", dir=place) as folder:
        scratch = Path(folder).resolve()
        command = [sys.executable, "-m", "tests.fuzz.run", name, "--child", str(scratch)]
        command += ["--executions", str(options.executions), "--seconds", str(options.seconds)]
        command += ["--seed", str(options.seed), "--findings", str(options.findings.resolve())]
        started = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
            assert child.stdout is not None
            printed = child.stdout.read().decode(errors="replace")
        seconds = time.monotonic() - started
        try:
            counts = json.loads((scratch / "counts.json").read_text())
        except (OSError, ValueError):
            counts = {"run": 0, "taken": 0}
    reached = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", printed)
    edges, features, kept = reached[-1] if reached else ("0", "0", "0")
    clean = child.returncode == 0 and counts["run"] > 0
    print(
        f"{name:20s} {counts['run']:>9,} inputs, {counts['taken']:>9,} taken, {seconds:7.0f} s, "
        f"{counts['run'] / seconds:7,.0f}/s, {edges} edges, {features} features, {kept} kept, "
        f"{'nothing found' if clean else 'FOUND'}",
        flush=True,
    )
    if not clean:
        print(f"ended with status {child.returncode}; what it said last:", flush=True)
        print("\n".join(_told(printed)[-LINES_SHOWN:]), flush=True)
    return clean


def _told(printed: str) -> list[str]:
    """Return what a process said beside its progress."""
    return [line for line in printed.splitlines() if not re.match(r"#\d+\s|INFO:", line)]


def _fuzz(name: str, options: Any) -> int:
    """Be the process of one target; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        target = load(name)
    scratch: Path = options.child
    corpus, folder = scratch / "corpus", scratch / "folder"
    for place in (corpus, folder, scratch / "seeds"):
        place.mkdir()
    seeds = target.seeds(scratch / "seeds")
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    if target.setup is not None:
        target.setup(folder)
    counts = {"run": 0, "taken": 0}
    last = options.executions

    def say() -> None:
        (scratch / "counts.json").write_text(json.dumps(counts))

    def one(data: bytes) -> None:
        counts["run"] += 1
        counts["taken"] += target.execute(data, folder)
        if counts["run"] == last:
            # libFuzzer's clock for an input that hangs would end the process while Python leaves.
            signal.setitimer(signal.ITIMER_REAL, 0)
        if counts["run"] % 256 == 0 or counts["run"] == last:
            say()

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return target.changed(data, most, seed, atheris.Mutate, seeds)

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESS_SPACE_BYTES,) * 2)
    flags = [
        f"-atheris_runs={last}",
        f"-max_len={target.longest}",
        "-mutate_depth=2",
        "-reduce_inputs=0",
        f"-timeout={SECONDS_AN_INPUT}",
        f"-rss_limit_mb={RSS_MEGABYTES}",
        f"-seed={options.seed}",
        f"-max_total_time={options.seconds}",
        f"-artifact_prefix={options.findings}/{name}-",
    ]
    atheris.Setup(["fuzz", *flags, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
