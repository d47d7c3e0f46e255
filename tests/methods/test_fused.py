"""Linear maps that read the same input: which are joined, what they compute, what is said of it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.reference import dequantize_packed
from methods.affine import Affine, quantize
from methods.base import KernelUse, Matrix
from methods.fused import Joined, fuse, told
from methods.layers import Scope, bias_of, select, weight_of
from methods.layers import replace as put
from methods.linear import Layout, QuantizedLinear, QuantizedModule, module_of
from tests.architectures import CONFIGS, logits_of, tiny, tiny_ids
from tests.methods.machine import Machine

BLOCK = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "llama_tied": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "qwen2": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "mixtral": [("q_proj", "k_proj", "v_proj")],
    "opt": [("k_proj", "v_proj", "q_proj")],
    "gpt2": [],
    "gpt_neox": [],
}

AFFINES = [
    Affine(bits, group_size, symmetric)
    for bits in (8, 4, 3, 2)
    for group_size in (-1, 32)
    for symmetric in (True, False)
]


class Toy(nn.Module):
    """Three maps that read one tensor, the last of them first."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, *maps: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 40)
        self.one, self.two, self.three = maps

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> list[Tensor]:
        x = self.embedding(input_ids)
        last = self.three(x)
        return [self.one(x), self.two(x), last]


def packed(rows: int, affine: Affine, bias: bool = False, columns: int = 40) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    layout = Layout.of(Matrix("w", "block", rows, columns), affine)
    layout = replace(layout, bias="float32" if bias else None)
    values = torch.randn(rows, generator=generator) if bias else None
    module = module_of(layout).fill(quantize("w", weight, affine), values)
    assert isinstance(module, QuantizedLinear)
    return module


def quantized(kind: str, affine: Affine) -> Any:
    """Return a tiny model whose matrices are packed as `affine` says, not yet prepared."""
    model = tiny(kind)
    for matrix in select(model, Scope()).matrices:
        if matrix.count == 1:
            bias = bias_of(model, matrix)
            layout = replace(Layout.of(matrix, affine), bias=None if bias is None else "float32")
            filled = quantize(matrix.name, weight_of(model, matrix), affine)
            put(model, matrix, module_of(layout).fill(filled, bias))
    return model


def stored_weight(module: QuantizedLinear) -> Tensor:
    layout = module.layout
    return dequantize_packed(*module.stored(), layout.bits, layout.group_size, layout.in_features)


