"""The bench of whole models: engines in turns on a tiny shape, what fails, tables, targets."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from harness import decode_bench
from harness.decode_bench import parse
from harness.decode_contenders import (
    CONTENDERS,
    Contender,
    Facts,
    build,
    decode_path,
    held_bytes,
    kernel_summary,
)
from harness.decode_report import QUALITY, Outcome, Row, page, table
from harness.hardware import Hardware
from harness.measures.bandwidth import Bandwidth
from harness.measures.timing import Burst, Point
from harness.shape_model import ShapeModel
from kernels.bench_targets import WHOLE
from kernels.errors import ConfigError
from methods.base import Engine, KernelUse
from methods.unquantized import Unquantized
from tests.architectures import CONFIGS

HARDWARE = Hardware("cpu", "cpu", "bfloat16", threads=1)
SHAPE = ShapeModel("tiny", CONFIGS["llama"])
NAMES = {contender.name: contender for contender in CONTENDERS["cpu"]}

BLOCKED = ("hydra", "omegaconf", "lm_eval", "datasets", "bitsandbytes", "gguf", "llama_cpp")
WITHOUT = f"""
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Without())
import kernels.bench
import harness.decode_bench
import torch
assert not torch.cuda.is_initialized()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time for the machine's bandwidth, and the threads left as they are."""
    bandwidth = Bandwidth(copy=1e9, read=2e9)
    monkeypatch.setattr(decode_bench, "measure_bandwidth", lambda device, free: bandwidth)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    facts = {"name": "tiny", "dtype": "bfloat16", "config": CONFIGS["llama"]}
    path.write_text(yaml.safe_dump(facts))
    return str(path)


def run(tiny: str, tmp_path: Path, *arguments: str) -> tuple[int, Path]:
    given = ["--device", "cpu", "--model", tiny, "--prompt", "8", "--tokens", "3", "--bursts", "2"]
    code = decode_bench.main([*given, "--output", str(tmp_path / "out"), *arguments])
    (machine,) = (tmp_path / "out").iterdir()
    return code, machine / "tiny"


def test_it_needs_no_more_than_a_machine_with_a_card_has() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, cwd=Path(__file__).parents[2])


