"""The divergence of two next-token distributions, to as many digits as float32 holds."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return terms [N, V] whose sum is KL(p ‖ q), with d = log q - log p, all float32.

    sum p (e^d - 1 - d) equals sum -p d where p and q add up to one. No term is negative, and the
    rounding of the two softmax sums, about 1e-7, cancels: small divergences keep their digits.
    """
    return torch.where(d.abs() < 1, p * (torch.expm1(d) - d), q - p - p * d)
