"""What a sweep costs: T(n) for n methods, and the same figures from one process a method.

`python -m tests.peers.sweep_cost --model FOLDER --data FOLDER --out FOLDER` times

- `run.py -m` with suite=cost in a fresh run folder for 4, 8, 16 and 32 methods, from the command to
  the end of its report, quantizing included;
- `run.py -m` on the artefacts of some methods that are there, in turns with, for each of them,
  lm-eval's own command line and `tests.peers.plain_perplexity` in processes of their own.

DATA is a folder with the data sets as the hub names them. Finished timings stay in
OUT/timings.json: the same command goes on where it was ended. `--write FILE` puts the tables into a
Markdown file between its marks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.hardware import Hardware, describe
from harness.record import read_records, write_atomically
from tests.peers.sweep_cost_table import COUNTS, between_marks, tables

ROOT = Path(__file__).resolve().parents[2]

GRIDS = {
    4: ("bits=8,4", "group_size=64"),
    8: ("bits=8,4", "group_size=64,128"),
    16: ("bits=8,4,3,2", "group_size=64,128"),
    32: ("bits=8,4,3,2", "group_size=32,64,128,256"),
}
"""Methods of a sweep -> the axes beside method=rtn,hqq."""

BITS, GROUP_SIZE = 4, 64
"""Of the methods that are compared, where they have a choice."""

HELLASWAG = """\
include: {definition}
task: hellaswag_local
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {rows}
training_split: null
"""
"""lm-eval's own HellaSwag on rows of a local file; only its validation split is read."""

ROWS = {
    "text": Path("wikitext/wikitext-2-raw-v1/test.jsonl.gz"),
    "questions": Path("Rowan/hellaswag/validation.jsonl.gz"),
}


class CostError(Exception):
    """What the user has to put right, as one sentence."""


@dataclass(frozen=True)
class Asked:
    """What is timed; `out` takes everything that is written."""

    model: Path
    data: Path
    out: Path
    methods: tuple[str, ...]
    counts: tuple[int, ...]
    rounds: int
    windows: int
    questions: int
    threads: int
    jobs: int
    batch_sizes: tuple[int, ...]

    def settings(self) -> dict[str, Any]:
        """Return what timings in one file have in common."""
        return {
            "model": self.model.name,
            "methods": list(self.methods),
            "windows": self.windows,
            "questions": self.questions,
            "threads": self.threads,
            "jobs": self.jobs,
            "batch_sizes": list(self.batch_sizes),
        }


def sweep_command(asked: Asked, runs_dir: Path, jobs: int, *axes: str) -> list[str]:
    """Return the command of a sweep with suite=cost into `runs_dir`, `jobs` cells side by side."""
    beside = ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}") if jobs > 1 else ()
    return [
        *(sys.executable, "run.py", "-m"),
        *("model=local", f"model.path={asked.model}"),
        *("data.source=local", f"data.path={asked.data}"),
        *("suite=cost", f"suite.measures.perplexity.windows={asked.windows}"),
        f"suite.measures.divergence.windows={asked.windows}",
        f"suite.measures.tasks.limit={asked.questions}",
        *(f"hardware.threads={max(1, asked.threads // jobs)}", f"runs_dir={runs_dir}"),
        *(*beside, *axes),
    ]


def lm_eval_command(asked: Asked, artefact: Path, batch_size: int, into: Path) -> list[str]:
    """Return lm-eval's own command line for HellaSwag on `artefact`."""
    return [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
        *("--model_args", f"pretrained={artefact},dtype=float32", "--device", "cpu"),
        *("--include_path", str(asked.out / "tasks"), "--tasks", "hellaswag_local"),
        *("--limit", str(asked.questions), "--batch_size", str(batch_size)),
        *("--output_path", str(into)),
    ]


def script_command(asked: Asked, artefact: Path, way: str) -> list[str]:
    """Return the command of the plain script, `way` being --keep or --reference."""
    return [
        *(sys.executable, "-m", "tests.peers.plain_perplexity", str(artefact)),
        str(asked.data / ROWS["text"]),
        *("--windows", str(asked.windows), way, str(asked.out / "reference.bin")),
    ]


