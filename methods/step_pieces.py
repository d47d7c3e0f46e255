"""Pieces of a decoded token that take fewer kernels than the model's own, for a recorded step.

Attention without copies: where a mask is given, transformers' function copies keys and values for
every query head that shares them (`repeat_kv` in integrations/sdpa_attention of transformers 5);
with a static cache that is the whole buffer, at every token and layer. Here [B, H, 1, D] is viewed
as [B, H / group, group, D], which one row of the mask serves.

RMSNorm as PyTorch's function, which is one kernel on a card in place of eight, and rounds once in
place of twice. It is put in where a module is shown to compute the same, whatever it is called.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

ATTENTION = "quantbench_grouped"

EXACT = 1e-5
"""Largest relative difference of a norm in float32 that counts as the same."""


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return the attention [B, 1, H, D] of query [B, H, 1, D] over key, value [B, Hk, T, D].

    `attention_mask` [B, 1, 1, T] is added. The signature is that of transformers' functions.
    """
    batch, heads, _one, size = query.shape
    shared = key.shape[1]
    grouped = query.reshape(batch, shared, heads // shared, size)
    read = functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return read.reshape(batch, 1, heads, value.shape[-1]), None


@torch.no_grad()
def rms_norms(model: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` that compute RMSNorm of their one argument, and do no more."""
    return [module for module in model.modules() if _is_rms_norm(module)]


def _epsilon(module: nn.Module) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if hooked or type(module) is nn.RMSNorm or _epsilon(module) is None:
        return False
    if not isinstance(weight, Tensor) or weight.ndim != 1 or dict(module.named_children()):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    x = torch.linspace(-1, 3, weight.numel(), device=weight.device)
    plain = functional.rms_norm(x, x.shape, weight.float(), _epsilon(module))
    found = copy.deepcopy(module).float()(x)
    return bool((found - plain).norm() <= EXACT * plain.norm())


def _one_kernel(module: Any) -> Callable[[Tensor], Tensor]:
    own, weight, epsilon = module.forward, module.weight, _epsilon(module)

    def forward(x: Tensor) -> Tensor:
        # PyTorch has the one kernel for equal types only.
        if x.dtype != weight.dtype:
            result: Tensor = own(x)
            return result
        return functional.rms_norm(x, weight.shape, weight, epsilon)

    return forward


@contextmanager
def short_pieces(model: Any, norms: Sequence[nn.Module]) -> Iterator[None]:
    """Let `model` use the pieces of this module: `norms` are those of `rms_norms`.

    Attention is replaced where it would be transformers' `sdpa`.
    """
    config = model.config
    attention = config._attn_implementation
    if attention == "sdpa":
        AttentionInterface.register(ATTENTION, grouped_attention)
        config._attn_implementation = ATTENTION
    for module in norms:
        vars(module)["forward"] = _one_kernel(module)
    try:
        yield
    finally:
        config._attn_implementation = attention
        for module in norms:
            del vars(module)["forward"]
