"""Arithmetic of single facts, by their ids: what a document's own figures and listings come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reports.documents import arithmetic
from reports.documents.evidence import Verdict
from reports.documents.nanogpt_sizes import MIB, SHAKESPEARE_CHAR, sizes
from reports.documents.sums import ADDS_UP, CONTRADICTED


def _prune_size() -> Verdict:
    stored = 100 * arithmetic.bitmap_bits(0.3, 32) / 32
    return Verdict(
        CONTRADICTED,
        "prune.remove leaves zeros in a dense FP32 tensor, which still takes 100 MB; with a bitmap "
        f"that says where they are it takes {stored:.1f} MB.",
    )


def _prune_quant_size() -> Verdict:
    free, bitmap = 32 / (0.7 * 8), 32 / arithmetic.bitmap_bits(0.3, 8)
    return Verdict(
        CONTRADICTED,
        f"{free:.2f}x counts no position of the weights that are left: 32 / (0.7 · 8). A bitmap "
        f"costs 1 bit a weight: 32 / (0.7 · 8 + 1) = {bitmap:.2f}x; stored dense, zeros cost as "
        "much as any value: 32 / 8 = 4.00x.",
    )


def _adaptive() -> Verdict:
    found = arithmetic.adaptive_quantizer([0.02] * 72, [1] * 72)
    changed = sum(width < 32 for width in found.bits)
    return Verdict(
        CONTRADICTED,
        f"Ratios of single layers do not multiply. With 72 equal layers the product reaches "
        f"{found.claimed:g} after {changed} layer, the most sensitive one; the others stay FP32 "
        f"and the model is {found.true:.3f}x smaller.",
    )


def _learnable() -> Verdict:
    points = [place / 997 for place in range(-997, 998)]
    share = arithmetic.slope_in_input(points)
    return Verdict(
        CONTRADICTED,
        f"Rounding is flat almost everywhere: of {len(points)} inputs {100 * share:.0f} % move "
        "the output by a small step, so no gradient reaches the weights without a straight-through "
        "estimator; and nothing is clipped, so num_bits bounds nothing.",
    )


def _search_threshold() -> Verdict:
    low, high = (arithmetic.loss_margin_as_perplexity(value) for value in (5.68, 30.0))
    return Verdict(
        ADDS_UP,
        f"A loss that grows by 3 % is a perplexity that grows by {100 * low:.1f} % at 5.68 and by "
        f"{100 * high:.1f} % at 30: the margin is not one of perplexity.",
    )


def _hardware_aware() -> Verdict:
    return Verdict(
        CONTRADICTED,
        "The entries of intel_cpu and arm_mobile have no key tensor_core_support, which is read "
        "first: the function raises KeyError for both.",
    )


def _nanogpt_original() -> Verdict:
    shape = SHAKESPEARE_CHAR
    found = sizes(shape)
    name, unit, value = arithmetic.nearest_reading(shape, 39.47)
    bare = found.parameters - shape.context * shape.width
    return Verdict(
        CONTRADICTED,
        f"The model has {found.parameters:,} parameters ({bare:,} without position embeddings): "
        f"{found.float32_bytes / MIB:.1f} MiB or {found.float32_bytes / 1e6:.1f} MB in FP32, about "
        f"{found.checkpoint_bytes / MIB:.0f} MiB with the optimizer's state that ckpt.pt holds. "
        f"The nearest reading, {name}, is {value:.2f} {unit}, "
        f"{100 * abs(value / 39.47 - 1):.1f} % off.",
    )


def _nanogpt_quantized() -> Verdict:
    size = sizes(SHAKESPEARE_CHAR).dynamic_bytes
    return Verdict(
        ADDS_UP,
        f"Linears in INT8 and embeddings in FP32 are {size / 1e6:.2f} MB before the overhead of "
        "the file, as printed if MB are decimal; the listing's own unit is MiB, and there it is "
        f"{size / MIB:.2f}. The listing also asks for INT8 embeddings, which quantize_dynamic "
        "refuses.",
    )


def _nanogpt_ratio() -> Verdict:
    found = sizes(SHAKESPEARE_CHAR)
    return Verdict(
        CONTRADICTED,
        f"39.47 / 11.23 = {39.47 / 11.23:.2f}, so the ratio fits the two figures; but the model's "
        f"own FP32 bytes over those with INT8 linears are {found.dynamic_ratio:.2f}x, and over a "
        f"checkpoint with the optimizer's state {found.checkpoint_ratio:.1f}x.",
    )


def _nanogpt_speed() -> Verdict:
    return Verdict(
        ADDS_UP, f"4.56 / 3.12 = {4.56 / 3.12:.2f}, from one run each, with no spread given."
    )


ARITHMETIC: Mapping[str, Callable[[], Verdict]] = {
    "prune-size": _prune_size,
    "prune-quant-size": _prune_quant_size,
    "adaptive-compression": _adaptive,
    "learnable-quantizer": _learnable,
    "search-threshold": _search_threshold,
    "hardware-aware": _hardware_aware,
    "nanogpt-original": _nanogpt_original,
    "nanogpt-quantized": _nanogpt_quantized,
    "nanogpt-ratio": _nanogpt_ratio,
    "nanogpt-speed": _nanogpt_speed,
}
"""Claim -> what can be said of it without a run."""