class Timings:
    """Finished timings in a file, so that a run that was ended goes on.

    Raises:
        CostError: the file is of a run with other settings.
    """

    def __init__(self, asked: Asked) -> None:
        self.path = asked.out / "timings.json"
        self.threads = asked.threads
        self.data: dict[str, Any] = {"settings": asked.settings(), "steps": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
            if self.data["settings"] != asked.settings():
                raise CostError(
                    f"{self.path} holds timings of {self.data['settings']}, not of "
                    f"{asked.settings()}; take another folder with --out, or delete it"
                )

    def step(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `do` found, done now or before."""
        steps: dict[str, dict[str, Any]] = self.data["steps"]
        if name not in steps:
            load = os.getloadavg()[0]
            print(f"{name} ...", end=" ", flush=True)
            found = do()
            steps[name] = {**found, "load_before": load, "load_after": os.getloadavg()[0]}
            self.write()
            print(f"{found['seconds']:.1f} s", flush=True)
        return steps[name]

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_atomically(self.path, json.dumps(self.data, indent=1).encode())

    def command(self, command: Sequence[str], log: Path) -> tuple[float, str]:
        """Run a command in a process of its own; return wall-clock seconds and its output.

        Raises:
            CostError: it ended with another status than 0.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(self.path.parent / "huggingface"),
        }
        start = time.perf_counter()
        with log.open("w") as errors:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors,
                text=True, check=False,
            )  # fmt: skip
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            last = " ".join(log.read_text().split()[-60:]) or done.stdout[-500:]
            raise CostError(f"a command ended with status {done.returncode}: {last} (see {log})")
        return seconds, done.stdout


def sweep(
    asked: Asked,
    timings: Timings,
    name: str,
    jobs: int,
    axes: Sequence[str],
    ready: Path | None,
) -> dict[str, Any]:
    """Time one sweep in a fresh folder `name`, into which the artefacts of `ready` are put before.

    What its records say stands beside the seconds.

    Raises:
        CostError: a cell is not `ok`.
    """
    folder = fresh(asked.out / name)
    if ready is not None:
        shutil.copytree(ready, folder / "cache" / "artefacts")
    command = sweep_command(asked, folder, jobs, *axes)
    seconds, _ = timings.command(command, asked.out / "logs" / f"{name}.log")
    records, _ = read_records(folder)
    wrong = [record.cell for record in records if record.status != "ok"]
    if wrong:
        raise CostError(f"{', '.join(wrong)} did not become ok; see {folder}")
    figures: dict[str, dict[str, float]] = {}
    for record in records:
        values = {value.metric: value.value for value in record.values}
        wanted = ("perplexity", "kl_mean", "acc", "acc_norm", "quantize_seconds")
        figures[record.cell] = {
            "measuring": record.seconds, **{key: values[key] for key in wanted if key in values}
        }  # fmt: skip
    named = {record.config["method"]: figures[record.cell] for record in records}
    return {"seconds": seconds, "cells": len(records), "figures": figures, "by_method": named}


def fresh(folder: Path) -> Path:
    """Return `folder` without what an ended attempt left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def make_artefacts(asked: Asked, timings: Timings) -> dict[str, Any]:
    """Make the artefacts that are compared, with as little measuring as there can be."""
    folder = fresh(asked.out / "made")
    little = (
        *("suite.measures.perplexity.windows=1", "suite.measures.divergence.windows=1"),
        "suite.measures.tasks.limit=1",
    )
    seconds, _ = timings.command(
        [*sweep_command(asked, folder, 1, *compared(asked)), *little],
        asked.out / "logs" / "made.log",
    )
    artefacts = {
        record.config["method"]: str((folder / record.cell / "artefact").resolve())
        for record in read_records(folder)[0]
    }
    missing = set(asked.methods) - set(artefacts)
    if missing:
        raise CostError(f"no artefact was made of {', '.join(sorted(missing))}; see {folder}")
    return {"seconds": seconds, "artefacts": artefacts}


def compared(asked: Asked) -> tuple[str, ...]:
    """Return the axes of the methods that are compared."""
    return f"method={','.join(asked.methods)}", f"bits={BITS}", f"group_size={GROUP_SIZE}"


def measured_by_lm_eval(
    asked: Asked, timings: Timings, name: str, artefact: Path, batch_size: int
) -> dict[str, Any]:
    """Time lm-eval's command line on one artefact."""
    into = fresh(asked.out / name)
    command = lm_eval_command(asked, artefact, batch_size, into)
    seconds, _ = timings.command(command, asked.out / "logs" / f"{name}.log")
    results = json.loads(next(into.rglob("results_*.json")).read_text())["results"]
    scores = results["hellaswag_local"]
    return {"seconds": seconds, "acc": scores["acc,none"], "acc_norm": scores["acc_norm,none"]}


def measured_by_script(
    asked: Asked, timings: Timings, name: str, artefact: Path, way: str
) -> dict[str, Any]:
    """Time the plain script on one artefact."""
    command = script_command(asked, artefact, way)
    seconds, said = timings.command(command, asked.out / "logs" / f"{name}.log")
    return {"seconds": seconds, **json.loads(said.splitlines()[-1])}


