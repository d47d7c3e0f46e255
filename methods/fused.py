"""Linear maps that read the same input, run as one: query, key and value; gate and up.

They are found by structure: the model reads a few tokens, and sibling modules that are handed the
very same tensor belong together. Their weights are concatenated row by row, which is exact for
floats and for packed rows alike, so one kernel runs where there were several. The modules that
stay in the old places hand out slices of one result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.pack import pack
from kernels.reference import unpack_zero_point
from methods.base import KernelUse
from methods.linear import QuantizedEmbedding, QuantizedLinear

TRACED_TOKENS = 2
"""Tokens that are read to see which maps share an input."""

Linear = nn.Linear | QuantizedLinear


@dataclass(frozen=True)
class FusedGroup:
    """Matrices `names` that run as one module called `fused`, and the `weights` of each."""

    names: tuple[str, ...]
    fused: str
    weights: tuple[int, ...]

    def remark(self, name: str) -> str:
        """Return what the provenance says of the matrix `name`."""
        others = [other.rpartition(".")[2] for other in self.names if other != name]
        return f"fused with {', '.join(others)}"


class Joined(nn.Module):
    """One linear map for several that read the same input; `widths` are their numbers of outputs.

    A result is kept, with its input, until every part was handed out: while the input is held no
    later tensor can be mistaken for it.
    """

    def __init__(self, linear: Linear, widths: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.widths = list(widths)
        self._read: tuple[Tensor, int] | None = None
        self._left: dict[int, Tensor] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        """Return part `index` of the result for x [..., in]: [..., widths[index]]."""
        held = self._read is not None and self._read[0] is x and self._read[1] == x._version
        if not held or index not in self._left:
            self._left = dict(enumerate(self.linear(x).split(self.widths, dim=-1)))
            self._read = (x, x._version)
        y = self._left.pop(index)
        if not self._left:
            self._read = None
        return y


class Part(nn.Module):
    """One of the maps of a `Joined`: [..., in] -> [..., out], a slice of the common result."""

    def __init__(self, joined: Joined, index: int) -> None:
        super().__init__()
        self.joined = joined
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return this map's share."""
        return self.joined.part(self.index, x)


@torch.no_grad()
def fuse(model: Any) -> list[FusedGroup]:
    """Run linear maps of `model` that read the same tensor as one; `model` is changed in place.

    Packed maps are joined as they are stored, so this comes before `QuantizedModule.prepare`. Maps
    that differ in type, bits, groups or scales, that share a weight, or whose scale is one for the
    whole tensor stay as they are.
    """
    groups = []
    for names in _same_input(model):
        maps = [model.get_submodule(name) for name in names]
        widths = [_rows(module) for module in maps]
        joined = Joined(_concatenated(maps), widths).train(model.training)
        for index, name in enumerate(names):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Part(joined, index))
        weights = tuple(width * _columns(maps[0]) for width in widths)
        groups.append(FusedGroup(tuple(names), f"{names[0]}.joined.linear", weights))
    return groups


def told(uses: Sequence[KernelUse], groups: Sequence[FusedGroup]) -> list[KernelUse]:
    """Return `uses` with one for each original matrix, which says what it was fused with.

    `uses` name the fused modules, or still the original matrices.
    """
    by_name = {name: group for group in groups for name in group.names}
    by_module = {group.fused: group for group in groups}
    found = []
    for use in uses:
        if use.name in by_name:
            remark = by_name[use.name].remark(use.name)
            found.append(replace(use, kernel=f"{use.kernel}, {remark}"))
        elif use.name in by_module:
            group = by_module[use.name]
            for name, weights in zip(group.names, group.weights, strict=True):
                kernel = f"{use.kernel}, {group.remark(name)}"
                found.append(replace(use, name=name, kernel=kernel, weights=weights))
        else:
            found.append(use)
    return found


