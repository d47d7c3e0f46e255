"""Runs one listing in a process of its own: scratch folder, no network, limits of time and memory.

Where a process cannot be kept from the network (unprivileged namespaces are needed), nothing runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.listing_data import PROBES
from kernels.errors import ConfigError

CHILD = Path(__file__).with_name("listing_child.py")
PROJECT = Path(__file__).parents[1]
NAME = "listing.py"
MEMORY_BYTES = 6 * 2**30
OFFLINE = ("unshare", "--user", "--map-root-user", "--net", "--")
PACKAGES = (
    *("torch", "transformers", "accelerate", "bitsandbytes", "hqq", "torchao", "gptqmodel"),
    *("llama_cpp_python", "eetq", "auto_gptq", "autoawq"),
)
QUOTE_CHARACTERS, MESSAGE_CHARACTERS = 70, 300
ABSOLUTE = re.compile(r"(?<![\w:/.<>])(?:/[\w.+@~-]+){2,}/?")


@dataclass(frozen=True)
class Job:
    """What one process runs: a text (empty: a probe alone), a probe, and files by their place."""

    text: str
    probe: str | None = None
    beside: Mapping[str, Path] | None = None


def check_offline() -> None:
    """Raise ConfigError where this machine cannot take the network from a process."""
    try:
        subprocess.run([*OFFLINE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(
            "listings run without network, and `unshare --user --net` does not work here: it "
            "takes Linux with util-linux that allows user namespaces"
        ) from None


def run_job(job: Job, python: Path, seconds: float) -> dict[str, Any]:
    """Return how `job` ended under the interpreter `python`, with the versions it found."""
    python = python.absolute()  # not resolved: a link to it is what makes it an environment's
    with TemporaryDirectory(prefix="listing-") as name:
        folder = Path(name).resolve()
        scratch = folder / "scratch"
        scratch.mkdir()
        for place, source in (job.beside or {}).items():
            (scratch / place).parent.mkdir(parents=True, exist_ok=True)
            (scratch / place).symlink_to(source)
        if job.text:
            (scratch / NAME).write_text(job.text, encoding="utf-8")
        outcome, order = folder / "outcome.json", folder / "job.json"
        told = {
            "listing": NAME if job.text else "",
            "probe": str(PROBES / f"{job.probe}.py") if job.probe else "",
            "packages": PACKAGES,
            "memory_bytes": MEMORY_BYTES,
            "outcome": str(outcome),
        }
        order.write_text(json.dumps(told), encoding="utf-8")
        ended = _child([str(python), str(CHILD), str(order)], scratch, python, seconds)
        if not outcome.is_file():
            return ended
        return _clean(json.loads(outcome.read_text(encoding="utf-8")), job.text, folder, python)


def _child(command: list[str], scratch: Path, python: Path, seconds: float) -> dict[str, Any]:
    kept = ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {
        "HOME": str(scratch.parent),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if python.absolute() == Path(sys.executable).absolute():
        environment["PYTHONPATH"] = str(PROJECT)  # probes and stand-ins use this project
    process = subprocess.Popen(
        [*OFFLINE, *command],
        cwd=scratch,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"exit": None, "message": f"ended after {seconds:g} s"}
    return {"exit": process.returncode, "message": "the process ended without a word"}


def _clean(outcome: dict[str, Any], text: str, folder: Path, python: Path) -> dict[str, Any]:
    """Return what the child said without places of this machine, with the line at fault quoted."""
    line, offset = outcome.pop("line", None), outcome.pop("offset", None)
    if "message" in outcome:
        outcome["message"] = without_places(outcome["message"], folder, python)
    if line is not None:
        outcome["line"] = line
        outcome["quote"] = _quoted(text.split("\n")[line - 1], offset or 1)
    if "found" in outcome:
        outcome["found"] = {
            name: _rounded(
                without_places(value, folder, python) if isinstance(value, str) else value
            )
            for name, value in outcome["found"].items()
        }
    return outcome


def _quoted(line: str, offset: int) -> str:
    """Return `line`, of a long one what stands around its character number `offset`."""
    if len(line.strip()) <= QUOTE_CHARACTERS:
        return line.strip()
    start = max(0, min(offset - 1 - QUOTE_CHARACTERS // 2, len(line) - QUOTE_CHARACTERS))
    end = start + QUOTE_CHARACTERS
    return f"{'...' * (start > 0)}{line[start:end].strip()}{'...' * (end < len(line))}"


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def without_places(message: str, folder: Path, python: Path) -> str:
    """Return `message` on one line, shortened, without absolute paths of this machine."""
    prefix = python.absolute().parents[1]
    for place, word in ((prefix, "<python>"), (folder / "scratch", "."), (folder, "~")):
        message = message.replace(str(place), word)
    message = ABSOLUTE.sub("<path>", message)
    message = " ".join(message.split())
    if len(message) > MESSAGE_CHARACTERS:
        message = f"{message[:MESSAGE_CHARACTERS].rstrip()} ..."
    return message


def make_surroundings(folder: Path) -> None:
    """Let a child make what listings expect beside them.

    Raises:
        ConfigError: it failed; the sentence holds its last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", "harness.listing_surroundings", str(folder)],
        cwd=PROJECT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(f"what listings need beside them could not be made: {last}")
