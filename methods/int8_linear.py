"""What the two INT8 methods share: the linear maps they cover.

Both run integer kernels over whole linear maps. No such kernel takes one expert out of a stack, so
experts stored as three-dimensional parameters are left out, and the record says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.artefact import checkpoint_dtype
from methods.base import Matrix
from methods.layers import Scope, Selection, bias_of, is_tied, select

DEQUANTIZED = "to(float64) + torch.matmul"
"""What multiplies where the integer kernel does not: the same rounded values, summed exactly, as
32-bit integers are. In float32 a last bit would tip the next layer's rounding now and then."""

PATH_TOLERANCE = 0.2
"""Largest difference between the logits of the integer kernels and of the dequantized weights, for
`methods.packed.compare_paths`. It is none at all where a kernel scales its sums in the order
assumed here (x86 with VNNI: fbgemm and oneDNN alike). Elsewhere a last bit tips a rounding of
activations now and then, and each tip costs a whole step of 8 bits: in a small model up to 0.06 in
prefill and 0.11 in decode. A wrong layout or zero point gives 1 and more."""

STACKED_EXPERTS = "stack of experts: the INT8 kernels take whole linear maps"


def select_linears(model: Any, scope: Scope) -> Selection:
    """Return what `scope` covers in `model` (may be on meta), stacks of experts left out.

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
            f"{type(model).__name__} keeps all matrices in scope as stacks of experts, "
            "for which INT8 has no kernel; use method=rtn"
        )
    left_out = [(name, weights, STACKED_EXPERTS) for name, weights in stacks.items()]
    return Selection(matrices, selection.left_out + left_out)


def untie(model: Any, scope: Scope) -> list[str]:
    """Where head and embedding are one matrix that `scope` takes apart, say so and store both.

    `model.config` is changed, so that the artefact does not tie them again.
    """
    if not is_tied(model) or not (scope.head or scope.embeddings):
        return []
    model.config.tie_word_embeddings = False
    kinds = ["INT8" if inside else "float" for inside in (scope.head, scope.embeddings)]
    return [
        "head and embedding were one parameter and are now stored apart: "
        f"the head in {kinds[0]}, the embedding in {kinds[1]}"
    ]


def stored_bias(model: nn.Module, matrix: Matrix) -> Tensor | None:
    """Return the bias [out] of a linear map in the checkpoint's own floating type, or None."""
    bias = None if matrix.role == "embedding" else bias_of(model, matrix)
    return None if bias is None else bias.to(checkpoint_dtype(model))


def dtype_name(tensor: Tensor | None) -> str | None:
    """Return `float16` for a float16 tensor, and so on; None for None."""
    return None if tensor is None else str(tensor.dtype).removeprefix("torch.")


def names(keep: object) -> tuple[str, ...]:
    """Return the patterns of option `keep` as a tuple; raise ConfigError where they are no list."""
    if isinstance(keep, str) or not isinstance(keep, Sequence):
        raise ConfigError(f"method.keep is {keep!r}; it must be a list, like ['*.down_proj']")
    return tuple(keep)


def require_flags(owner: str, flags: dict[str, object]) -> None:
    """Raise ConfigError for the first of `flags` that is not true or false."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"method.{name} of {owner} is {value!r}; it must be true or false")
