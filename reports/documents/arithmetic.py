"""Sizes and formulas that a claim can be held against without running anything.

Sizes are in bytes; MB is 1,000,000 bytes and MiB 1,048,576.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reports.documents.nanogpt_sizes import MIB, Shape, sizes


def bitmap_bits(zeros: float, bits: float) -> float:
    """Return bits a weight where a bitmap of one bit a weight leaves the share `zeros` out."""
    return 1 + (1 - zeros) * bits


def nanogpt_readings(shape: Shape) -> dict[str, int]:
    """Return what an "original size" of a nanoGPT may count -> bytes in FP32."""
    found = sizes(shape)
    return {
        "all parameters": found.float32_bytes,
        "without position embeddings": found.float32_bytes - 4 * shape.context * shape.width,
        "matrices of the blocks": 4 * found.linear,
        "a checkpoint with AdamW's two moments": found.checkpoint_bytes,
    }


def nearest_reading(shape: Shape, figure: float) -> tuple[str, str, float]:
    """Return (what is counted, unit, value) of the reading that comes nearest to `figure`."""
    found = [
        (name, unit, size / factor)
        for name, size in nanogpt_readings(shape).items()
        for unit, factor in (("MiB", MIB), ("MB", 10**6))
    ]
    return min(found, key=lambda reading: abs(math.log(reading[2] / figure)))


@dataclass(frozen=True)
class Adaptive:
    """Bits by layer of the documents' AdaptiveQuantizer, its claimed and its true compression."""

    bits: tuple[int, ...]
    claimed: float
    true: float


def adaptive_quantizer(
    sensitivities: Sequence[float], weights: Sequence[int], target: float = 4.0
) -> Adaptive:
    """Return the bits and compression that the documents' running product comes to.

    Layers are gone through from the most sensitive; each multiplies the product by 4 (INT8, above
    0.01) or 8 (INT4) until it reaches `target`, and all later ones stay FP32.
    """
    order = sorted(range(len(weights)), key=lambda layer: -sensitivities[layer])
    bits, claimed = [32] * len(weights), 1.0
    for layer in order:
        if claimed >= target:
            continue
        bits[layer] = 8 if sensitivities[layer] > 0.01 else 4
        claimed *= 32 / bits[layer]
    stored = sum(count * width for count, width in zip(weights, bits, strict=True))
    return Adaptive(tuple(bits), claimed, 32 * sum(weights) / stored)


def learnable_quantizer(x: float, alpha: float, beta: float, bits: int = 8) -> float:
    """Return what the documents' LearnableQuantizer makes of `x`: rounded, never clipped."""
    scale = alpha / ((1 << (bits - 1)) - 1)
    rounded: int = round((x - beta) / scale)
    return rounded * scale + beta


def slope_in_input(points: Sequence[float], alpha: float = 1.0, step: float = 1e-7) -> float:
    """Return the share of `points` at which that output moves with its input at all."""
    moved = sum(
        learnable_quantizer(x + step, alpha, 0.0) != learnable_quantizer(x, alpha, 0.0)
        for x in points
    )
    return moved / len(points)


def loss_margin_as_perplexity(perplexity: float, margin: float = 0.03) -> float:
    """Return the relative increase of perplexity at which the loss has grown by `margin`."""
    return math.exp(margin * math.log(perplexity)) - 1