def bytes_of(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_what_reads_the_same_input_is_joined(kind: str) -> None:
    model, ids = tiny(kind), tiny_ids()
    expected, size = logits_of(model, ids), bytes_of(model)
    groups = fuse(model)
    found = [tuple(name.rpartition(".")[2] for name in group.names) for group in groups]
    assert found == BLOCK[kind] * 2
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert bytes_of(model) == size
    assert fuse(model) == []


@pytest.mark.parametrize("affine", AFFINES, ids=str)
def test_packed_rows_are_joined_exactly(affine: Affine) -> None:
    maps = [packed(23, affine), packed(9, affine, bias=True), packed(5, affine)]
    weights = [stored_weight(module) for module in maps]
    bias = maps[1].bias
    model = Toy(*maps)
    expected = model(torch.tensor([[1, 5]]))
    (group,) = fuse(model)
    joined = model.get_submodule(group.fused)
    assert isinstance(joined, QuantizedLinear)
    assert [n for n, m in model.named_modules() if m is joined] == [group.fused]
    assert bias is not None
    assert torch.equal(stored_weight(joined), torch.cat(weights))
    assert joined.bias is not None
    assert torch.equal(joined.bias, torch.cat([torch.zeros(23), bias, torch.zeros(5)]))
    buffers = {name: (tuple(b.shape), b.dtype) for name, b in joined.named_buffers()}
    assert buffers == joined.layout.shapes()
    for one, other in zip(model(torch.tensor([[1, 5]])), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_joined_model_is_prepared_as_any_other(kind: str, bits: int) -> None:
    ids = tiny_ids()
    models = [quantized(kind, Affine(bits, 32, symmetric=False)) for _ in range(2)]
    groups = fuse(models[1])
    assert groups
    uses: list[list[KernelUse]] = [[], []]
    for model, of_model in zip(models, uses, strict=True):
        for name, module in model.named_modules():
            if isinstance(module, QuantizedModule):
                module.prepare(name, Machine(compute_dtype="bfloat16"))
                of_model.append(module.use(name))
    plain, joint = ({use.name: use.weights for use in told(of, groups)} for of in uses)
    assert joint == plain
    expected, found = (logits_of(model, ids) for model in models)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_unlike_maps_stay_apart() -> None:
    four, eight = Affine(4, 32), Affine(8, 32)
    unlike = Toy(packed(8, four), packed(9, eight), packed(5, Affine(4, 16)))
    assert fuse(unlike) == []
    whole = Affine(4, -1, per_tensor=True)
    assert fuse(Toy(packed(8, whole), packed(9, whole), packed(5, whole))) == []
    assert fuse(Toy(nn.Linear(40, 3), nn.Linear(40, 4).half(), packed(5, four))) == []
    (group,) = fuse(Toy(packed(8, four), packed(9, eight), packed(5, four)))
    assert group.names == ("one", "three")


def test_shared_and_wrapped_maps_stay_apart() -> None:
    tied = nn.Linear(40, 7)
    model = Toy(tied, nn.Linear(40, 4), nn.Linear(40, 7))
    model.three.weight = tied.weight
    assert fuse(model) == []
    same = nn.Linear(40, 4)
    assert fuse(Toy(same, same, nn.Linear(40, 4))) == []
    wrapped = Toy(nn.Linear(40, 4), nn.Linear(40, 4), nn.Linear(40, 4))
    own = wrapped.one.forward
    wrapped.one.forward = lambda x: own(x) + 1  # type: ignore[method-assign, assignment]
    (group,) = fuse(wrapped)
    assert group.names == ("two", "three")


def joined() -> tuple[Joined, list[int]]:
    """Return a joined map of two and three rows, and a list that grows with each call of it."""
    torch.manual_seed(0)
    linear, calls = nn.Linear(4, 5), [0]
    linear.register_forward_hook(lambda *_: calls.append(0))
    return Joined(linear, [2, 3]), calls


def check(map_: Joined, index: int, x: Tensor) -> None:
    rows = slice(0, 2) if index == 0 else slice(2, 5)
    expected = nn.functional.linear(x, map_.linear.weight[rows], map_.linear.bias[rows])
    torch.testing.assert_close(map_.part(index, x), expected)


@torch.no_grad()
def test_parts_are_right_in_any_order_and_for_any_input() -> None:
    map_, calls = joined()
    x, y = torch.randn(2, 4), torch.randn(3, 4)
    for index in (1, 0):
        check(map_, index, x)
    assert len(calls) == 2
    for index, z in ((0, x), (0, y), (1, x), (1, x), (0, x), (1, y), (0, y)):
        check(map_, index, z)
    # The same tensor with other values in it is another input.
    check(map_, 0, x)
    x.add_(1)
    check(map_, 1, x)


@torch.no_grad()
def test_nothing_is_held_when_every_part_was_handed_out() -> None:
    map_, calls = joined()
    for _ in range(8):
        # Freed memory and identities are used again at once.
        x = torch.randn(2, 4)
        check(map_, 0, x)
        check(map_, 1, x)
        gone = weakref.ref(x)
        del x
        gc.collect()
        assert gone() is None
    assert len(calls) == 9
    x = torch.randn(2, 4)
    check(map_, 0, x)
    del x
    # One part was never asked for: its input is still held, so its identity is not free.
    for _ in range(5):
        check(map_, 1, torch.randn(2, 4))


def test_each_matrix_says_what_it_was_joined_with() -> None:
    model = tiny("llama")
    groups = fuse(model)
    first, second = groups[0], groups[1]
    uses = [
        KernelUse(first.fused, "QuantizedLinear", "int4", "packed", sum(first.weights)),
        KernelUse(second.names[1], "Linear", "torch.linear", "packed", second.weights[1]),
        KernelUse("model.layers.0.self_attn.o_proj", "Linear", "torch.linear", "packed", 1024),
    ]
    found = told(uses, groups)
    assert [use.name.rpartition(".")[2] for use in found] == [
        "q_proj", "k_proj", "v_proj", "up_proj", "o_proj",
    ]  # fmt: skip
    assert [use.kernel for use in found] == [
        "int4, fused with k_proj, v_proj",
        "int4, fused with q_proj, v_proj",
        "int4, fused with q_proj, k_proj",
        "torch.linear, fused with gate_proj",
        "torch.linear",
    ]
    assert [use.weights for use in found] == [32 * 32, 16 * 32, 16 * 32, 64 * 32, 1024]
