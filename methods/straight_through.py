"""A model that computes with rounded weights and is trained through the rounding.

The straight-through estimator is Bengio et al. 2013 (arXiv 1308.3432): the forward pass rounds, the
backward pass takes the rounding for the identity (and for a constant outside a clipping range).

What the forward pass computes with is what an artefact stores: weights go through the arithmetic of
`methods.affine` itself, scales rounded to their stored type included; every other parameter through
the type of the checkpoint, in which it is stored; tokens through that of
`methods.rounded_activations`. The parameters themselves stay float32, so that steps smaller than a
level add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from methods.affine import Affine, Quantized, fake_quantize, quantize
from methods.base import Matrix
from methods.layers import stack_is_transposed, weight_of
from methods.rounded_activations import round_tokens


class _StraightThrough(torch.autograd.Function):
    """Takes the place of its second argument; see `straight_through`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return (gradients[0] if inside is None else gradients[0] * inside), None, None


def straight_through(value: Tensor, rounded: Tensor, inside: Tensor | None = None) -> Tensor:
    """Return `rounded`, bit for bit, with the gradient of `value`, both of one shape.

    The gradient is zero where `inside`, bool of the same shape, is false.
    """
    result: Tensor = _StraightThrough.apply(value, rounded, inside)  # type: ignore[no-untyped-call]
    return result


class WeightRounding(Protocol):
    """How the weights of a model are rounded while it is trained, and stored at the end."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what is trained beside the model's own parameters, by a name of its own."""
        ...

    def rounded(self, matrix: Matrix, weight: Tensor) -> Tensor:
        """Return `weight`, float32 [..., out, in], as it is stored, with a gradient."""
        ...

    def stored(self, matrix: Matrix, weight: Tensor) -> Quantized:
        """Return codes and scales of what `rounded` returned."""
        ...


class NearestLevels:
    """Round-to-nearest with the range of the weights as they are now (`methods.affine`).

    The range always holds every weight, so nothing is clipped and the gradient is the identity.
    """

    def __init__(self, affine: Affine) -> None:
        self.affine = affine

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Nothing is learned beside the weights."""
        return {}

    def rounded(self, matrix: Matrix, weight: Tensor) -> Tensor:
        """Return the dequantized codes of `weight`."""
        now = weight.detach()
        return straight_through(weight, fake_quantize(matrix.name, now, self.affine))

    def stored(self, matrix: Matrix, weight: Tensor) -> Quantized:
        """Return the codes of `weight`."""
        return quantize(matrix.name, weight.detach(), self.affine)


class NotRounded(NearestLevels):
    """Training as if nothing were rounded, and rounding at the end: what the text alone gives."""

    def rounded(self, matrix: Matrix, weight: Tensor) -> Tensor:
        """Return `weight` itself."""
        return weight


class RoundedModel:
    """`model` (float32, in eval mode) as its artefact will be: what is trained, and how it answers.

    `matrices` are those that are stored rounded, `dtype` is what all other parameters are stored
    in. `tokens` rounds the inputs of linear maps to INT8, token by token. `model` keeps its float32
    parameters, which are trained in place.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Sequence[Matrix],
        rounding: WeightRounding,
        dtype: torch.dtype,
        tokens: bool,
    ) -> None:
        self.model = model
        self.matrices = {parameter_name(model, matrix): matrix for matrix in matrices}
        self.rounding = rounding
        self.dtype = dtype
        self.tokens = tokens

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return everything that is trained, by name; tied parameters once."""
        return {**dict(self.model.named_parameters()), **self.rounding.parameters()}

    def rounded(self) -> dict[str, Tensor]:
        """Return the model's parameters as they are stored, with gradients, by name."""
        found = {}
        for name, parameter in self.model.named_parameters():
            matrix = self.matrices.get(name)
            if matrix is None:
                stored = parameter.detach().to(self.dtype).float()
                found[name] = straight_through(parameter, stored)
            elif is_transposed(self.model, matrix):
                rounded = self.rounding.rounded(matrix, parameter.transpose(-1, -2))
                found[name] = rounded.transpose(-1, -2)
            else:
                found[name] = self.rounding.rounded(matrix, parameter)
        return found

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits [B, T, V] of int64 `ids` [B, T]."""
        with rounded_tokens(self.model, self.matrices.values() if self.tokens else ()):
            call = {"input_ids": ids, "use_cache": False}
            output = functional_call(self.model, self.rounded(), kwargs=call)
        logits: Tensor = output.logits
        return logits

    def stored(self, matrix: Matrix) -> Quantized:
        """Return codes and scales of `matrix` as it is now."""
        return self.rounding.stored(matrix, weight_of(self.model, matrix))


def parameter_name(model: nn.Module, matrix: Matrix) -> str:
    """Return the name under which `model` lists the weight of `matrix`."""
    parent, _, attribute = matrix.name.rpartition(".")
    target = getattr(model.get_submodule(parent), attribute)
    return matrix.name if isinstance(target, Tensor) else f"{matrix.name}.weight"


def is_transposed(model: nn.Module, matrix: Matrix) -> bool:
    """Whether the parameter of `matrix` is [..., in, out] (GPT-2, some stacks of experts)."""
    parent, _, attribute = matrix.name.rpartition(".")
    owner = model.get_submodule(parent)
    target = getattr(owner, attribute)
    return stack_is_transposed(owner) if isinstance(target, Tensor) else isinstance(target, Conv1D)


@contextmanager
def rounded_tokens(model: nn.Module, matrices: Iterable[Matrix]) -> Iterator[None]:
    """Let the linear maps among `matrices` read INT8 tokens, dequantized, with a gradient."""

    def round_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        return (straight_through(x, round_tokens(x.detach()).to(x.dtype)), *inputs[1:])

    maps = [m for m in matrices if m.count == 1 and m.role != "embedding"]
    handles = [model.get_submodule(m.name).register_forward_pre_hook(round_input) for m in maps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
