"""Arithmetic that any figure of a kind can be held against: bits of a format, bytes of a model.

A size cannot be smaller than the codes of its weights; a compression is a quotient of bits; a
quotient of two printed figures is what it is. Parameters are those of the architectures, as
`conf/model/*.yaml` state them and as building them without weights counts them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reports.documents.evidence import Verdict
from reports.documents.fact_rows import shown
from reports.documents.facts import SIZE, UNITS, Fact
from reports.documents.formats import layout_of

CONTRADICTED = "contradicted by arithmetic"
ADDS_UP = "adds up"
REMARK = ""
"""The verdict of arithmetic that only adds to what is said of a fact."""

GROUP, SCALE_BITS = 128, 16
"""The groups that the documents name, and the bits of the scale of one."""

_BINARY = {"GB": 2**30, "MB": 2**20}


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, and how many billions its name says (None: not its own)."""

    exact: int
    billions: float | None


PARAMETERS: Mapping[str, Parameters] = {
    "llama-7b": Parameters(6_738_415_616, 7),
    "llama-13b": Parameters(13_015_864_320, 13),
    "llama-2-70b": Parameters(68_976_648_192, 70),
    "mixtral-8x7b": Parameters(46_702_792_704, None),
    "gpt2": Parameters(124_439_808, None),
}
"""By the names of conf/model."""

_NAMES = {"gpt-2": "gpt2", "llama-70b": "llama-2-70b", "70b": "llama-2-70b", "7b": "llama-7b"}


def model_of(fact: Fact) -> str | None:
    """Return the name in `PARAMETERS` of the fact's model, None where there is none."""
    named = str(fact.ours.where.get("model", "")) if fact.ours else ""
    named = named or (fact.model or "").lower().partition(" ")[0]
    found = _NAMES.get(named, named)
    return found if found in PARAMETERS else None


def bits_of(fact: Fact) -> float | None:
    """Return the bits of a code of the fact's method, None where it names none."""
    given = fact.ours.where.get("bits") if fact.ours else None
    if isinstance(given, int | float):
        return float(given)
    found = re.search(r"(?:INT|FP|NF|BF)(\d+)|\b(\d+)[- ]bit", fact.method or "", re.IGNORECASE)
    return float(found[1] or found[2]) if found else None


def bits_a_weight(fact: Fact) -> Verdict | None:
    """Return what the layout of a block says of a GGUF type's bits a weight."""
    found = re.fullmatch(r"(\S+) bits a weight", fact.quantity or "")
    layout = layout_of(found[1]) if found else None
    if layout is None or fact.value is None:
        return None
    block, mixed = layout
    printed = f"{'about ' if fact.relation == '~' else ''}{fact.value:.1f}"
    if abs(block.bits - fact.value) < 0.05:
        more = "; a file mixes in wider types, so it has more" if mixed else ""
        return Verdict(ADDS_UP, f"{block.sum}{more}.")
    if block.bits > fact.value:
        least = "at least " if mixed else ""
        return Verdict(CONTRADICTED, f"{block.sum}, so {least}{block.bits:g}, not {printed}.")
    if not mixed:
        return Verdict(CONTRADICTED, f"{block.sum}, not {printed}.")
    return Verdict(
        REMARK,
        f"{block.sum} in the base type; how many matrices are wider depends on the model, so "
        "layouts alone do not decide.",
    )


def bytes_of_codes(fact: Fact) -> Verdict | None:
    """Return what the codes of a model's weights alone say of a printed size."""
    model, bits, unit = model_of(fact), bits_of(fact), fact.unit or ""
    if model is None or bits is None or fact.value is None or unit not in _BINARY:
        return None
    if fact.relation in "<>":
        return None
    found = PARAMETERS[model]
    least, printed = found.exact * bits / 8, fact.value * UNITS[unit][1]
    alone = f"{found.exact:,} · {bits:g} / 8 = {least / UNITS[unit][1]:.4g} {unit}"
    if fact.value * _BINARY[unit] < least * (1 - SIZE):
        return Verdict(
            CONTRADICTED,
            f"The codes of its weights alone are {alone}, without any scale: "
            f"{shown(fact.value, unit)} cannot hold them, in GiB no more than in GB.",
        )
    if found.billions is not None:
        nominal = found.billions * 1e9 * bits / 8
        if abs(nominal / printed - 1) < SIZE:
            return Verdict(
                ADDS_UP,
                f"{found.billions:g} · 10⁹ · {bits:g} / 8 = {nominal / UNITS[unit][1]:.4g} {unit}; "
                f"with its exact parameters {alone}{_scales(bits)}.",
            )
    if abs(least / printed - 1) < 0.005:
        return Verdict(ADDS_UP, f"{alone}{_scales(bits)}.")
    binary = f"{least / _BINARY[unit]:.4g} {unit[0]}iB"
    return Verdict(REMARK, f"The codes of its weights alone: {alone}, or {binary}{_scales(bits)}.")


