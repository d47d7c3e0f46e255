"""Ternary training: what is learned, that the artefact is the trained model, and GGUF's types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels.errors import ConfigError
from kernels.ternary import unpack
from methods.artefact import WEIGHTS
from methods.base import Calibration, LoadingMethod, Method, TrainingMethod, TwoPathMethod
from methods.bitnet import POST_TRAINING, BitNet, ternary
from methods.bitnet_train import (
    SCALE_TOLERANCE,
    TernaryLevels,
    TernarySchedule,
    TrainedBitNet,
    bitnet,
    equality,
)
from methods.gguf import FILE, Gguf
from methods.layers import weight_of
from methods.quantization_aware import EqualityError
from methods.rtn import RTN
from tests.architectures import tiny, tiny_ids, tiny_tokenizer
from tests.methods.gguf_models import tiny_kind
from tests.methods.int8_models import round_trip
from tests.methods.layer_checks import bits_on_disk
from tests.methods.machine import Machine

CALIBRATION = Calibration(8, 24, 0)
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def schedule(steps: int = 6, start: str = "weights") -> TernarySchedule:
    return TernarySchedule(steps, 4, 3e-3, 0, 0.0, 1.0, start)


def method(train: Any = True, then: Method | None = None, **options: Any) -> Any:
    options = {"activation_bits": 8, "keep": [], "training": schedule(), **options}
    return bitnet("bitnet", train=train, calibration=CALIBRATION, then=then, **options)


def crops() -> Tensor:
    """Return text in which each token says the next."""
    return (torch.arange(24)[None] + 3 * torch.arange(8)[:, None]) % 40


@pytest.mark.parametrize("activation_bits", [8, None])
@pytest.mark.parametrize("kind", ["llama_tied", "gpt2"])
def test_the_artefact_is_the_trained_model(
    kind: str, activation_bits: int | None, tmp_path: Path
) -> None:
    trained = method(activation_bits=activation_bits)
    model = tiny(kind)
    before = ternary(weight_of(model, trained.select(model)[0][0]))[1].item()
    report, _ = round_trip(trained, model, tmp_path, crops())
    found = report.details["training"]
    assert found["kind"] == "bitnet"
    assert found["equality"]["difference"] <= found["equality"]["tolerance"]
    assert found["equality"]["tolerance"] == (0.02 if activation_bits else 0.001)
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    assert POST_TRAINING not in report.notes
    assert "trained with ternary weights from the model's weights" in report.notes[-1]
    stored = load_file(tmp_path / WEIGHTS)[f"{report.quantized[0].name}.scale"].item()
    assert stored != pytest.approx(before, rel=1e-4)


def test_training_lowers_the_loss_that_rounding_left(tmp_path: Path) -> None:
    trained = method(training=schedule(60))
    report, engine = round_trip(trained, tiny("llama"), tmp_path / "trained", crops())
    _, other = round_trip(BitNet("bitnet"), tiny("llama"), tmp_path / "rounded")
    losses = [
        torch.nn.functional.cross_entropy(
            one.prefill(crops())[0][:, :-1].flatten(0, 1), crops()[:, 1:].flatten()
        )
        for one in (engine, other)
    ]
    assert losses[0] < 0.8 * losses[1]
    assert report.details["training"]["curve"][-1][1] < report.details["training"]["curve"][0][1]


def test_from_scratch_forgets_the_weights(tmp_path: Path) -> None:
    values = []
    for start in ("scratch", "weights"):
        model = tiny("llama")
        report = method(training=schedule(1, start)).quantize(
            model, None, crops(), tmp_path / start
        )
        name = report.quantized[0].name
        packed = load_file(tmp_path / start / WEIGHTS)[f"{name}.packed"]
        values.append(unpack(packed, report.quantized[0].in_features))
    original = ternary(weight_of(tiny("llama"), report.quantized[0]))[0]
    shares = [float((value == original).float().mean()) for value in values]
    assert shares[0] < 0.6 < 0.9 < shares[1]


def test_an_ended_training_goes_on(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "parts")]
    reports = []
    for folder in folders:
        state = folder / "state"
        state.mkdir(parents=True)
        if folder.name == "parts":
            method().train(tiny("llama"), None, crops(), folder / "x", state, lambda text: None)
        reports.append(
            method().train(tiny("llama"), None, crops(), folder / "a", state, lambda text: None)
        )
    one, other = (load_file(folder / "a" / WEIGHTS) for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert reports[1].details["training"]["resumed_at"] == [6]


def test_the_rounding_of_training_is_that_of_the_artefact() -> None:
    model = tiny("llama")
    matrix = BitNet("bitnet").select(model)[0][0]
    weight = weight_of(model, matrix).clone().requires_grad_(True)
    rounded = TernaryLevels().rounded(matrix, weight)
    values, scale = ternary(weight.detach())
    assert torch.equal(rounded, values.float() * scale)
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))  # type: ignore[arg-type]
    stored = TernaryLevels().stored(matrix, weight)
    assert stored.zero_point is not None
    assert torch.equal((stored.codes.float() - stored.zero_point) * stored.scale, rounded)


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
@pytest.mark.parametrize("train", [True, False])
def test_gguf_holds_the_ternary_weights(train: bool, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    then = Gguf(f"gguf_{kind}", kind, token_embedding_type="F16", output_tensor_type="F16")
    chain = method(train, then)
    model = tiny_kind("llama", WIDE)
    report = chain.quantize(model, tiny_tokenizer(), crops() if train else None, tmp_path)
    blocks = [matrix for matrix in report.quantized if matrix.role == "block"]
    assert {matrix.type for matrix in blocks} == {kind}  # type: ignore[attr-defined]
    stored = 2.0625 if kind == "TQ2_0" else 1.6875
    assert {chain.stored_bits(matrix) / matrix.weights for matrix in blocks} == {stored}
    assert chain.bits == 1.58
    assert isinstance(chain, TwoPathMethod)
    assert isinstance(chain, LoadingMethod)
    if train:
        assert report.details["training"]["equality"]["tolerance"] == SCALE_TOLERANCE
    else:
        assert report.notes[0] == POST_TRAINING
    assert (tmp_path / FILE).exists()
    engine = chain.load(tmp_path, Machine())
    other = chain.load_dequantized(tmp_path, Machine())
    first, second = (one.prefill(tiny_ids(1, 8))[0] for one in (engine, other))
    engine.close()
    assert float((first - second).norm() / second.norm()) < 0.1


def test_rows_that_llama_cpp_would_store_otherwise_are_refused() -> None:
    chain = method(False, Gguf("gguf_TQ2_0", "TQ2_0"))
    with pytest.raises(ConfigError, match="would store its rows of 32 weights as Q4_0, and not"):
        chain.select(tiny("llama"))


def test_the_option_train_chooses_the_method() -> None:
    assert method(False) == BitNet("bitnet")
    trained = method()
    assert isinstance(trained, TrainedBitNet)
    assert isinstance(trained, TrainingMethod)
    assert not isinstance(method(False), TrainingMethod)
    assert (trained.bits, trained.needs_calibration) == (1.58, True)
    assert method(True, Gguf("gguf_TQ2_0", "TQ2_0")).needs_calibration
    assert not method(False, Gguf("gguf_TQ2_0", "TQ2_0")).needs_calibration


def test_bad_options_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="train of bitnet is 'often'; it must be true or false"):
        method("often")
    with pytest.raises(ConfigError, match=r"training.start is 'zero'; it must be weights or"):
        schedule(1, "zero")
    with pytest.raises(ConfigError, match="then of bitnet is rtn, which holds other than ternary"):
        method(False, RTN("rtn", 2, 32))
    with pytest.raises(ConfigError, match="then of bitnet is Q4_0, which holds"):
        method(False, Gguf("gguf_Q4_0", "Q4_0"))
    with pytest.raises(ConfigError, match=r"keep of bitnet is \['\*.down_proj'\], but a GGUF"):
        method(False, Gguf("gguf_TQ2_0", "TQ2_0"), keep=["*.down_proj"])
    with pytest.raises(ConfigError, match=r"training of bitnet has no value"):
        TrainedBitNet("bitnet")


def test_an_artefact_that_is_another_model_is_an_error() -> None:
    assert equality("bitnet", 0.01, 0.02) == {"difference": 0.01, "tolerance": 0.02}
    with pytest.raises(EqualityError, match=r"differ by nan; 0.02 is tolerated"):
        equality("bitnet", float("nan"), 0.02)
