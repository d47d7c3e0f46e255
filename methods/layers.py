"""Finding the weight matrices of a causal language model, and putting other modules in their place.

Everything is found by structure, never by a model's name: the decoder blocks are the largest list
of modules of one class; inside them a matrix is an `nn.Linear`, a transposed `Conv1D` (GPT-2), or
a three-dimensional parameter that holds a stack of experts (Mixtral and its kin). Works on meta
tensors, so sizes can be computed for models that are not here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kernels.errors import ConfigError
from methods.base import Matrix, Role


@dataclass(frozen=True)
class Scope:
    """What a method covers beside the matrices of the decoder blocks, and what it must spare.

    `keep` holds patterns as a shell takes them (`*.down_proj`), matched against module names.
    """

    head: bool = False
    embeddings: bool = False
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """The matrices inside a scope; and (name, weights, reason) of every parameter outside it."""

    matrices: list[Matrix]
    left_out: list[tuple[str, int, str]]


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and list of the decoder blocks: the module list with most parameters.

    Raises:
        ConfigError: the model has no list of equal blocks.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            # Outer lists come first, so an equal inner list never takes the place.
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        raise ConfigError(
            f"{type(model).__name__} has no list of equal decoder blocks; "
            "only causal language models built from such blocks can be quantized"
        )
    return best[1], best[2]


def _block_matrices(prefix: str, blocks: nn.ModuleList) -> Iterator[Matrix]:
    for name, module in blocks.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            yield Matrix(name, "block", module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            yield Matrix(name, "block", out_features, in_features)
        else:
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    count, rows, columns = parameter.shape
                    out_in = (columns, rows) if stack_is_transposed(module) else (rows, columns)
                    yield Matrix(f"{name}.{own}", "block", *out_in, count=count)


def stack_is_transposed(module: nn.Module) -> bool:
    """Whether the experts are stored [count, in, out]; transformers marks such modules."""
    return bool(getattr(module, "is_transposed", False))


def _end_matrices(model: Any) -> dict[Role, Matrix]:
    """Return the embedding and the head, where the model has them."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[Role, Matrix] = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, nn.Embedding):
        rows, width = embedding.weight.shape
        found["embedding"] = Matrix(names[id(embedding)], "embedding", rows, width)
    if isinstance(head, nn.Linear):
        found["head"] = Matrix(names[id(head)], "head", head.out_features, head.in_features)
    return found


def end_names(model: Any) -> dict[str, str]:
    """Return {"embedding": module name, "head": module name} of what the model has of them."""
    return {role: matrix.name for role, matrix in _end_matrices(model).items()}