def compression(fact: Fact) -> Verdict | None:
    """Return what the quotient of two widths says of a printed compression."""
    bits, base = bits_of(fact), re.search(r"ratio to FP(\d+)", fact.unit or "")
    if bits is None or base is None or fact.value is None or "compress" not in (fact.metric or ""):
        return None
    wide = float(base[1])
    plain = wide / bits
    if abs(plain - fact.value) > max(0.05, SIZE * plain):
        return None
    why = f"{wide:g} / {bits:g} = {plain:.2f}"
    if bits < 8:
        held = wide / (bits + SCALE_BITS / GROUP)
        why += (
            f" counts codes alone. With a {SCALE_BITS}-bit scale for {GROUP} weights it is "
            f"{wide:g} / ({bits:g} + {SCALE_BITS} / {GROUP}) = {held:.2f}x in the matrices, and "
            "less in the model, whose embeddings and head stay wide"
        )
    return Verdict(ADDS_UP, f"{why}.")


def range_of_codes(fact: Fact) -> Verdict | None:
    """Return what a width says of a printed range of codes."""
    bits = bits_of(fact)
    if fact.metric != "range" or fact.to is None or bits is None or not bits < 16:
        return None
    low, high = -(2 ** int(bits - 1)), 2 ** int(bits - 1) - 1
    fits = (fact.value, fact.to) == (low, high)
    power = f"2^{bits - 1:g}"
    why = f"{bits:g} bits in two's complement: -{power} to {power} - 1 = {low} to {high}"
    if bits == 2:
        why += "; a symmetric scale uses three of the four codes, -1, 0 and 1, or lets -2 clip"
    return Verdict(ADDS_UP if fits else CONTRADICTED, f"{why}.")


def _scales(bits: float) -> str:
    return ", scales not counted" if bits < 16 else ""


def quotient(over: float, under: float, what: str = "") -> Callable[[Fact], Verdict]:
    """Return the check of a printed ratio against the two printed figures it is of."""

    def check(fact: Fact) -> Verdict:
        return _held(fact, over / under, f"{over:g} / {under:g} = {over / under:.3g}", what)

    return check


def growth(value: float, base: float, what: str = "") -> Callable[[Fact], Verdict]:
    """Return the check of a printed increase in percent against its two printed figures."""

    def check(fact: Fact) -> Verdict:
        found = 100 * (value / base - 1)
        return _held(fact, found, f"{value:g} / {base:g} - 1 = {found:+.2f} %", what)

    return check


def exact(value: float, written: str, what: str = "") -> Callable[[Fact], Verdict]:
    """Return the check of a printed figure against `value`, whose sum is `written` out."""

    def check(fact: Fact) -> Verdict:
        return _held(fact, value, written, what)

    return check


def _held(fact: Fact, found: float, written: str, what: str) -> Verdict:
    """Return that the figure is the printed one to its last digit, or that it is not."""
    printed = fact.value or 0.0
    _, _, decimals = f"{printed:.10g}".partition(".")
    fits = abs(found - printed) <= 0.5 * 10 ** -len(decimals) * (1 + 1e-9)
    more = f" {what}" if what else ""
    if fits:
        return Verdict(ADDS_UP, f"{written}.{more}")
    return Verdict(CONTRADICTED, f"{written}, not {shown(printed, fact.unit)}.{more}")


RULES: tuple[Callable[[Fact], Verdict | None], ...] = (
    bits_a_weight,
    bytes_of_codes,
    compression,
    range_of_codes,
)
"""What is tried on every fact; the first that has something to say is told."""
