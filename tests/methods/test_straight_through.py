"""Straight-through rounding: values to the bit, gradients by definition, tied weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods.affine import Affine, fake_quantize
from methods.layers import Scope, select, weight_of
from methods.rounded_activations import round_tokens
from methods.straight_through import (
    NearestLevels,
    NotRounded,
    RoundedModel,
    parameter_name,
    rounded_tokens,
    straight_through,
)
from tests.architectures import logits_of, tiny, tiny_ids

KINDS = ("llama", "llama_tied", "gpt2", "mixtral")


def rounded_model(kind: str, affine: Affine, dtype: torch.dtype = torch.float32) -> RoundedModel:
    model = tiny(kind)
    model.config._experts_implementation = "eager"
    matrices = select(model, Scope()).matrices
    return RoundedModel(model, matrices, NearestLevels(affine), dtype, tokens=False)


def test_the_value_is_the_rounded_one_and_the_gradient_the_identity() -> None:
    value = torch.tensor([0.1, 0.7, -1.3, 5.0], requires_grad=True)
    rounded = torch.tensor([0.3, 1.1, -1.7, 2.9])
    result = straight_through(value, rounded)
    assert torch.equal(result, rounded)
    torch.autograd.backward((result * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum())
    assert value.grad is not None
    assert value.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_gradient_is_zero_outside_the_range() -> None:
    value = torch.tensor([-3.0, 0.2, 3.0], requires_grad=True)
    inside = value.detach().abs() <= 1
    torch.autograd.backward(straight_through(value, value.detach().clamp(-1, 1), inside).sum())
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_are_rounded_by_the_arithmetic_of_artefacts(bits: int, symmetric: bool) -> None:
    affine = Affine(bits, 16, symmetric)
    model = tiny("llama")
    matrix = select(model, Scope()).matrices[0]
    weight = weight_of(model, matrix).clone().requires_grad_(True)
    rounding = NearestLevels(affine)
    rounded = rounding.rounded(matrix, weight)
    assert torch.equal(rounded, fake_quantize("w", weight.detach(), affine))
    factors = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward((rounded * factors).sum())
    assert weight.grad is not None
    assert torch.equal(weight.grad, factors)
    assert torch.equal(NotRounded(affine).rounded(matrix, weight), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_answers_as_one_with_rounded_weights(kind: str) -> None:
    affine = Affine(3, 16)
    trained = rounded_model(kind, affine, torch.float16)
    expected = tiny(kind)
    expected.config._experts_implementation = "eager"
    expected.half().float()
    fresh = tiny(kind)
    for matrix in select(expected, Scope()).matrices:
        rounded = fake_quantize(matrix.name, weight_of(fresh, matrix), affine)
        weight_of(expected, matrix).copy_(rounded)
    ids = tiny_ids()
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(trained.logits(ids), logits_of(expected, ids))
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_once(kind: str) -> None:
    trained = rounded_model(kind, Affine(4, 16))
    torch.autograd.backward(trained.logits(tiny_ids()).square().mean())
    parameters = trained.parameters()
    assert len(parameters) == len(list(trained.model.parameters()))
    silent = {n for n, p in parameters.items() if p.grad is None or not bool(p.grad.any())}
    assert not silent
    assert set(trained.matrices) <= set(parameters)


def test_names_of_weights() -> None:
    model = tiny("mixtral")
    names = {parameter_name(model, matrix) for matrix in select(model, Scope()).matrices}
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert any(name.endswith("experts.down_proj") for name in names)


def test_linear_maps_read_rounded_tokens_with_a_gradient() -> None:
    model = tiny("llama")
    matrix = select(model, Scope()).matrices[0]
    linear = model.get_submodule(matrix.name)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def read(tokens: Tensor) -> Tensor:
        result: Tensor = linear(tokens)
        return result

    with rounded_tokens(model, [matrix]):
        assert torch.equal(read(x), read(x.detach()))
        inside = read(x)
        torch.autograd.backward(inside.sum())
    assert torch.equal(inside, read(round_tokens(x.detach())))
    assert not torch.equal(inside, read(x))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand_as(x))
