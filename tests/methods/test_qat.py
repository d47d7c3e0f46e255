"""Quantization-aware training on whole models: the artefact is the trained model, or it is said."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kernels.errors import ConfigError
from methods import training
from methods.affine import Quantized
from methods.artefact import LAYERS, WEIGHTS
from methods.base import Calibration, Matrix, Method, QuantizeReport, TrainingMethod
from methods.qat import QAT
from methods.quantization_aware import EqualityError
from methods.rtn import RTN
from methods.straight_through import RoundedModel
from methods.training import STATE, Schedule, next_token_loss
from tests.architectures import tiny, tiny_ids
from tests.methods.machine import Machine

CROPS = tiny_ids(samples=8, length=16)
SCHEDULE = Schedule(4, 2, 1e-2, 1, 0.0, 1.0)

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


def qat(bits: int = 3, group_size: int = 16, **options: Any) -> QAT:
    values: dict[str, Any] = {"training": SCHEDULE, "calibration": Calibration(8, 16, 0)}
    return QAT("qat", bits, group_size, **{**values, **options})


def half(kind: str) -> Any:
    """Return the tiny model as a checkpoint in float16 gives it."""
    model = tiny(kind).half().float()
    model.config.dtype = torch.float16
    return model


def trained(method: QAT, kind: str, into: Path) -> QuantizeReport:
    return method.quantize(half(kind), None, CROPS, into)


def test_it_is_a_method_that_trains() -> None:
    method = qat()
    held: Method = method
    assert (held.name, held.bits, held.group_size) == ("qat", 3, 16)
    assert isinstance(held, TrainingMethod)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_the_artefact_is_the_trained_model(
    bits: int, symmetric: bool, activation_bits: int | None, tmp_path: Path
) -> None:
    method = qat(bits, symmetric=symmetric, activation_bits=activation_bits)
    report = trained(method, "llama", tmp_path)
    found = report.details["training"]
    assert found["equality"]["difference"] <= found["equality"]["tolerance"]
    if activation_bits is None:
        assert found["equality"]["difference"] <= 1e-5
    assert (found["kind"], found["engine"], found["steps"]) == ("qat", "quantbench", 4)
    assert found["tokens_seen"] == 4 * 2 * 16
    assert any("it has learned that text too" in note for note in report.notes)
    engine = method.load(tmp_path, Machine())
    assert engine.prefill(CROPS[:2])[0].isfinite().all()


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "mixtral", "opt"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    report = trained(qat(), kind, tmp_path)
    assert report.details["training"]["equality"]["difference"] <= 1e-5
    before = dict(half(kind).named_parameters())
    stored = load_file(tmp_path / WEIGHTS)
    kept = [name for name in stored if name in before]
    assert kept
    # The rest is trained too, and stored in the type of the checkpoint.
    assert all(stored[name].dtype == torch.float16 for name in kept)
    assert any(not torch.equal(stored[name].float(), before[name]) for name in kept)
    assert ("lm_head.weight" in stored) == (kind == "mixtral")


def test_rows_that_are_padded(tmp_path: Path) -> None:
    report = trained(qat(group_size=24, on_indivisible="pad"), "llama", tmp_path)
    assert report.details["training"]["equality"]["difference"] <= 1e-5
    with pytest.raises(ConfigError, match="not a multiple of group_size 24"):
        trained(qat(group_size=24), "llama", tmp_path)


def loss_of(method: QAT, artefact: Path) -> float:
    logits, _ = method.load_dequantized(artefact, Machine()).prefill(CROPS)
    return float(next_token_loss(logits, CROPS))


def test_it_lowers_the_loss_of_the_rounded_model(tmp_path: Path) -> None:
    longer = dataclasses.replace(SCHEDULE, steps=12, batch=8)
    method = qat(2, training=longer)
    trained(method, "llama", tmp_path / "trained")
    RTN("rtn", 2, 16).quantize(half("llama"), None, None, tmp_path / "rounded")
    assert loss_of(method, tmp_path / "trained") < loss_of(method, tmp_path / "rounded") - 0.2


def test_training_without_rounding_is_told_apart(tmp_path: Path) -> None:
    report = trained(qat(fake_quantize=False), "llama", tmp_path)
    assert report.details["training"]["equality"] is None
    assert any("trained without rounding" in note for note in report.notes)


def test_distilling_draws_the_answers_to_those_of_the_unquantized_model(tmp_path: Path) -> None:
    plan = dataclasses.replace(SCHEDULE, steps=12, batch=8)
    expected = half("llama")(input_ids=CROPS, use_cache=False).logits.detach()

    def divergence(distill: float) -> float:
        method = qat(3, training=plan, distill=distill)
        folder = tmp_path / str(distill)
        trained(method, "llama", folder)
        logits, _ = method.load_dequantized(folder, Machine()).prefill(CROPS)
        return float(training.divergence_loss(logits, expected))

    assert divergence(10.0) < 0.8 * divergence(0.0)


def test_bfloat16_products_end_in_the_same_format(tmp_path: Path) -> None:
    report = trained(qat(precision="bfloat16"), "llama", tmp_path)
    assert report.details["training"]["equality"]["difference"] <= 1e-5


class EndedError(Exception):
    """Stands for whatever ends a process; `test_training` kills a real one."""


def test_a_training_that_was_ended_ends_in_the_same_artefact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> QuantizeReport:
        state = tmp_path / f"{name}_state"
        state.mkdir(exist_ok=True)
        model = half("llama_tied")
        return qat().train(model, None, CROPS, tmp_path / name, state, lambda text: None)

    run("whole")
    monkeypatch.setattr(training, "KEEP_SECONDS", 0.0)
    keep = training._keep

    def keep_two(path: Path, *arguments: Any) -> None:
        keep(path, *arguments)
        if arguments[-1].step == 2:
            raise EndedError

    monkeypatch.setattr(training, "_keep", keep_two)
    with pytest.raises(EndedError):
        run("ended")
    assert (tmp_path / "ended_state" / STATE).exists()
    assert not (tmp_path / "ended" / LAYERS).exists()
    monkeypatch.undo()
    assert run("ended").details["training"]["resumed_at"] == [2]
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("whole", "ended")]
    assert files[0] == files[1]


def test_an_artefact_that_is_another_model_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = RoundedModel.stored

    def one_off(self: RoundedModel, matrix: Matrix) -> Quantized:
        found = stored(self, matrix)
        return dataclasses.replace(found, codes=(found.codes.int() + 1).clamp(max=15).byte())

    monkeypatch.setattr(RoundedModel, "stored", one_off)
    with pytest.raises(EqualityError, match="the artefact of qat is not the model that was"):
        trained(qat(4), "llama", tmp_path)


@needs_torchao
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 16), (4, 32), (3, 16), (2, -1)])
@pytest.mark.parametrize("kind", ["llama_tied", "gpt2"])
def test_torchao_rounds_and_this_project_stores(
    kind: str, bits: int, group_size: int, scale_dtype: str, tmp_path: Path
) -> None:
    method = qat(bits, group_size, symmetric=True, engine="torchao", scale_dtype=scale_dtype)
    report = trained(method, kind, tmp_path)
    found = report.details["training"]
    assert found["engine"] == "torchao"
    assert found["equality"]["difference"] <= 1e-5
    assert {m.name for m in report.quantized} == {m.name for m in method.select(tiny(kind))[0]}


@needs_torchao
@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("mixtral", {}, "is a stack of experts, which torchao does not round"),
        ("llama", {"group_size": 24, "on_indivisible": "pad"}, "torchao rounds whole groups"),
    ],
)
def test_models_that_torchao_does_not_fit(
    kind: str, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    method = qat(**{"symmetric": True, "engine": "torchao", **options})
    with pytest.raises(ConfigError, match=says):
        trained(method, kind, tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 8}, "group_size is 8"),
        ({"symmetric": "yes"}, "method.symmetric of qat is 'yes'"),
        ({"fake_quantize": None}, "method.fake_quantize of qat is None"),
        ({"activation_bits": 4}, "method.activation_bits of qat is 4"),
        ({"precision": "float16"}, "method.precision of qat is 'float16'"),
        ({"distill": -1.0}, "method.distill of qat is -1.0"),
        ({"distill": "much"}, "method.distill of qat is 'much'"),
        ({"keep": "*.down_proj"}, "method.keep is"),
        ({"engine": "own"}, "method.engine of qat is 'own'"),
        ({"engine": "torchao"}, "set method.symmetric=true"),
        ({"engine": "torchao", "symmetric": True, "activation_bits": 8}, "tokens asymmetrically"),
        ({"engine": "torchao", "symmetric": True, "fake_quantize": False}, "nothing to do"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace(".", r"\.").replace("*", r"\*")):
        qat(**options)


def test_a_rate_that_is_too_high_is_one_sentence(tmp_path: Path) -> None:
    model = half("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(1e30)
    with pytest.raises(ConfigError, match=r"training of qat diverged: the \w+ of step 1 of 4"):
        qat().quantize(model, None, CROPS, tmp_path)


def test_no_calibration_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qat needs calibration text"):
        qat().quantize(half("llama"), None, None, tmp_path)
