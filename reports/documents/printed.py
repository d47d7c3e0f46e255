"""Printed figures against others that the same document prints, by the id of the fact.

Worked examples are done again from their first figures; a ratio or an increase is held against the
two figures it is of. A figure fits where it is the result, rounded to the digits printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from reports.documents.evidence import Verdict
from reports.documents.facts import Fact
from reports.documents.formats import LAYOUTS
from reports.documents.nanogpt_sizes import Shape, sizes
from reports.documents.sums import (
    ADDS_UP,
    CONTRADICTED,
    PARAMETERS,
    REMARK,
    exact,
    growth,
    quotient,
)

GPT2 = Shape(layers=12, width=768, context=1024, vocabulary=50257, bias=True)
"""GPT-2 small, as `conf/model/gpt2.yaml` and nanoGPT's default name it."""

EXAMPLE = (-2.5, -1.0, 0.0, 1.2, 3.8)
"""The guide's five weights."""

NOT_TIMED = "Both are printed without a spread, and nothing else is known of the runs."

EVERY_MATRIX = "Embeddings, scales, activations and the program itself are not in it."


def symmetric(weights: tuple[float, ...], bits: int = 8) -> tuple[float, tuple[int, ...]]:
    """Return the scale and the codes of weights that share a scale and have no zero point."""
    scale = max(abs(weight) for weight in weights) / (2 ** (bits - 1) - 1)
    return scale, tuple(round(weight / scale) for weight in weights)


def _example() -> dict[str, Callable[[Fact], Verdict]]:
    scale, codes = symmetric(EXAMPLE)
    found: dict[str, Callable[[Fact], Verdict]] = {
        "guide-1-max": exact(3.8, "max(2.5, 1.0, 0.0, 1.2, 3.8) = 3.8"),
        "guide-1-scale": exact(scale, f"3.8 / 127 = {scale:.5f}"),
    }
    for place, (weight, code) in enumerate(zip(EXAMPLE, codes, strict=True), start=1):
        back = code * scale
        found |= {
            f"guide-1-code-{place}": exact(
                code, f"{weight:g} / {scale:.5f} = {weight / scale:.2f}, rounded {code}"
            ),
            f"guide-1-restored-{place}": exact(back, f"{code} · {scale:.5f} = {back:.4f}"),
            f"guide-1-error-{place}": exact(
                back - weight, f"{back:.4f} - {weight:g} = {back - weight:+.4f}"
            ),
        }
    return found


def _dynamic_size(fact: Fact) -> Verdict:
    found = sizes(GPT2)
    whole = PARAMETERS["gpt2"].exact
    return Verdict(
        CONTRADICTED,
        f"quantize_dynamic of {{Linear}} leaves embeddings in FP32 and stores the head, which "
        f"shares their weights, once more in INT8: {found.linear + found.head:,} · 1 + "
        f"{whole - found.linear:,} · 4 = {found.dynamic_bytes / 1e6:.1f} MB. All "
        f"{whole:,} parameters in INT8 would be {whole / 1e6:.1f} MB.",
    )


def _dynamic_ratio(fact: Fact) -> Verdict:
    found = sizes(GPT2)
    return Verdict(
        CONTRADICTED,
        f"497.35 / 126.54 = {497.35 / 126.54:.2f}, so the ratio fits the two figures; but linears "
        f"alone take GPT-2 from {found.float32_bytes / 1e6:.1f} to "
        f"{found.dynamic_bytes / 1e6:.1f} MB, {found.dynamic_ratio:.2f}x, because the embeddings "
        "stay in FP32.",
    )


def _one_card(fact: Fact) -> Verdict:
    size = PARAMETERS["llama-7b"].exact * 4 / 1e9
    return Verdict(
        CONTRADICTED,
        f"{PARAMETERS['llama-7b'].exact:,} · 4 = {size:.2f} GB of weights fit on one A100 of 40 "
        "or 80 GB; they do not fit on a card of 24 GB.",
    )


def _pruned_megabytes(fact: Fact) -> Verdict:
    stored = 100 * (0.7 * 8 + 1) / 32
    return Verdict(
        CONTRADICTED,
        f"100 · 0.7 · 8 / 32 = {100 * 0.7 * 8 / 32:.1f} MB stores no position of the weights that "
        f"are left; with a bitmap it is 100 · (0.7 · 8 + 1) / 32 = {stored:.1f} MB, and dense INT8 "
        "with its zeros 25 MB.",
    )