def is_tied(model: Any) -> bool:
    """Whether head and embedding are one and the same parameter."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and embedding.weight is head.weight


def select(model: nn.Module, scope: Scope) -> Selection:
    """Return the matrices of `model` that `scope` covers, in the model's own order.

    Raises:
        ConfigError: a `keep` pattern matches no matrix, or everything is kept.
    """
    prefix, blocks = decoder_blocks(model)
    ends = _end_matrices(model)
    candidates = list(_block_matrices(prefix, blocks))
    wanted = {"head": scope.head, "embedding": scope.embeddings}
    candidates += [matrix for role, matrix in ends.items() if wanted[role]]
    for pattern in scope.keep:
        if not any(fnmatchcase(matrix.name, pattern) for matrix in [*candidates, *ends.values()]):
            raise ConfigError(
                f"keep pattern {pattern!r} matches no matrix of the model; "
                f"names look like {candidates[0].name!r}"
            )
    kept = {m.name for m in candidates for p in scope.keep if fnmatchcase(m.name, p)}
    matrices = [matrix for matrix in candidates if matrix.name not in kept]
    if not matrices:
        raise ConfigError("the keep patterns spare every matrix: nothing is left to quantize")
    left_out = _left_out(model, matrices, kept, ends)
    roles = {matrix.role: matrix for matrix in matrices}
    if "embedding" in roles and "head" not in roles and is_tied(model):
        # One parameter until now: the head is stored apart from here on, and nothing lists it.
        left_out.append(("head", roles["embedding"].weights, "untied from the quantized embedding"))
    return Selection(matrices, left_out)


def select_linears(model: Any, scope: Scope, reason: str) -> Selection:
    """Return what `scope` covers in `model` (may be on meta), stacks of experts left out.

    For methods that act on whole linear maps; `reason` says in the record why stacks are left.

    Raises:
        ConfigError: nothing is left to quantize, or a `keep` pattern matches nothing.
    """
    selection = select(model, scope)
    stacks: dict[str, int] = {}
    for matrix in selection.matrices:
        if matrix.count > 1:
            name = re.sub(r"\.\d+\.", ".*.", matrix.name)
            stacks[name] = stacks.get(name, 0) + matrix.weights
    matrices = [matrix for matrix in selection.matrices if matrix.count == 1]
    if not matrices:
        raise ConfigError(
            f"{type(model).__name__} keeps all matrices in scope as stacks of experts, which this "
            f"method leaves alone ({reason}); use method=rtn"
        )
    left_out = [(name, weights, reason) for name, weights in stacks.items()]
    return Selection(matrices, selection.left_out + left_out)


def _left_out(
    model: nn.Module, matrices: list[Matrix], kept: set[str], ends: dict[Role, Matrix]
) -> list[tuple[str, int, str]]:
    covered = {name for matrix in matrices for name in (matrix.name, f"{matrix.name}.weight")}
    reasons = {f"{name}.weight": "kept by the configuration" for name in kept}
    reasons |= dict.fromkeys(kept, "kept by the configuration")
    for role, matrix in ends.items():
        reasons.setdefault(f"{matrix.name}.weight", f"{role}: outside the default scope")
    grouped: dict[tuple[str, str], int] = {}
    # Tied parameters appear once, under the embedding's name.
    for name, parameter in model.named_parameters():
        if name in covered:
            continue
        reason = reasons.get(name) or (
            "vector" if parameter.ndim < 2 else "not a linear map of a decoder block"
        )
        key = (re.sub(r"\.\d+\.", ".*.", name), reason)
        grouped[key] = grouped.get(key, 0) + parameter.numel()
    return [(name, count, reason) for (name, reason), count in grouped.items()]


def _owner(model: nn.Module, matrix: Matrix) -> tuple[nn.Module, str]:
    parent, _, attribute = matrix.name.rpartition(".")
    return model.get_submodule(parent), attribute


def weight_of(model: nn.Module, matrix: Matrix) -> Tensor:
    """Return the weight as [out, in], or [count, out, in] for a stack of experts (a view)."""
    owner, attribute = _owner(model, matrix)
    target = getattr(owner, attribute)
    if isinstance(target, Tensor):
        return target.detach().transpose(1, 2) if stack_is_transposed(owner) else target.detach()
    weight = cast(Tensor, target.weight).detach()
    return weight.T if isinstance(target, Conv1D) else weight


def bias_of(model: nn.Module, matrix: Matrix) -> Tensor | None:
    """Return the bias [out] of a linear map, or None."""
    owner, attribute = _owner(model, matrix)
    bias = getattr(getattr(owner, attribute), "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def replace(model: nn.Module, matrix: Matrix, module: nn.Module) -> None:
    """Put `module` where `matrix` is; `model` is changed in place.

    A linear map's replacement is called with [..., in] and returns [..., out]. The replacement of a
    stack of experts is indexed: `module[i]` is expert i's weight in the stack's own orientation.
    """
    owner, attribute = _owner(model, matrix)
    if attribute in owner._parameters:
        del owner._parameters[attribute]
    setattr(owner, attribute, module)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ConfigError where `weight` holds NaN or infinity."""
    # The extremes show both in one pass and without a tensor of booleans.
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        broken = int((~torch.isfinite(weight)).sum())
        raise ConfigError(
            f"weight {name} holds {broken} values that are NaN or infinite; "
            "quantizing them would spread them: repair or download the checkpoint again"
        )
