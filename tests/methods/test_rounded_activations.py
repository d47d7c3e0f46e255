"""Rounding of tokens against plain arithmetic, and which matrices it can act on."""

from __future__ import annotations

import pytest
import torch

from kernels.errors import ConfigError
from methods.layers import Scope, select_linears
from methods.options import refuse_emulated
from methods.rounded_activations import (
    STACKED_EXPERTS,
    round_tokens,
)
from tests.architectures import tiny
from tests.methods.machine import Machine


def test_each_token_has_its_own_127_steps() -> None:
    torch.manual_seed(0)
    # Two tokens of very different size: a shared step would erase the small one.
    x = torch.randn(3, 2, 40) * torch.tensor([[1e-3], [1e3]])
    for token, rounded in zip(x.flatten(0, 1), round_tokens(x).flatten(0, 1), strict=True):
        step = max(abs(value) for value in token.tolist()) / 127
        expected = [round(value / step) * step for value in token.tolist()]
        torch.testing.assert_close(rounded, torch.tensor(expected), rtol=1e-5, atol=0)
        assert len({round(value / step) for value in rounded.tolist()}) > 20


def test_zeros_and_the_smallest_numbers_stay_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [3e38, -3e38]])
    rounded = round_tokens(x)
    assert torch.isfinite(rounded).all()
    assert not rounded[0].any()
    torch.testing.assert_close(rounded[2], x[2])


def test_bfloat16_tokens_are_rounded_in_float32() -> None:
    x = torch.randn(4, 64).bfloat16()
    rounded = round_tokens(x)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, round_tokens(x.float()))


def test_stacks_of_experts_are_left_out_and_said() -> None:
    selection = select_linears(tiny("mixtral"), Scope(), STACKED_EXPERTS)
    assert all(matrix.count == 1 for matrix in selection.matrices)
    stacks = {name for name, _, reason in selection.left_out if reason == STACKED_EXPERTS}
    assert stacks == {
        "model.layers.*.mlp.experts.gate_up_proj",
        "model.layers.*.mlp.experts.down_proj",
    }


def test_float16_is_refused_on_a_cpu_only() -> None:
    with pytest.raises(ConfigError, match="'float16' on a CPU, where it is emulated"):
        refuse_emulated(Machine(compute_dtype="float16"))
    refuse_emulated(Machine("cuda", "float16"))
    refuse_emulated(Machine(compute_dtype="bfloat16"))
