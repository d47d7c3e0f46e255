"""The PyTorch engine computes the model as its configuration states it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from methods.base import Forking
from methods.engine import TorchEngine
from tests.architectures import tiny, tiny_ids
from tests.methods.forks import check_fork, drawn


def gemma2(cap: float | None, window: int = 4096) -> Any:
    torch.manual_seed(4)
    config = Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        attn_logit_softcapping=cap,
        query_pre_attn_scalar=1,
        sliding_window=window,
    )
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        # Attention scores far beyond the cap.
        parameter.data.mul_(8)
    return model


def test_attention_scores_are_capped_where_the_model_caps_them() -> None:
    model, plain = gemma2(0.5), gemma2(None)
    ids = tiny_ids()
    with torch.no_grad():
        expected = gemma2_eager(model, ids)
    found = TorchEngine(model, "cpu", []).prefill(ids)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    uncapped = TorchEngine(plain, "cpu", []).prefill(ids)[0]
    assert float((found - uncapped).abs().max()) > 0.1


def gemma2_eager(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits with plain attention, of a copy."""
    copy = Gemma2ForCausalLM._from_config(model.config, attn_implementation="eager").eval()
    copy.load_state_dict(model.state_dict())
    logits: torch.Tensor = copy(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_models_keep_their_attention(kind: str) -> None:
    model = tiny(kind)
    before = model.config._attn_implementation
    assert TorchEngine(model, "cpu", []).model.config._attn_implementation == before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_cache_goes_on_in_several_ways(kind: str) -> None:
    model = tiny(kind)
    engine = TorchEngine(model, "cpu", [])
    assert "fork" in engine.capabilities
    assert isinstance(engine, Forking)
    check_fork(engine, drawn(4, model.config.vocab_size))


def test_a_sliding_window_goes_on_in_several_ways() -> None:
    narrow = gemma2(None, window=6)
    check_fork(TorchEngine(narrow, "cpu", []), drawn(4, 320))
    ids = drawn(1, 320)
    wide, _ = TorchEngine(gemma2(None), "cpu", []).prefill(ids)
    assert float((TorchEngine(narrow, "cpu", []).prefill(ids)[0] - wide).abs().max()) > 0.01


def test_a_cache_of_another_kind_is_not_forked() -> None:
    config = Qwen3NextConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=0,
        layer_types=["linear_attention", "full_attention"],
    )
    engine = TorchEngine(Qwen3NextForCausalLM(config).eval(), "cpu", [])
    assert "fork" not in engine.capabilities
    assert {"logits", "cache"} <= engine.capabilities
