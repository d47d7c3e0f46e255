"""lm-eval's own command line with its own Hugging Face model, on data of a folder.

`run` starts it as a process of its own; all that differs from a call by hand is where the data sets
come from (this machine may not reach the hub) and that the time spent answering is written down.

`python -m tests.peers.lm_eval_cli FOLDER CACHE TIMES lm_eval's arguments...`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

ANSWERING = ("loglikelihood", "generate_until")
"""What lm-eval asks a model."""


@dataclass(frozen=True)
class PeerRun:
    """What one call left.

    Attributes:
        samples: task -> its logged samples, in document order, one of each filter.
        seconds: of the whole command.
        answering_seconds: spent in the model's `loglikelihood` and `generate_until`.
        processor_seconds: the same of all its threads, which another program's work hardly changes.
    """

    samples: Mapping[str, list[dict[str, Any]]]
    seconds: float
    answering_seconds: float
    processor_seconds: float


class Clock:
    """Adds up the seconds spent in calls, by the clock and of the process's threads."""

    def __init__(self) -> None:
        self.seconds = self.processor_seconds = 0.0

    def timing(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        """Return `answer`, timed."""

        def call(*args: Any, **options: Any) -> Any:
            start, processor = time.perf_counter(), time.process_time()
            try:
                return answer(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start
                self.processor_seconds += time.process_time() - processor

        return call


def run(
    model: Path, data: Path, folder: Path, tasks: str, limit: int | None, *options: str
) -> PeerRun:
    """Evaluate the checkpoint `model` in float32 on the CPU; `folder` takes what is written."""
    results, times = folder / "results", folder / "times.json"
    command = [
        *(sys.executable, "-m", "tests.peers.lm_eval_cli"),
        *(str(data), str(folder / "cache"), str(times)),
        *("run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"),
        *("--device", "cpu", "--tasks", tasks, "--log_samples", "--output_path", str(results)),
        *(() if limit is None else ("--limit", str(limit))),
        *options,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ}
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"lm_eval failed: {done.stderr[-2000:]}")
    samples: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(results.rglob("samples_*.jsonl")):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        samples[task] = sorted(rows, key=lambda row: int(row["doc_id"]))
    return PeerRun(samples, seconds, *json.loads(times.read_text()))


def main(data: str, cache: str, times: str, *arguments: str) -> None:
    """Run lm-eval's command line with `arguments`."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM

    from harness.cache import Cache
    from harness.measures.task_data import data_from

    clock = Clock()
    for name in ANSWERING:
        setattr(HFLM, name, clock.timing(getattr(HFLM, name)))
    sys.argv = ["lm_eval", *arguments]
    with data_from(Path(data), Cache(Path(cache))):
        cli_evaluate()
    Path(times).write_text(json.dumps([clock.seconds, clock.processor_seconds]))


if __name__ == "__main__":
    main(*sys.argv[1:])
