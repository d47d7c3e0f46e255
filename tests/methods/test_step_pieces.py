"""The shorter pieces of a recorded step compute what the model's own compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from methods.step_pieces import grouped_attention, rms_norms, short_pieces
from tests.architectures import logits_of, tiny, tiny_ids


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_is_transformers_own(heads: int, batch: int) -> None:
    module = nn.Module()
    module.num_key_value_groups = heads // 2
    query, key, value = drawn(batch, heads, 1, 8), drawn(batch, 2, 16, 8), drawn(batch, 2, 16, 12)
    mask = torch.zeros(16).masked_fill(torch.arange(16) > 9, torch.finfo(torch.float32).min)
    mask = mask.expand(batch, 1, 1, 16)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3, is_causal=True)
    assert found.shape == expected.shape == (batch, 1, heads, 12)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("kind", "count"), [("llama", 5), ("qwen2", 5), ("gpt2", 0), ("opt", 0)])
def test_norms_are_found_by_what_they_compute(kind: str, count: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert len(rms_norms(tiny(kind).to(dtype))) == count


def test_other_norms_are_left_alone() -> None:
    class Gated(nn.Module):
        eps = 1e-6

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return x if gate is None else x * gate

    # Gemma adds one to its weights; a LayerNorm takes the mean off.
    gemma = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    )
    assert rms_norms(gemma) == []
    assert rms_norms(nn.Sequential(Gated(), nn.LayerNorm(8, bias=False), nn.RMSNorm(8))) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_is_the_same_before_within_and_after(dtype: torch.dtype) -> None:
    model: Any = tiny("llama").to(dtype)
    ids = tiny_ids()[:, :1]
    expected = logits_of(model, ids)
    norms = rms_norms(model)
    with short_pieces(model, norms):
        assert all("forward" in vars(norm) for norm in norms)
        found = logits_of(model, ids)
    assert float((found - expected).norm() / expected.norm()) < (
        1e-5 if dtype == torch.float32 else 0.02
    )
    assert torch.equal(logits_of(model, ids), expected)
    assert rms_norms(model) == norms
