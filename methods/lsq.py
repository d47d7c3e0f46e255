"""Learned step sizes: the scale of each group is trained with the weights.

Esser et al. 2020 (arXiv 1902.08153). With Qn = 2**(bits - 1), Qp = 2**(bits - 1) - 1:

    rounded = round(clip(w / s, -Qn, Qp)) * s                                        (eq. 1 and 2)
    d rounded / d s = -w / s + round(w / s) inside the clipping range, -Qn below, Qp above   (eq. 3)
    d rounded / d w = 1 inside, 0 outside                                                    (eq. 5)

s begins at 2 mean|w| / sqrt(Qp), and its gradient is multiplied by 1 / sqrt(N Qp) with N the
weights that share it (section 2.2). The paper has one step a layer; here one a group or channel.

Two things differ from the paper. AdamW divides a gradient by its own size, so the factor 1 /
sqrt(N Qp) moves nothing but the share a step has in the clipping of gradients; what is trained is
therefore s over its first value, so that a learning rate means the same share of every step. And
the forward pass computes with s rounded to the type it is stored in, so that the artefact is the
trained model.

A quantizer shown in tutorials has alpha and beta as parameters, computes scale = alpha / Qp and
torch.round((w - beta) / scale) * scale + beta, and has no straight-through estimator and no limits.
The derivative of torch.round is zero: the weights learn nothing, alpha and beta only through their
outer places, as if no code moved with them, and no code is kept within the bits
(`tests/methods/test_lsq.py` shows each).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.affine import SCALE_DTYPES, Affine, Quantized
from methods.base import Matrix
from methods.layers import check_finite, weight_of
from methods.quantization_aware import QuantizationAware
from methods.straight_through import WeightRounding, straight_through


class _LearnedStep(torch.autograd.Function):
    """Equations 1, 2, 3 and 5: see `learned_step`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
        ratio = weight / step
        codes = ratio.round().clamp(lowest, highest)
        ctx.save_for_backward(ratio, codes)
        ctx.limits = (lowest, highest)
        return codes * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ratio, codes = ctx.saved_tensors
        lowest, highest = ctx.limits
        (gradient,) = gradients
        inside = (ratio > lowest) & (ratio < highest)
        of_step = torch.where(inside, codes - ratio, codes)
        scale = 1 / math.sqrt(ratio.shape[-1] * highest)
        summed = (gradient * of_step).sum(-1, keepdim=True) * scale
        return gradient * inside, summed, None, None


def learned_step(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return float32 `weight` [..., size] rounded to whole multiples of `step` [..., 1], above 0.

    The gradient of `step` is that of the paper, the factor 1 / sqrt(size * Qp) included.
    """
    half = 2 ** (bits - 1)
    result: Tensor = _LearnedStep.apply(weight, step, -half, half - 1)  # type: ignore[no-untyped-call]
    return result


def first_steps(groups: Tensor, bits: int) -> Tensor:
    """Return 2 mean|w| / sqrt(Qp) of float32 groups [..., size], as [..., 1]; 1 for zeros."""
    mean = groups.abs().mean(-1, keepdim=True)
    found = 2 * mean / math.sqrt(2 ** (bits - 1) - 1)
    return torch.where(found == 0, torch.ones_like(found), found)


class LearnedSteps:
    """The steps of all `matrices` of `model`: a parameter each, of their ratio to the first."""

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix], affine: Affine) -> None:
        self._affine = affine
        limits = torch.finfo(SCALE_DTYPES[affine.scale_dtype])
        self._least, self._most = limits.smallest_normal, limits.max
        self._first: dict[str, Tensor] = {}
        self._ratios: dict[str, nn.Parameter] = {}
        for matrix in matrices:
            weight = weight_of(model, matrix)
            check_finite(matrix.name, weight)
            first = first_steps(self._groups(weight), affine.bits)
            self._first[matrix.name] = first
            # One axis, so that it is no matrix and does not decay.
            self._ratios[matrix.name] = nn.Parameter(torch.ones(first.numel()))

    def _groups(self, weight: Tensor) -> Tensor:
        """Return [..., out, in] as [..., out, groups, size], the last group filled by zeros."""
        width = weight.shape[-1]
        padded = functional.pad(weight, (0, self._affine.padded(width) - width))
        return padded.reshape(*weight.shape[:-1], self._affine.groups(width), -1)

    def step(self, matrix: Matrix) -> Tensor:
        """Return the steps of `matrix` as they are stored, float32 [..., out, groups, 1]."""
        first = self._first[matrix.name]
        step = self._ratios[matrix.name].view_as(first) * first
        now = step.detach().clamp(self._least, self._most)
        return straight_through(step, now.to(SCALE_DTYPES[self._affine.scale_dtype]).float())

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the ratios of all steps to their first values, float32 [steps]."""
        return {f"{name}.step": ratio for name, ratio in self._ratios.items()}

    def rounded(self, matrix: Matrix, weight: Tensor) -> Tensor:
        """Return `weight` in whole steps."""
        groups = learned_step(self._groups(weight), self.step(matrix), self._affine.bits)
        return groups.flatten(-2)[..., : weight.shape[-1]]

    def stored(self, matrix: Matrix, weight: Tensor) -> Quantized:
        """Return codes and steps of `weight`."""
        bits, half = self._affine.bits, 2 ** (self._affine.bits - 1)
        step = self.step(matrix).detach()
        codes = (self._groups(weight.detach()) / step).round().clamp(-half, half - 1) + half
        return Quantized(
            codes=codes.to(torch.uint8).flatten(-2),
            scale=step.squeeze(-1).to(SCALE_DTYPES[self._affine.scale_dtype]),
            zero_point=None,
            bits=bits,
            columns=weight.shape[-1],
            subnormal_scales=0,
        )


@dataclass(frozen=True)
class LSQ(QuantizationAware):
    """Training with learned step sizes; weights have no zero points."""

    kind: ClassVar[str] = "lsq"

    @property
    def stored_symmetric(self) -> bool:
        """Always."""
        return True

    def rounding(self, model: nn.Module, matrices: list[Matrix]) -> WeightRounding:
        """Return steps of the weights as they are now."""
        return LearnedSteps(model, matrices, self.format.affine)