def _desc_act(fact: Fact) -> Verdict:
    return Verdict(
        REMARK,
        "In GPTQ desc_act (act_order) quantizes the columns in the order of falling activations, "
        "as chapter 27.3.5 says; activations themselves are never quantized by it.",
    )


def fits(parameters: int, bits: float, room: float, card: str) -> Callable[[Fact], Verdict]:
    """Return the check that a model's codes go into `room` GB of a card."""

    def check(fact: Fact) -> Verdict:
        size = parameters * bits / 8 / 1e9
        sum_ = f"{parameters:,} · {bits:g} / 8 = {size:.2f} GB of codes"
        if size < room:
            more = "scales, activations and the cache of keys and values come on top"
            return Verdict(ADDS_UP, f"{sum_} are below the {room:g} GB of {card}; {more}.")
        return Verdict(CONTRADICTED, f"{sum_} are above the {room:g} GB of {card}.")

    return check


def _int4_codes() -> dict[str, Callable[[Fact], Verdict]]:
    """Return the checks of 27.2.1: 0.25 as code 2 makes the scale 0.125 for the others, too."""
    weights, scale = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0), 0.125
    found: dict[str, Callable[[Fact], Verdict]] = {}
    for place, weight in enumerate(weights, start=1):
        code = min(7, round(weight / scale))
        clipped = ", clipped to 7" if code != round(weight / scale) else ""
        written = (
            f"0.25 -> 2 makes the scale 0.125: {weight:g} / 0.125 = {weight / scale:g}{clipped}"
        )
        found[f"chapter-27.2.1-code-{place}"] = exact(code, written)
    return found


def _too_large(fact: Fact) -> Verdict:
    size = PARAMETERS["llama-13b"].exact * 2 / 1e9
    return Verdict(
        ADDS_UP,
        f"{PARAMETERS['llama-13b'].exact:,} · 2 = {size:.2f} GB of weights are above 24 GB.",
    )


def _offloaded(fact: Fact) -> Verdict:
    size = PARAMETERS["llama-2-70b"].exact / 2 / 1e9
    return Verdict(
        REMARK,
        f"{PARAMETERS['llama-2-70b'].exact:,} · 4 / 8 = {size:.2f} GB of codes: at least "
        f"{size - 24:.1f} GB of them are read from the host's memory for every token.",
    )


def _mixed_protocols(fact: Fact) -> Verdict:
    return Verdict(
        REMARK,
        "A figure near llama.cpp's own 5.9601, whose protocol gives the unquantized model 5.9066, "
        "not the 5.68 that heads this table: the row mixes two protocols. Against its own FP16 it "
        f"is {100 * (5.9601 / 5.9066 - 1):+.1f} %, against 5.68 it would be "
        f"{100 * (5.92 / 5.68 - 1):+.1f} %.",
    )


def _small_loss(fact: Fact) -> Verdict:
    return Verdict(
        REMARK,
        f"As printed: AWQ 5.78 / 5.68 - 1 = {100 * (5.78 / 5.68 - 1):+.1f} %, GPTQ 5.85 / 5.68 - 1 "
        f"= {100 * (5.85 / 5.68 - 1):+.1f} %, NF4 6.05 / 5.68 - 1 = "
        f"{100 * (6.05 / 5.68 - 1):+.1f} %.",
    )


def _column(fact: Fact) -> Verdict:
    return Verdict(
        CONTRADICTED,
        "A column of a matrix [outputs, inputs] has one weight an output: 4,096 or 11,008 in "
        "LLaMA-7B, not 128. 128 is the number of columns that GPTQ updates together.",
    )


def _q5_k_m_share(fact: Fact) -> Verdict:
    return Verdict(
        REMARK,
        f"The base type has 5.5 / 16 = {100 * 5.5 / 16:.1f} %, and some matrices are wider; the "
        f"document's own 5.8 bits would be 5.8 / 16 = {100 * 5.8 / 16:.1f} %.",
    )


def _two_cards(fact: Fact) -> Verdict:
    size = PARAMETERS["llama-2-70b"].exact / 2 / 1e9
    return Verdict(
        ADDS_UP,
        f"2 · 24 = 48 GB hold the 40 GB printed and the {PARAMETERS['llama-2-70b'].exact:,} · 4 / "
        f"8 = {size:.2f} GB of codes; whether a run fits also depends on the cache of keys and "
        "values.",
    )


def _ternary(fact: Fact) -> Verdict:
    return Verdict(
        CONTRADICTED,
        f"Three values need log2(3) = {math.log2(3):.3f} bits a weight; one bit has two values.",
    )