def _same_input(model: Any) -> list[list[str]]:
    """Return the names of maps to be fused, group by group, in the order of `named_modules`.

    So the joined map is met, and named, at the first of its group.
    """
    calls: list[tuple[str, Tensor, int]] = []
    with _stand_ins(model, calls):
        ids = torch.zeros((1, TRACED_TOKENS), dtype=torch.int64, device=model.device)
        model(input_ids=ids, use_cache=False)
    times = Counter(name for name, _, _ in calls)
    groups: dict[Hashable, list[str]] = {}
    # `calls` holds every input, so that equal ids are equal objects.
    for name, x, version in calls:
        if times[name] == 1:
            likeness = _likeness(model.get_submodule(name))
            groups.setdefault((name.rpartition(".")[0], id(x), version, likeness), []).append(name)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return [sorted(names, key=order.__getitem__) for names in groups.values() if len(names) > 1]


@contextmanager
def _stand_ins(model: Any, calls: list[tuple[str, Tensor, int]]) -> Iterator[None]:
    """Let maps that could be fused return zeros and note in `calls` what they were handed.

    So no weight is read: following a large model costs a few small calls.
    """
    shared = _shared(model)
    replaced: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedEmbedding):
            # It cannot be read before it is prepared.
            vars(module)["forward"] = _noting(name, module.layout.in_features, [], model.dtype)
        elif _likeness(module) is not None and not shared & {module, *module.parameters()}:
            vars(module)["forward"] = _noting(name, _rows(module), calls)
        else:
            continue
        replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del vars(module)["forward"]


def _noting(
    name: str,
    width: int,
    calls: list[tuple[str, Tensor, int]],
    dtype: torch.dtype | None = None,
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        calls.append((name, x, x._version))
        leading = x.shape if dtype else x.shape[:-1]
        return x.new_zeros((*leading, width), dtype=dtype)

    return forward


def _shared(model: nn.Module) -> set[nn.Module | nn.Parameter]:
    """Return modules and parameters that have more than one place in `model`."""
    modules = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    parameters = Counter(tensor for _, tensor in model.named_parameters(remove_duplicate=False))
    counts = [*modules.items(), *parameters.items()]
    return {thing for thing, count in counts if count > 1}


def _likeness(module: nn.Module) -> Hashable | None:
    """Return what maps must have in common to be joined; None for what cannot be."""
    # One with a forward of its own was wrapped by someone, to bring its weights from elsewhere.
    if "forward" in vars(module):
        return None
    if type(module) is nn.Linear:
        return module.in_features, module.weight.dtype, module.weight.device
    if type(module) is QuantizedLinear and module.packed is not None:
        layout = module.layout
        if not layout.per_tensor:
            return replace(layout, out_features=0, bias=None), module.packed.device
    return None


def _rows(module: Any) -> int:
    facts = module.layout if isinstance(module, QuantizedLinear) else module
    return int(facts.out_features)


def _columns(module: Any) -> int:
    facts = module.layout if isinstance(module, QuantizedLinear) else module
    return int(facts.in_features)


def _concatenated(maps: list[Any]) -> Linear:
    """Return one map with the rows of all `maps`, which are alike."""
    bias = _concatenated_bias(maps)
    rows = sum(_rows(module) for module in maps)
    if isinstance(maps[0], QuantizedLinear):
        name = None if bias is None else str(bias.dtype).removeprefix("torch.")
        packed = QuantizedLinear(replace(maps[0].layout, out_features=rows, bias=name))
        stored = [module.stored() for module in maps]
        packed.packed = torch.cat([codes for codes, _, _ in stored])
        packed.scale = torch.cat([scale for _, scale, _ in stored])
        # Packed zero points of one matrix may end inside a byte.
        bits = packed.layout.bits
        zeros = [unpack_zero_point(zero_point, scale, bits) for _, scale, zero_point in stored]
        if zeros[0] is not None:
            whole = torch.cat([zero for zero in zeros if zero is not None])
            packed.zero_point = pack(whole.flatten(), bits)
        packed.bias = bias
        return packed
    linear = nn.Linear(_columns(maps[0]), rows, bias=bias is not None, device="meta")
    weight = torch.cat([module.weight for module in maps])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _concatenated_bias(maps: list[Any]) -> Tensor | None:
    """Return the biases one after another, zeros where a map has none; None where none has."""
    first = next((module.bias for module in maps if module.bias is not None), None)
    if first is None:
        return None
    return torch.cat(
        [first.new_zeros(_rows(m)) if m.bias is None else m.bias.detach() for m in maps]
    )