def test_a_run_writes_what_it_measured(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, folder = run(tiny, tmp_path, "--engines", "bf16, rtn w4 g128,rtn w2 g64")
    assert code == 0
    facts = json.loads((folder / "results.json").read_text())
    assert [row["engine"] for row in facts["rows"]] == ["bf16", "rtn w4 g128", "rtn w2 g64"]
    assert all(len(row["bursts"]) == 2 for row in facts["rows"])
    assert all(len(b["tokens"]) == 3 for row in facts["rows"] for b in row["bursts"])
    assert (facts["weights"], facts["missing"]) == (QUALITY, {})
    assert "host" not in facts["environment"]
    lines = (folder / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| bf16", "| rtn"))]
    assert len(rows) == 3
    assert all(line.endswith(f"| {QUALITY} |") for line in rows)
    shown = capsys.readouterr().out
    assert "no quality figure" in shown
    assert "| target |" in shown


def test_engines_take_turns_and_no_one_always_comes_first(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    timed = decode_bench.run_burst

    def watched(engine: Engine, *given: Any) -> Burst:
        order.append(engine.kernels()[0].kernel)
        return timed(engine, *given)

    monkeypatch.setattr(decode_bench, "run_burst", watched)
    run(tiny, tmp_path, "--engines", "bf16,rtn w4 g128")
    first, second = order[:2]
    assert order == [first, second, second, first, first, second]


class Broken:
    """An engine that fails when a token is decoded."""

    vocab_size = 320
    runtime = "pytorch"

    def prefill(self, input_ids: Tensor, cache: None = None, last: int | None = None) -> None:
        raise RuntimeError("out of memory\nand more")

    def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("ours", [True, False])
def test_what_fails_is_absent_and_the_others_are_measured(
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ours: bool,
) -> None:
    def making(contender: Contender, *given: Any) -> tuple[Any, Facts]:
        if contender.name == "broken":
            return Broken(), Facts(1, 1, "", "", 0.0, 0.0)
        if contender.name == "refused":
            raise ConfigError("a sentence")
        return build(contender, *given)

    others = (
        Contender("broken", NAMES["bf16"].make, ours=ours),
        Contender("refused", NAMES["bf16"].make, ours=False),
        Contender("elsewhere", NAMES["bf16"].make, packages=("not_there",), ours=False),
    )
    monkeypatch.setattr(decode_bench, "build", making)
    monkeypatch.setitem(decode_bench.CONTENDERS, "cpu", (NAMES["bf16"], *others))
    code, folder = run(tiny, tmp_path)
    facts = json.loads((folder / "results.json").read_text())
    assert [row["engine"] for row in facts["rows"]] == ["bf16"]
    assert facts["missing"] == {
        "broken": "RuntimeError: out of memory",
        "refused": "a sentence",
        "elsewhere": "not_there not installed",
    }
    assert code == int(ours)
    assert ("broken: RuntimeError" in capsys.readouterr().err) == ours


def test_time_that_is_up_is_said(tiny: str, tmp_path: Path) -> None:
    code, folder = run(tiny, tmp_path, "--engines", "bf16,rtn w8", "--minutes", "0")
    facts = json.loads((folder / "results.json").read_text())
    assert [len(row["bursts"]) for row in facts["rows"]] == [1]
    assert (code, facts["missing"]) == (0, {"rtn w8": "the time was up"})


@pytest.mark.parametrize("name", list(NAMES))
def test_every_engine_of_a_processor(name: str) -> None:
    contender = NAMES[name]
    if contender.missing() is not None:
        pytest.skip(str(contender.missing()))
    config = {**CONFIGS["llama"], "hidden_size": 64, "intermediate_size": 128}
    engine, facts = build(contender, ShapeModel("tiny", config), HARDWARE)
    logits, cache = engine.prefill(torch.tensor([[1, 2, 3]]), last=1)
    logits, _ = engine.decode(logits.argmax(-1), cache)
    assert logits.shape == (1, 1, 320)
    assert torch.isfinite(logits).all()
    assert facts.read_bytes > 0
    assert facts.held_bytes > 0
    assert facts.path
    assert "(" in facts.kernels
    engine.close()


def test_bytes_of_an_engine() -> None:
    engine, facts = build(NAMES["bf16"], SHAPE, HARDWARE)
    parameters = sum(p.numel() for p in engine.model.parameters())  # type: ignore[attr-defined]
    embedding = 320 * 32
    assert facts.read_bytes == 2 * (parameters - embedding)
    assert 2 * parameters <= facts.held_bytes < 2 * parameters + 4096
    tied = ShapeModel("tied", CONFIGS["llama_tied"])
    engine, facts = build(NAMES["bf16"], tied, HARDWARE)
    assert facts.read_bytes == 2 * sum(
        p.numel()
        for p in engine.model.parameters()  # type: ignore[attr-defined]
    )
    assert held_bytes(engine) < facts.read_bytes + 4096


def test_provenance_in_one_line() -> None:
    one = KernelUse("a", "Linear", "k", "packed", 10)
    other = KernelUse("b", "Linear", "slow", "dequantized", 30)
    assert kernel_summary([one]) == "k (packed)"
    assert kernel_summary([one, other]) == "75% slow (dequantized); 25% k (packed)"
    engine, _ = build(NAMES["bf16"], SHAPE, HARDWARE)
    assert decode_path(engine)


# Tables


def outcome(rows: Sequence[Row], model: str = "shape", device: str = "cpu") -> Outcome:
    environment = {"machine": "a machine", "threads": 2}
    point, bandwidth = Point(100, 100, 1), Bandwidth(1e3, 2e3)
    return Outcome(model, device, point, 2, bandwidth, rows, {"x": "why"}, environment)


def row(engine: str, *bursts: tuple[float, float]) -> Row:
    facts = Facts(1 << 20, 50, "in a sentence", "k (packed)", 1.0, 2.0)
    return Row(engine, facts, [Burst(first, (token, token)) for first, token in bursts])


def test_ratios_are_of_the_same_round() -> None:
    rows = [row("bf16", (1.0, 0.1), (2.0, 0.4)), row("rtn w4 g128", (0.5, 0.05), (0.5, 0.1))]
    found = outcome(rows)
    assert found.ratios(rows[1], rows[0], "decode") == pytest.approx([2.0, 4.0])
    assert found.faster(rows[1], "prefill") == pytest.approx(3.0)
    assert found.share(rows[1]) == pytest.approx(50 * 15 / 2e3)
    lines = {line.text: line for line in found.targets()}
    assert lines["W4 g128: prefill over bf16"].reached == pytest.approx(3.0)
    assert lines["W4 g128: decode over llama.cpp Q4_0"].reached is None
    assert all(line.reached is None for line in outcome(rows, "other").targets())
    text = page(found)
    assert "| rtn w4 g128 | 1 | 200.0 (200.0) | 15.0 (20.0) | 3.00 | 3.00 | 0 | 38% |" in text
    assert "- x: why" in text
    assert table(found, 2).splitlines()[0] == "| engine | weights held, MiB |"


def test_the_target_of_a_card() -> None:
    rows = [row("fp16", (1.0, 0.01)), row("rtn w4 g128", (1.0, 0.0019))]
    lines = outcome(rows, "shape-llama-7b", "cuda").targets()
    assert [line.met for line in lines] == ["yes", "no"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_targets_name_engines_that_there_are(device: str) -> None:
    names = {contender.name for contender in CONTENDERS[device]}
    for target in WHOLE[device]:
        assert {target.engine, target.over or target.engine} <= names
        assert all(decode_bench.shape(name).name == name for name in target.models)


# Options


def test_options() -> None:
    settings, folder = parse(["--device", "cpu"])
    assert settings.model.config["hidden_size"] == 1536
    assert settings.contenders[0].make("bfloat16") == Unquantized("bfloat16", "bfloat16")
    assert folder.parts[0] == "benchmarks"
    assert folder.name == "decode"
    settings, folder = parse(["--device", "cpu", "--model", "shape-1b", "--threads", "1"])
    assert settings.hardware.usable_threads == 1
    assert folder.name == "shape-1b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nothing"), "--model is nothing"),
        (("--model", __file__), "holds no shape"),
        (("--engines", "bf16,fast"), "--engines has 'fast'"),
        (("--bursts", "0"), "--bursts is 0"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[1] == __file__:
        arguments = (arguments[0], str(Path(__file__).parents[2] / "conf" / "suite" / "bench.yaml"))
    assert decode_bench.main(["--device", "cpu", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "--device cuda needs a CUDA card, and torch sees none\n"


def test_the_7b_shape_of_a_card() -> None:
    shape = decode_bench.shape("shape-llama-7b")
    assert shape.config["num_hidden_layers"] == 32
    missing = {c.name: c.missing() for c in CONTENDERS["cuda"]}
    assert {name for name, why in missing.items() if why} <= {"nf4"}
    assert (importlib.util.find_spec("bitsandbytes") is None) == (missing["nf4"] is not None)