def _base(fact: Fact) -> Verdict:
    return Verdict(ADDS_UP, "FP32 over itself: the row that the others are compared with.")


_LARGEST = (2 - 2**-23) * 2.0**127

PRINTED: Mapping[str, Callable[[Fact], Verdict]] = {
    **_example(),
    "guide-core-gpt2-parameters": exact(124.44, "conf/model/gpt2.yaml: 124,439,808 parameters"),
    "guide-1-fp32-range": exact(_LARGEST / 1e38, f"(2 - 2⁻²³) · 2¹²⁷ = {_LARGEST:.4g}"),
    "guide-1-fp32-digits": exact(
        math.floor(24 * math.log10(2)), f"24 bits · log10(2) = {24 * math.log10(2):.2f} decimals"
    ),
    "guide-3-quantized": _dynamic_size,
    "guide-3-ratio": _dynamic_ratio,
    "guide-3-speed-up": quotient(45.23, 28.67, NOT_TIMED),
    "guide-4-gptq-int8-ratio": quotient(13.5, 7),
    "guide-4-gptq-int4-ratio": quotient(13.5, 3.9),
    "guide-4-gptq-int8-increase": growth(5.72, 5.68),
    "guide-4-gptq-int4-increase": growth(5.85, 5.68),
    "guide-4-gptq-int8-speed-up": quotient(45, 28, NOT_TIMED),
    "guide-4-gptq-int4-speed-up": quotient(62, 28, NOT_TIMED),
    "guide-4-desc-act": _desc_act,
    "guide-4-bnb-fp32-one-gpu": _one_card,
    "guide-4-bnb-int4-3090": fits(PARAMETERS["llama-7b"].exact, 4, 24, "an RTX 3090"),
    "prune-quant-megabytes": _pruned_megabytes,
    "chapter-27.1.1-parameters": exact(
        PARAMETERS["llama-7b"].exact / 1e9, "conf/model/llama-7b.yaml: 6,738,415,616 parameters"
    ),
    "chapter-4090-13b": _too_large,
    "chapter-4090-70b": _offloaded,
    "chapter-27.1.3-digits": exact(
        math.floor(24 * math.log10(2)), f"24 bits · log10(2) = {24 * math.log10(2):.2f} decimals"
    ),
    **_int4_codes(),
    "chapter-27.2.1-int4-values": exact(2**4, "2^4 = 16"),
    "chapter-27.2.1-fp16-values": exact(
        2**16, "2^16 = 65,536 patterns", "2,048 of them are infinities and NaN."
    ),
    "chapter-27.2.2-scale": exact(
        2 / 255,
        f"2.0 / 255 = {2 / 255:.6f}",
        "With a zero point of 0 the largest weight is 1.0 / 0.007843 = 127.5, which rounds to a "
        "code that INT8 does not have.",
    ),
    "chapter-27.2.2-code": exact(round(0.5 / 0.00784), f"0.5 / 0.00784 = {0.5 / 0.00784:.2f}"),
    "chapter-27.2.2-restored": exact(
        64 * 0.00784, f"64 · 0.00784 = {64 * 0.00784:.5f}; with 2 / 255 {64 * 2 / 255:.5f}"
    ),
    "chapter-27.3.3-128": _column,
    "gguf-q4-0-group": exact(LAYOUTS["q4_0"].weights, LAYOUTS["q4_0"].sum),
    "gguf-q4-0-block": exact(8 * LAYOUTS["q4_0"].bytes, "32 · 4 + 16 = 144 bits"),
    "gguf-q5-k-m-share": _q5_k_m_share,
    "intro-2-spices": exact(2**4, "2^4 = 16"),
    "intro-70b-cards": _two_cards,
    "intro-4-bitnet": _ternary,
    "article-4.2-fp32-compression": _base,
    "article-4.2-fp32-speed": _base,
    "article-4.2-fp32-accuracy": _base,
    "article-4.2-fp32-memory": _base,
    "article-4.2-dynamic-memory": exact(100 * 8 / 32, "8 / 32 = 25 % of codes", EVERY_MATRIX),
    "article-4.2-static-memory": exact(100 * 8 / 32, "8 / 32 = 25 % of codes", EVERY_MATRIX),
    "article-4.2-int4-memory": exact(100 * 4 / 32, "4 / 32 = 12.5 % of codes", EVERY_MATRIX),
    "wikitext2-gguf": _mixed_protocols,
    "wikitext2-small-loss": _small_loss,
}
"""Fact -> its check."""
