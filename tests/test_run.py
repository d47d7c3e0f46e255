"""The command line as a user types it: real processes, the embedded model, real files."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.artefacts import verify
from harness.record import FILE_NAME, Record, read_records

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "harness" / "embedded" / "model"
GRID = ["-m", "method=fp32,rtn", "bits=4,2", "group_size=32,-1", "suite=smoke"]
# Columns that the first users were promised.
COLUMNS = [
    "cell",
    "model",
    "method",
    "bits",
    "group_size",
    "hardware",
    "status",
    "execution",
    "quantize_seconds",
    "quantize_peak_bytes",
    "load_seconds",
    "artefact_bytes",
    "bits_per_weight",
    "peak_memory_bytes",
    "kl_mean",
    "top1_agreement",
    "prefill_tokens_per_second",
    "ttft_seconds",
    "decode_tokens_per_second",
    "tpot_seconds",
]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *arguments]


def quantbench(*arguments: str, env: dict[str, str] | None = None) -> Done:
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **(env or {})},
    )
    return Done(done.returncode, done.stdout, done.stderr)


def records(runs: Path) -> dict[str, Record]:
    found, problems = read_records(runs)
    assert problems == []
    return {record.cell: record for record in found}


def times(runs: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in runs.glob(f"*/{FILE_NAME}")}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    runs = tmp_path_factory.mktemp("swept") / "runs"
    return runs, quantbench(*GRID, f"runs_dir={runs}")


def test_a_grid_runs_each_cell_once_and_says_so(swept: tuple[Path, Done]) -> None:
    runs, done = swept
    assert done.code == 0, done.err
    assert "5 cells, 0 of them there already" in done.out
    names = {
        (r.config["method"], r.config["bits"], r.config["group_size"])
        for r in records(runs).values()
    }
    assert names == {("fp32", 32, None)} | {("rtn", b, g) for b in (4, 2) for g in (32, -1)}
    assert {r.status for r in records(runs).values()} == {"ok"}
    assert f"report: {runs / 'report' / 'report.html'}" in done.out


def test_the_baseline_runs_first(swept: tuple[Path, Done]) -> None:
    runs, _ = swept
    first = min(records(runs).values(), key=lambda record: record.started)
    assert first.config["method"] == "fp32"


def test_fewer_bits_and_larger_groups_diverge_more(swept: tuple[Path, Done]) -> None:
    runs, _ = swept
    kl = {
        (r.config["bits"], r.config["group_size"]): v.value
        for r in records(runs).values()
        for v in r.values
        if v.metric == "kl_mean"
    }
    assert kl[4, 32] < kl[4, -1] < kl[2, 32] < kl[2, -1]
    assert kl[32, None] < 1e-9


def test_the_tables_have_what_was_promised(swept: tuple[Path, Done]) -> None:
    runs, _ = swept
    with (runs / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert [c for c in rows[0] if c in COLUMNS] == COLUMNS
    assert any(c.startswith("perplexity_embedded_gptq_") for c in rows[0])
    for name in ("report.html", "report.md", "results.parquet", "values.parquet"):
        assert (runs / "report" / name).stat().st_size > 0


def test_a_repeated_command_runs_nothing(swept: tuple[Path, Done]) -> None:
    runs, _ = swept
    before = times(runs)
    done = quantbench(*GRID, f"runs_dir={runs}")
    assert done.code == 0, done.err
    assert "5 cells, 5 of them there already" in done.out
    assert times(runs) == before


def test_the_command_of_a_row_runs_that_cell(swept: tuple[Path, Done]) -> None:
    runs, _ = swept
    record = next(r for r in records(runs).values() if r.config["group_size"] == -1)
    assert record.config["command"].startswith("python run.py ")
    before = times(runs)
    done = quantbench(*record.config["command"].split()[2:], "force=true")
    assert done.code == 0, done.err
    changed = {cell for cell, stamp in times(runs).items() if before.get(cell) != stamp}
    assert changed == {record.cell}


def wait_for(seen: Callable[[], object], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline, f"no {what} in {seconds:g} s"
        time.sleep(0.005)


def holds_a_cell(runs: Path, pid: int) -> bool:
    texts = [path.read_text() for path in runs.glob("*/claim.*")]
    return any(f"-{pid}-" in text for text in texts)


def test_sweeps_on_one_folder_share_the_work_and_take_over_from_the_dead(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    grid = ["-m", "method=fp32,rtn", "group_size=32", "suite=smoke", f"runs_dir={runs}"]
    bits = {"dead": "4", "keeps": "4,2", "drops": "4,3"}
    logs = {name: tmp_path / f"{name}.log" for name in bits}
    drivers = {}

    def start(name: str, *more: str) -> None:
        with logs[name].open("w") as log:
            drivers[name] = subprocess.Popen(
                command(*grid, f"bits={bits[name]}", *more), stdout=log, stderr=subprocess.STDOUT
            )

    def baseline_line(name: str, word: str) -> bool:
        return any("fp32" in line and word in line for line in logs[name].read_text().splitlines())

    try:
        # One stands still with the baseline's cell in its hands; the others leave that for later.
        start("dead")
        wait_for(lambda: holds_a_cell(runs, drivers["dead"].pid), "claim of a cell")
        drivers["dead"].send_signal(signal.SIGSTOP)
        start("keeps")
        start("drops", "keep_artefacts=false")
        for name in ("keeps", "drops"):
            wait_for(lambda: baseline_line(name, ": elsewhere"), "deferred cell")  # noqa: B023
        assert not any(baseline_line(name, ": ok") for name in bits)
        # Once it is dead, its cell is taken over at once, not after a minute without heartbeats.
        drivers["dead"].kill()
        for name in ("keeps", "drops"):
            assert drivers[name].wait(timeout=600) == 0, logs[name].read_text()
    finally:
        for driver in drivers.values():
            driver.kill()
            driver.wait()
    lines = {name: log.read_text().splitlines() for name, log in logs.items()}
    done = {name: [line for line in lines[name] if ": ok (" in line] for name in lines}
    assert done["dead"] == []
    assert len(done["keeps"]) + len(done["drops"]) == 4, lines
    for name in ("keeps", "drops"):
        # Nobody waits for another's cell while there is other work.
        waited = [n for n, line in enumerate(lines[name]) if "runs this cell" in line]
        later = [n for n, line in enumerate(lines[name]) if line.startswith("waiting for what")]
        assert all(later and n > later[0] for n in waited), lines[name]
    # An artefact is made by loading the model once; a line may be missed, none is said twice.
    made = [line for each in lines.values() for line in each if "loading the model" in line]
    assert len(made) <= 4 + 1, made  # what the dead one had begun is begun again
    found = records(runs)
    assert sorted((r.config["method"], r.config["bits"], r.status) for r in found.values()) == [
        ("fp32", 32, "ok"), ("rtn", 2, "ok"), ("rtn", 3, "ok"), ("rtn", 4, "ok"),
    ]  # fmt: skip
    for record in found.values():
        artefact = runs / record.cell / "artefact"
        bits_done = f"rtn {record.config['bits']} bits"
        if record.config["method"] == "rtn" and any(bits_done in line for line in done["drops"]):
            assert not artefact.exists()
        else:
            verify(artefact)
    for entry in (runs / "cache").rglob("*.safetensors"):
        if "artefacts" not in entry.parts:
            content = entry.read_bytes()
            assert hashlib.sha256(content[32:]).digest() == content[:32]
    with (runs / "report" / "results.csv").open() as file:
        assert {row["cell"] for row in csv.DictReader(file)} == set(found)
    assert not list(runs.rglob("*.tmp")), "temporary files are left"


def test_one_cell_stands_beside_the_baseline(tmp_path: Path) -> None:
    done = quantbench("suite=smoke", f"runs_dir={tmp_path / 'runs'}")
    assert done.code == 0, done.err
    found = records(tmp_path / "runs").values()
    assert {r.config["method"] for r in found} == {"fp32", "rtn"}
    assert "fp32" in done.out
    assert "rtn" in done.out


def test_sizes_of_a_model_that_is_not_here(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = quantbench(
        "-m", "model=llama-7b", "suite=size_only", "method=fp16,rtn", "bits=4", "group_size=128",
        f"runs_dir={runs}", env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.code == 0, done.err
    sizes = {
        r.config["method"]: v.value
        for r in records(runs).values()
        for v in r.values
        if v.metric == "computed_bytes"
    }
    assert sizes["fp16"] == 6738415616 * 2
    assert 3.6e9 < sizes["rtn"] < 3.9e9


def test_help_names_groups_axes_and_examples() -> None:
    done = quantbench("--help")
    assert done.code == 0
    for word in ("method:", "model:", "suite:", "bits=4", "group_size=-1", "python run.py -m"):
        assert word in done.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["method.symetric=true"], "symetric"),
        (["method=nope"], "Could not find 'method/nope'"),
        (["bits=5"], "bits"),
        (["group_size=0"], "group_size"),
        (["-m", "method=rtn", "bits=4,5"], "bits"),
        (["hardware=cuda"], "CUDA"),
        (["model=local"], "model.path has no value; give one: model.path=VALUE"),
        (["model=local", "model.path=/no/such/folder"], "/no/such/folder"),
        (["data.source=local", "data.path=/no/such/folder"], "/no/such/folder"),
        (["data.source=local"], "data.path"),
        (["data.source=lokal"], "data.source is 'lokal'; it must be one of embedded, local"),
        (["repeat=seeds"], "repeat is 'seeds'; it must be one of seed, calibration, none"),
        (["baseline=bf16"], "it is chosen among the methods: method@baseline=bf16"),
        (["model=gpt2"], "model=local model.path="),
        (["hardware.threads=0"], "hardware.threads is 0"),
    ],
)
def test_a_command_that_cannot_run_is_refused_in_one_sentence(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = quantbench(*arguments, "suite=smoke", f"runs_dir={tmp_path / 'runs'}", env=offline)
    assert done.code not in (0, None)
    assert sentence in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "runs").glob(f"*/{FILE_NAME}"))


def unwrapped(text: str) -> str:
    """Without white space: the table breaks long lines, also inside a path."""
    return "".join(text.split())


def broken_models(folder: Path) -> dict[str, str]:
    """Make models that are each broken in one way; returns what the failure has to say."""
    from safetensors.torch import load_file, save_file

    def copy(name: str) -> Path:
        shutil.copytree(EMBEDDED, folder / name)
        return folder / name

    truncated = copy("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    nan = copy("nan") / "model.safetensors"
    tensors = load_file(nan)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, nan, {"format": "pt"})
    config = copy("vocabulary") / "config.json"
    facts = json.loads(config.read_text())
    weights = folder / "vocabulary" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].clone()
    save_file(tensors, weights, {"format": "pt"})
    config.write_text(json.dumps({**facts, "vocab_size": 300}))
    return {
        "truncated": "model.safetensors",
        "nan": "model.layers.1.mlp.up_proj.weight",
        "vocabulary": "tokenizer",
    }


def test_broken_models_fail_their_cells_only(tmp_path: Path) -> None:
    wanted = broken_models(tmp_path)
    shutil.copytree(EMBEDDED, tmp_path / "sound")
    paths = ",".join(str(tmp_path / name) for name in ["sound", *wanted])
    done = quantbench(
        "-m", "model=local", f"model.path={paths}", "method=rtn", "bits=4", "group_size=128",
        "suite=smoke", f"runs_dir={tmp_path / 'runs'}",
    )  # fmt: skip
    assert done.code == 1, done.err
    found = records(tmp_path / "runs").values()
    by_path = {Path(r.config["resolved"]["model"]["path"]).name: r for r in found}
    assert by_path["sound"].status == "ok"
    for name, word in wanted.items():
        (failure,) = by_path[name].errors
        assert by_path[name].status == "failed"
        assert word in failure.message
        assert "\n" not in failure.message
        assert unwrapped(failure.message) in unwrapped(done.out), "the table gives the reason"


def test_a_text_shorter_than_a_window_is_said(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short to read.")
    done = quantbench(
        "data.source=text", f"data.path={tmp_path / 'short.txt'}", "suite=smoke",
        f"runs_dir={tmp_path / 'runs'}",
    )  # fmt: skip
    assert done.code == 1
    assert unwrapped("less than one window") in unwrapped(done.out)
