"""Learned step sizes: the paper's formulas, its first steps, and the artefact they end in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.affine import Affine, dequantize
from methods.artefact import WEIGHTS
from methods.base import Calibration, Method, TrainingMethod
from methods.layers import Scope, select, weight_of
from methods.lsq import LSQ, LearnedSteps, first_steps, learned_step
from methods.training import Schedule
from tests.architectures import tiny, tiny_ids
from tests.methods.machine import Machine

CROPS = tiny_ids(samples=8, length=16)
SCHEDULE = Schedule(4, 2, 1e-2, 1, 0.0, 1.0)


def lsq(bits: int = 3, **options: Any) -> LSQ:
    values: dict[str, Any] = {"training": SCHEDULE, "calibration": Calibration(8, 16, 0)}
    return LSQ("lsq", bits, 16, **{**values, **options})


def plain(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Equations 1 and 2 for autograd: rounding adds a constant, clipping is torch's."""
    half = 2 ** (bits - 1)
    ratio = (weight / step).clamp(-half, half - 1)
    return (ratio + (ratio.round() - ratio).detach()) * step


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_value_and_gradients_are_those_of_the_paper(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 16, generator=generator, requires_grad=True)
    # Small steps, so that weights lie inside, above and below the range.
    step = (torch.rand(5, 3, 1, generator=generator) + 0.5) * 2.0 ** (1 - bits)
    step.requires_grad_(True)
    factors = torch.randn(5, 3, 16, generator=generator)
    rounded = learned_step(weight, step, bits)
    ours = torch.autograd.grad((rounded * factors).sum(), (weight, step))
    expected = plain(weight, step, bits)
    theirs = torch.autograd.grad((expected * factors).sum(), (weight, step))
    torch.testing.assert_close(rounded, expected)
    torch.testing.assert_close(ours[0], theirs[0])
    scale = 1 / math.sqrt(16 * (2 ** (bits - 1) - 1))
    torch.testing.assert_close(ours[1], theirs[1] * scale, rtol=1e-4, atol=1e-5)
    assert bool((theirs[0] == 0).any())


def test_the_gradient_of_one_step_by_hand() -> None:
    weight, step = torch.tensor([[0.4, 9.0, -9.0]]), torch.tensor([[1.0]], requires_grad=True)
    torch.autograd.backward(learned_step(weight, step, 3).sum())
    # Inside: -0.4 + 0; above: Qp = 3; below: -Qn = -4.
    assert step.grad is not None
    assert float(step.grad) == pytest.approx((-0.4 + 3 - 4) / math.sqrt(3 * 3))


def test_a_quantizer_without_straight_through_teaches_no_weight() -> None:
    """The LearnableQuantizer of a tutorial: alpha and beta around a bare torch.round, no limits."""
    weight = torch.randn(8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    alpha, beta = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.1))
    scale = alpha / (2**2 - 1)
    codes = torch.round((weight - beta) / scale)
    rounded = codes * scale + beta
    torch.autograd.backward(rounded.square().sum())
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0] * 8
    # alpha and beta are taught by their outer places alone, as if no code would move with them.
    outer = 2 * rounded.detach()
    assert alpha.grad is not None
    assert beta.grad is not None
    assert float(alpha.grad) == pytest.approx(float((outer * codes.detach()).sum()) / 3, rel=1e-5)
    assert float(beta.grad) == pytest.approx(float(outer.sum()), rel=1e-5)
    # Nothing keeps the codes of 3 bits to -4 to 3.
    assert float(codes.detach().abs().max()) > 4


def test_first_steps() -> None:
    groups = torch.tensor([[[1.0, -3.0]], [[0.0, 0.0]]])
    found = first_steps(groups, 3).flatten().tolist()
    assert found == pytest.approx([2 * 2 / math.sqrt(3), 1.0])


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_what_is_stored_is_what_was_computed_with(bits: int) -> None:
    model = tiny("gpt2")
    matrices = select(model, Scope()).matrices
    steps = LearnedSteps(model, matrices, Affine(bits, 24, symmetric=True))
    for matrix in matrices:
        weight = weight_of(model, matrix)
        quantized = steps.stored(matrix, weight)
        assert quantized.scale.dtype == torch.float16
        assert torch.equal(dequantize(quantized), steps.rounded(matrix, weight).detach())


def test_steps_are_trained_and_do_not_decay(tmp_path: Path) -> None:
    model = tiny("llama")
    matrices = select(model, Scope()).matrices
    steps = LearnedSteps(model, matrices, Affine(3, 16, symmetric=True))
    before = {matrix.name: steps.step(matrix).detach() for matrix in matrices}
    assert all(parameter.ndim == 1 for parameter in steps.parameters().values())
    report = lsq().quantize(tiny("llama"), None, CROPS, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    moved = [
        not torch.equal(stored[f"{matrix.name}.scale"].float(), before[matrix.name].squeeze(-1))
        for matrix in report.quantized
    ]
    assert all(moved)


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("bits", [4, 2])
def test_the_artefact_is_the_trained_model(kind: str, bits: int, tmp_path: Path) -> None:
    method = lsq(bits)
    report = method.quantize(tiny(kind), None, CROPS, tmp_path)
    training = report.details["training"]
    assert training["kind"] == "lsq"
    assert training["equality"]["difference"] <= 1e-5
    assert report.stored_bits == sum(method.stored_bits(matrix) for matrix in report.quantized)
    engine = method.load(tmp_path, Machine())
    assert engine.prefill(CROPS[:2])[0].isfinite().all()


def test_it_is_a_method_that_trains() -> None:
    method = lsq()
    held: Method = method
    assert isinstance(held, TrainingMethod)
    assert method.needs_calibration
    assert method.path_tolerance > 0


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="q_proj holds 1 values that are NaN"):
        lsq().quantize(model, None, CROPS, tmp_path)
