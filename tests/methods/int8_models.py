"""Tiny seeded models and the round trip through an artefact, for the tests of the INT8 methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from methods.base import Engine, Method, QuantizeReport
from tests.methods.machine import Machine

VOCABULARY = 96
CONTEXT = 64


def llama(tied: bool = False, bias: bool = False) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        attention_bias=bias,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # Fresh weights give almost flat logits; larger ones make rounding visible.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def gpt2() -> Any:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def mixtral() -> Any:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=CONTEXT,
    )
    return MixtralForCausalLM(config).eval()


def tokens(samples: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    """Return int64 [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (samples, length), generator=generator)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids).logits
    return logits


def round_trip(
    method: Method,
    model: Any,
    folder: Path,
    calibration: Tensor | None = None,
    machine: Machine | None = None,
) -> tuple[QuantizeReport, Engine]:
    """Quantize `model` (changed in place), and load what was stored."""
    report = method.quantize(model, None, calibration, folder)
    return report, method.load(folder, machine or Machine())


def divergence(reference: Tensor, other: Tensor) -> float:
    """Return the mean KL(reference || other) in nats of logits [..., V]."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
