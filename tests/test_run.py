"""The command line as a user types it: real processes, the embedded model, real files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

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


def test_damaged_records_artefacts_and_caches_are_made_again(swept: tuple[Path, Done]) -> None:
    runs, _ = swept
    victim = next(r for r in records(runs).values() if r.config["group_size"] == 32)
    wanted = {v.metric: v.value for v in victim.values if v.measure == "divergence"}
    (runs / victim.cell / FILE_NAME).write_text("{")
    weights = runs / victim.cell / "artefact" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for entry in (runs / "cache").rglob("*.safetensors"):
        if "artefacts" not in entry.parts:
            entry.write_bytes(entry.read_bytes()[:-1])
    done = quantbench(*GRID, f"runs_dir={runs}")
    assert done.code == 0, done.err
    again = records(runs)[victim.cell]
    assert {v.metric: v.value for v in again.values if v.measure == "divergence"} == wanted


def wait_for_record(runs: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(r.status == "ok" for r in read_records(runs)[0]):
            return
        time.sleep(0.05)
    raise AssertionError("no cell was finished in time")


def orphans(runs: Path) -> list[psutil.Process]:
    """Processes that still have a file of the sweep open (children log into their cell)."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(runs) in file.path for file in process.open_files()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_sweep_loses_nothing(tmp_path: Path, how: signal.Signals) -> None:
    runs = tmp_path / "runs"
    arguments = [*GRID, "bits=4", f"runs_dir={runs}"]
    driver = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_record(runs)
    driver.send_signal(how)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode not in (0, None)
    if how == signal.SIGINT:
        assert "finished cells are kept" in err
    deadline = time.monotonic() + 10
    while orphans(runs) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert orphans(runs) == []
    finished = {c: t for c, t in times(runs).items() if records(runs)[c].status == "ok"}
    assert finished
    done = quantbench(*arguments)
    assert done.code == 0, done.err
    assert len(records(runs)) == 3
    assert finished.items() <= times(runs).items()
    assert not list(runs.rglob("*.tmp")), "temporary files are left"


def test_two_sweeps_on_one_folder_share_the_work(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    arguments = [*GRID, "bits=4", f"runs_dir={runs}"]
    drivers = [
        subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [driver.communicate(timeout=600)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    finished = [line for out in outputs for line in out.splitlines() if ": ok (" in line]
    assert len(finished) == 3, outputs
    assert len(records(runs)) == 3


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


def test_a_full_disk_is_said_and_finished_cells_are_kept(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        runs = disk / "runs"
        first = quantbench("-m", "method=fp32", "suite=smoke", f"runs_dir={runs}")
        assert first.code == 0, first.err
        kept = times(runs)
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(max(0, free - 2_000_000)))
        done = quantbench(
            "-m", "method=bf16,rtn", "bits=8", "group_size=128", "suite=smoke", f"runs_dir={runs}"
        )
        assert done.code != 0
        assert "No space left on device" in done.out + done.err
        assert "Traceback" not in done.err
        assert kept.items() <= times(runs).items()
        assert not list(runs.glob("cache/artefacts/.*.tmp")), "a half-written artefact is left"
        (disk / "filler").unlink()
        again = quantbench(
            "-m", "method=bf16,rtn", "bits=8", "group_size=128", "suite=smoke", f"runs_dir={runs}"
        )
        assert again.code == 0, again.err
    finally:
        subprocess.run(["umount", str(disk)], check=True)
