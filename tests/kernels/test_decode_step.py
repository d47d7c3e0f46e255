"""The structures of the decode step in C: what they refuse, and one block against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.decode_step import Block, DecodeStep, Shape, dense
from kernels.host_build import unavailable

needs_c = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

HIDDEN, INNER, HEADS, SIZE, VOCABULARY = 24, 40, 3, 6, 17
EPSILON, SCALING = 1e-5, 0.3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Decoder:
    """One block and a head with drawn weights, in C and in PyTorch."""

    def __init__(self) -> None:
        width = HEADS * SIZE
        shapes = {
            "query": (width, HIDDEN),
            "key": (width, HIDDEN),
            "value": (width, HIDDEN),
            "output": (HIDDEN, width),
            "gate": (INNER, HIDDEN),
            "up": (INNER, HIDDEN),
            "down": (HIDDEN, INNER),
        }
        self.weights = {name: drawn(*s, seed=i) * 0.3 for i, (name, s) in enumerate(shapes.items())}
        self.norms = [drawn(HIDDEN, seed=10 + i) for i in range(3)]
        self.head = drawn(VOCABULARY, HIDDEN, seed=20)
        matrices = {name: dense(weight, None) for name, weight in self.weights.items()}
        block = Block(
            attention_norm=self.norms[0],
            mlp_norm=self.norms[1],
            query_norm=None,
            key_norm=None,
            query=matrices["query"],
            key=matrices["key"],
            value=matrices["value"],
            output=matrices["output"],
            gate=matrices["gate"],
            up=matrices["up"],
            down=matrices["down"],
        )
        shape = Shape(HEADS, HEADS, SIZE, torch.float32, EPSILON, SCALING)
        self.step = DecodeStep([block], self.norms[2], dense(self.head, None), shape)

    def plain(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the logits with no rotation; keys and values [B, HEADS, T, SIZE] of before."""
        w = self.weights
        normed = functional.rms_norm(x, (HIDDEN,), self.norms[0], EPSILON)
        query, key, value = (
            functional.linear(normed, w[name]).view(-1, HEADS, 1, SIZE)
            for name in ("query", "key", "value")
        )
        attended = functional.scaled_dot_product_attention(
            query, torch.cat([keys, key], 2), torch.cat([values, value], 2), scale=SCALING
        )
        x = x + functional.linear(attended.flatten(1), w["output"])
        normed = functional.rms_norm(x, (HIDDEN,), self.norms[1], EPSILON)
        gated = functional.silu(functional.linear(normed, w["gate"]))
        x = x + functional.linear(gated * functional.linear(normed, w["up"]), w["down"])
        return functional.linear(
            functional.rms_norm(x, (HIDDEN,), self.norms[2], EPSILON), self.head
        )


@needs_c
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 7, 70])
def test_a_block_is_that_of_plain_pytorch(batch: int, length: int) -> None:
    decoder = Decoder()
    x = drawn(batch, HIDDEN, seed=30)
    keys, values = (drawn(batch, HEADS, length + 1, SIZE, seed=seed) for seed in (31, 32))
    before = keys[:, :, :length].clone(), values[:, :, :length].clone()
    rotation = torch.ones(SIZE), torch.zeros(SIZE)
    found = decoder.step(x, rotation, [(keys, values)], length)
    torch.testing.assert_close(found, decoder.plain(x, *before), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(keys[:, :, :length], before[0], rtol=0, atol=0)
    normed = functional.rms_norm(x, (HIDDEN,), decoder.norms[0], EPSILON)
    written = functional.linear(normed, decoder.weights["value"]).view(batch, HEADS, SIZE)
    torch.testing.assert_close(values[:, :, length], written, rtol=1e-4, atol=1e-5)


@needs_c
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sequence(bad: float) -> None:
    decoder = Decoder()
    x = drawn(2, HIDDEN, seed=30)
    expected = decoder.plain(x, torch.empty(2, HEADS, 0, SIZE), torch.empty(2, HEADS, 0, SIZE))
    x[0, 3] = bad
    kept = torch.zeros(2, HEADS, 1, SIZE), torch.zeros(2, HEADS, 1, SIZE)
    found = decoder.step(x, (torch.ones(SIZE), torch.zeros(SIZE)), [kept], 0)
    assert bool(found[0].isnan().all())
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


@needs_c
def test_a_full_cache_is_refused() -> None:
    kept = torch.zeros(1, HEADS, 4, SIZE), torch.zeros(1, HEADS, 4, SIZE)
    with pytest.raises(ValueError, match="no room behind its 4 tokens"):
        Decoder().step(drawn(1, HIDDEN), (torch.ones(SIZE), torch.zeros(SIZE)), [kept], 4)


@pytest.mark.parametrize("weight", [drawn(4, 6).T, drawn(4, 6).double()])
def test_matrices_that_c_does_not_read_are_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="matrix with strides"):
        dense(weight, None)
