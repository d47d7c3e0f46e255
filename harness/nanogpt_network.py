"""The network of karpathy's nanoGPT in plain PyTorch, written from its description, not its code.

GPT-2 (Radford et al. 2019) with what nanoGPT changes: biases of linear maps and layer norms are
optional, GELU is the exact one (GPT-2 takes the tanh approximation), and the head shares its
weights with the token embedding. Parameters bear the names of a nanoGPT checkpoint. This is what
`harness.nanogpt_train` trains and what the conversion of `harness.nanogpt_convert` is tested
against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

DEVIATION = 0.02
"""Of fresh weights, as in GPT-2; maps that write into the residual stream start smaller."""


@dataclass(frozen=True)
class Shape:
    """What a nanoGPT checkpoint calls `model_args`."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    bias: bool
    vocab_size: int
    dropout: float


class Norm(nn.Module):
    """Layer norm over the last axis, with or without a bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed `x`, same shape."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Attention(nn.Module):
    """Causal self-attention; one map makes queries, keys and values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.n_head, shape.dropout
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each position of `x` [B, T, C] reads from those up to it, same shape."""
        parts = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        read = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        mixed: Tensor = self.c_proj(read.transpose(1, 2).flatten(2))
        return functional.dropout(mixed, self.dropout, self.training)


class Inner(nn.Module):
    """Two linear maps with exact GELU between them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed `x`, same shape."""
        mixed: Tensor = self.c_proj(functional.gelu(self.c_fc(x)))
        return functional.dropout(mixed, self.dropout, self.training)


class Block(nn.Module):
    """Attention and inner maps, each behind a norm and added to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1, self.attn = Norm(shape.n_embd, shape.bias), Attention(shape)
        self.ln_2, self.mlp = Norm(shape.n_embd, shape.bias), Inner(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream behind the block, same shape."""
        x = x + self.attn(self.ln_1(x))
        added: Tensor = x + self.mlp(self.ln_2(x))
        return added


class Network(nn.Module):
    """A nanoGPT: int64 ids [B, T] -> float logits [B, T, V]; T is at most `block_size`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        embedding = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.transformer = nn.ModuleDict(
            {
                "wte": embedding,
                "wpe": nn.Embedding(shape.block_size, shape.n_embd),
                "h": nn.ModuleList(Block(shape) for _ in range(shape.n_layer)),
                "ln_f": Norm(shape.n_embd, shape.bias),
            }
        )
        self.lm_head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        self.lm_head.weight = embedding.weight
        self._draw()

    def _draw(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # Two maps a block add to the stream, whose spread must not grow with the depth.
                shrunk = math.sqrt(2 * self.shape.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=DEVIATION / shrunk)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the token after each."""
        parts = self.transformer
        x: Tensor = parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1]))
        x = functional.dropout(x, self.shape.dropout, self.training)
        for block in parts["h"].children():
            x = block(x)
        logits: Tensor = self.lm_head(parts["ln_f"](x))
        return logits
