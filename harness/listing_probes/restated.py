"""What the article's later listings share, restated from its first one in lines of our own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest code."""
    half = 2 ** (bits - 1)
    return (-half, half - 1) if symmetric else (0, 2 * half - 1)


def quantize(values: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, float, int]:
    """Return codes as int8, scale and zero point, as the article computes them."""
    low, high = limits(bits, symmetric)
    smallest, largest = values.min().item(), values.max().item()
    if symmetric:
        scale, zero_point = max(abs(smallest), abs(largest)) / (2 ** (bits - 1) - 1), 0
    else:
        scale = (largest - smallest) / (high - low)
        zero_point = max(low, min(high, low - round(smallest / scale)))
    codes = torch.clamp(torch.round(values / scale + zero_point), low, high)
    return codes.to(torch.int8), scale, zero_point


def dequantize(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return the values that `codes` stand for."""
    return scale * (codes.float() - zero_point)


def pack(codes: Tensor) -> Tensor:
    """Return two 4-bit codes a byte, the first in the high half, as the article packs them."""
    pairs = codes.view(-1, 2)
    return ((pairs[:, 0] << 4) | (pairs[:, 1] & 0xF)).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Return what the article's unpacking makes of `pack`."""
    halves = [(packed >> 4).to(torch.int8), (packed & 0xF).to(torch.int8)]
    signed = [torch.where(half > 7, half - 16, half) for half in halves]
    return torch.stack(signed, dim=1).flatten()


def raised(action: Callable[[], object]) -> str:
    """Return the kind and the first line of the exception that `action` raises, or `nothing`."""
    try:
        action()
    except Exception as error:  # noqa: BLE001  # whatever it raises is what is asked for
        said = str(error).strip().splitlines()
        return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    return "nothing"


def relative_error(values: Tensor, restored: Tensor) -> float:
    """Return the norm of the difference over the norm of `values`."""
    return float(torch.linalg.vector_norm(restored - values) / torch.linalg.vector_norm(values))