def write_task(asked: Asked) -> None:
    """Write the definition that lets lm-eval's command line read HellaSwag from a file."""
    found = find_spec("lm_eval")
    assert found is not None
    assert found.origin is not None
    folder = asked.out / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    definition = Path(found.origin).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    rows = asked.data / ROWS["questions"]
    (folder / "hellaswag_local.yaml").write_text(HELLASWAG.format(definition=definition, rows=rows))


def measure(asked: Asked, timings: Timings) -> None:
    """Do all that is not done yet; sweeps and the other side take turns."""
    write_task(asked)
    timings.data["machine"] = machine(asked.threads)
    made = timings.step("made", partial(make_artefacts, asked, timings))
    artefacts = {method: Path(path) for method, path in made["artefacts"].items()}
    first, ready = artefacts[asked.methods[0]], asked.out / "made" / "cache" / "artefacts"

    def timed(do: Callable[..., dict[str, Any]], name: str, *how: Any) -> dict[str, Any]:
        return timings.step(name, partial(do, asked, timings, name, *how))

    timed(measured_by_script, "reference", first, "--keep")
    tried = {
        size: float(timed(measured_by_lm_eval, f"batch-{size}", first, size)["seconds"])
        for size in asked.batch_sizes
    }
    best = min(tried, key=lambda size: tried[size])
    for turn in range(max(asked.rounds, len(asked.counts))):
        for count in asked.counts[turn : turn + 1]:
            timed(sweep, f"sweep-{count}", asked.jobs, ("method=rtn,hqq", *GRIDS[count]), None)
        if turn >= asked.rounds:
            continue
        for jobs in dict.fromkeys((1, asked.jobs)):
            timed(sweep, f"ours-{jobs}-{turn}", jobs, compared(asked), ready)
        for method, artefact in artefacts.items():
            timed(measured_by_lm_eval, f"lm_eval-{method}-{turn}", artefact, best)
            timed(measured_by_script, f"script-{method}-{turn}", artefact, "--reference")


def machine(threads: int) -> dict[str, Any]:
    """Return what the tables say of the machine and the libraries."""
    facts = describe(Hardware(name="cpu", device="cpu", compute_dtype="float32", threads=threads))
    libraries = ("torch", "transformers", "lm_eval")
    return {
        "processor": facts["cpu"],
        "python": facts["python"],
        "versions": {name: metadata.version(name) for name in libraries},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.sweep_cost")
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint's folder")
    parser.add_argument("--data", type=Path, required=True, help="data sets as the hub names them")
    parser.add_argument("--out", type=Path, required=True, help="takes everything that is written")
    parser.add_argument(
        "--methods", default="fp32,nf4,gptq,w8a8", help="compared; the first is fp32"
    )
    parser.add_argument(
        "--counts", default="4,8,16,32", help="methods of the sweeps that are timed"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of the comparison")
    parser.add_argument("--windows", type=int, default=16, help="of text, the model's context each")
    parser.add_argument("--questions", type=int, default=500, help="of HellaSwag")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side")
    parser.add_argument("--batch-sizes", default="8,32,64", help="lm-eval's; the fastest is used")
    parser.add_argument("--write", type=Path, help="Markdown file whose tables are replaced")
    given = parser.parse_args(arguments)
    try:
        asked = checked(given)
        asked.out.mkdir(parents=True, exist_ok=True)
        timings = Timings(asked)
        measure(asked, timings)
        written = tables(timings.data)
        print(f"\n{written}")
        if given.write:
            page = between_marks(given.write.read_text(), written)
            write_atomically(given.write, page.encode())
    except (CostError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def checked(given: argparse.Namespace) -> Asked:
    """Return what was asked for; raises CostError where it cannot be done."""
    for folder, part in (
        (given.model, Path("config.json")),
        *((given.data, p) for p in ROWS.values()),
    ):
        if not (folder / part).is_file():
            raise CostError(f"there is no {folder / part}; --model and --data name the folders")
    for option in ("rounds", "windows", "questions", "threads", "jobs"):
        if getattr(given, option) < 1:
            raise CostError(f"--{option} is {getattr(given, option)}; it must be 1 or more")
    counts = tuple(int(one) for one in given.counts.split(",") if one)
    strange = [count for count in counts if count not in COUNTS]
    if strange:
        raise CostError(f"--counts has {strange[0]}; it may have {', '.join(map(str, COUNTS))}")
    methods = tuple(given.methods.split(","))
    if methods[0] != "fp32":
        raise CostError(
            f"--methods begins with {methods[0]}; it must begin with fp32, the reference"
        )
    return Asked(
        given.model.absolute(), given.data.absolute(), given.out.absolute(), methods, counts,
        given.rounds, given.windows, given.questions, given.threads, given.jobs,
        tuple(int(one) for one in given.batch_sizes.split(",")),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
