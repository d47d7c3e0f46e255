"""What a sensitivity analysis found: each matrix quantized alone, per scheme, as one block.

From `details["sensitivity"]` of records of job `sensitivity`: a mapping for one scheme, or a list
of them. Records of one model, hardware and text are joined, each scheme with a map of its own.
KL is in nats a token, from the unquantized model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.record import Record
from reports import words
from reports.blocks import Block, Field, Grid, Head, Map, Spot, number, plain, share
from reports.rows import mapping, sequence
from reports.rows import number as figure

OUTSIDE = "no block"
MOST_NAMED = 5


@dataclass(frozen=True)
class Module:
    """One matrix, quantized alone: KL in nats a token with its standard error, change of loss."""

    name: str
    block: int | None
    kind: str
    weights: int
    bits: float | None
    kl: float
    stderr: float | None
    loss: float | None


@dataclass(frozen=True)
class Analysis:
    """All matrices under one scheme, and the figures of the whole."""

    scheme: str
    text: str
    tokens: int
    modules: tuple[Module, ...]
    facts: Mapping[str, Any]

    @property
    def total(self) -> float:
        """Sum of the matrices' KL."""
        stated = figure(self.facts.get("sum_kl"))
        return sum(module.kl for module in self.modules) if stated is None else stated

    @property
    def floor(self) -> float:
        """KL of the reference against itself."""
        return figure(self.facts.get("noise_floor_kl")) or 0.0

    @property
    def ordered(self) -> list[Module]:
        """The matrices, the most sensitive first."""
        return sorted(self.modules, key=lambda module: (-module.kl, words.natural(module.name)))


def analyses(record: Record) -> list[Analysis]:
    """Return what `record` holds, one for each scheme."""
    found = record.details.get("sensitivity")
    entries = sequence(found) if isinstance(found, list | tuple) else [found]
    made = []
    for facts in map(mapping, entries):
        modules = tuple(m for m in map(_module, sequence(facts.get("modules"))) if m is not None)
        if modules:
            tokens = int(figure(facts.get("tokens")) or 0)
            text = str(facts.get("text") or "")
            made.append(Analysis(str(facts.get("scheme", "")), text, tokens, modules, facts))
    return made


def sensitivity_blocks(records: Iterable[Record]) -> list[Block]:
    """Return a block for each model, hardware and text that was analysed."""
    joined: dict[tuple[str, str, str, int], list[Analysis]] = defaultdict(list)
    for record in records:
        for found in analyses(record):
            model, hardware = (str(record.config.get(k, "")) for k in ("model", "hardware"))
            joined[model, hardware, found.text, found.tokens].append(found)
    return [_block(*key, found) for key, found in joined.items()]


def sensitivity_text(record: Record) -> str:
    """Return the analyses of `record` for a terminal, empty where it has none."""
    lines = []
    model = str(record.config.get("model", ""))
    for found in analyses(record):
        lines.append(
            words.one_line(
                f"sensitivity of {model} to {found.scheme}: KL of each matrix quantized alone, "
                f"{found.tokens:,} tokens of {found.text or 'the text'}"
            )
        )
        width = max(len(module.name) for module in found.ordered[:MOST_NAMED])
        lines += [
            f"  {words.one_line(module.name):<{width}}  {words.significant(module.kl):>9}"
            f"  {100 * _part(module.kl, found.total):5.1f} % of the sum"
            for module in found.ordered[:MOST_NAMED]
        ]
        lines.append("  " + "; ".join([_whole(found), *_prediction(found), *_cost(found)]))
    return "\n".join(lines)


def edges(found: Analysis) -> tuple[float, float, float] | None:
    """Return the shares of the first and last block in the summed KL, and an even share.

    None where the analysis covers fewer than three blocks.
    """
    blocks = sorted({module.block for module in found.modules if module.block is not None})
    inside = [module for module in found.modules if module.block is not None]
    total = sum(module.kl for module in inside)
    if len(blocks) < 3 or total <= 0:
        return None
    first, last = (
        sum(module.kl for module in inside if module.block == edge) / total
        for edge in (blocks[0], blocks[-1])
    )
    return first, last, 1 / len(blocks)


def _module(entry: Any) -> Module | None:
    facts = mapping(entry)
    kl, block = figure(facts.get("kl")), figure(facts.get("block"))
    if kl is None:
        return None
    return Module(
        str(facts.get("name", "")),
        None if block is None else int(block),
        str(facts.get("module") or facts.get("name", "")),
        int(figure(facts.get("weights")) or 0),
        figure(facts.get("bits_per_weight")),
        kl,
        figure(facts.get("kl_stderr")),
        figure(facts.get("loss")),
    )


def _block(model: str, hardware: str, text: str, tokens: int, found: Sequence[Analysis]) -> Block:
    sentences = [sentence for analysis in found for sentence in _sentences(analysis)]
    grids = (_summary(found), *(_table(analysis) for analysis in found))
    return Block(
        f"Sensitivity of {model} on {hardware}",
        (
            f"Each matrix was quantized alone, all others as they were, on {tokens:,} scored "
            f"tokens of {text or 'the calibration text'}.",
            *sentences,
        ),
        tuple(_map(analysis, model) for analysis in found),
        grids,
        "KL in nats a token from the unquantized model. Sum: of the KL of all matrices, which "
        "predicts the KL of quantizing all as far as their errors do not meet. Prefixes: what "
        "stands before the quantized matrix is computed once and kept.",
    )


def _sentences(found: Analysis) -> list[str]:
    top = found.ordered[:3]
    named = words.listed(
        [
            f"{module.name} ({words.significant(module.kl)}, "
            f"{100 * _part(module.kl, found.total):.0f} %)"
            for module in top
        ]
    )
    sentences = [
        f"{found.scheme}: most sensitive are {named} of the sum. {_whole(found).capitalize()}."
    ]
    quiet = sum(module.kl <= found.floor for module in found.modules)
    if quiet:
        sentences.append(
            f"{found.scheme}: the KL of {words.count(quiet, 'matrix', 'matrices')} is not above "
            "the noise floor."
        )
    shares = edges(found)
    if shares is not None:
        first, last, even = (f"{100 * part:.0f} %" for part in shares)
        sentences.append(
            f"{found.scheme}: the first block holds {first} of the blocks' summed KL and the last "
            f"{last}; an even share would be {even}."
        )
    return [*sentences, *(f"{found.scheme}: {said}." for said in _prediction(found))]


def _whole(found: Analysis) -> str:
    together = figure(found.facts.get("all_kl"))
    text = f"sum {words.significant(found.total)}"
    if together is not None:
        text += f", all quantized at once {words.significant(together)}"
    return f"{text}, noise floor {words.significant(found.floor)}"


def _prediction(found: Analysis) -> list[str]:
    facts = mapping(found.facts.get("prediction"))
    correlation = figure(facts.get("rank_correlation"))
    if correlation is None:
        return []
    mixes = int(figure(facts.get("mixes")) or 0)
    return [f"rank correlation of predicted and measured KL {correlation:.2f} over {mixes} mixes"]


def _cost(found: Analysis) -> list[str]:
    cost = mapping(found.facts.get("cost"))
    made, whole = (
        figure(cost.get(name)) for name in ("block_forwards", "block_forwards_without_prefixes")
    )
    if not made or not whole:
        return []
    seconds = figure(cost.get("seconds"))
    text = f"{made:,.0f} block forwards ({whole:,.0f} without kept prefixes)"
    return [text + (f", {seconds:,.0f} s" if seconds is not None else "")]


def _summary(found: Sequence[Analysis]) -> Grid:
    heads = (
        *(Head("Scheme"), Head("Sum of KL", "nats", True), Head("All at once", "nats", True)),
        *(Head("Noise floor", "nats", True), Head("Rank correlation", numeric=True)),
        *(Head("Candidates", numeric=True), Head("Block forwards", numeric=True)),
        *(Head("without prefixes", numeric=True), Head("Seconds", numeric=True)),
    )
    lines = []
    for one in found:
        cost = mapping(one.facts.get("cost"))
        correlation = figure(mapping(one.facts.get("prediction")).get("rank_correlation"))
        lines.append(
            (
                Field(one.scheme),
                plain(one.total),
                plain(figure(one.facts.get("all_kl"))),
                plain(one.floor),
                Field(words.NOT_MEASURED)
                if correlation is None
                else Field(f"{correlation:.2f}", correlation),
                *(
                    plain(figure(cost.get(name)))
                    for name in ("candidates", "block_forwards", "block_forwards_without_prefixes")
                ),
                number("elapsed_seconds", figure(cost.get("seconds"))),
            )
        )
    return Grid("Schemes", heads, tuple(lines))


def _table(found: Analysis) -> Grid:
    heads = (
        *(Head("Matrix"), Head("Block", numeric=True), Head("Module")),
        *(Head("Weights", numeric=True), Head("Bits a weight", numeric=True)),
        *(Head("KL", "nats", True), Head("± standard error", "nats", True)),
        *(Head("of the sum", numeric=True), Head("Change of loss", "nats", True)),
    )
    lines = tuple(
        (
            Field(module.name),
            plain(None if module.block is None else float(module.block)),
            Field(module.kind),
            plain(float(module.weights)),
            plain(module.bits),
            Field(
                words.spell(module.kl, words.significant)
                + (" (noise)" if module.kl <= found.floor else ""),
                module.kl,
            ),
            plain(module.stderr),
            share(_part(module.kl, found.total)),
            Field(words.UNKNOWN)
            if module.loss is None
            else Field(words.spell(module.loss, words.signed), module.loss),
        )
        for module in found.ordered
    )
    count = words.count(len(lines), "matrix", "matrices")
    return Grid(f"{found.scheme}, matrix by matrix ({count})", heads, lines, folded=True)


def _map(found: Analysis, model: str) -> Map:
    blocks = sorted({module.block for module in found.modules if module.block is not None})
    outside = any(module.block is None for module in found.modules)
    rows = [*(f"block {block}" for block in blocks), *([OUTSIDE] if outside else [])]
    columns = list(dict.fromkeys(module.kind for module in found.modules))
    finite = [m.kl for m in found.modules if math.isfinite(m.kl) and m.kl > 0]
    low = max(found.floor, min(finite, default=1e-9), max(finite, default=1.0) * 1e-4)
    spots = {}
    for module in found.modules:
        row = len(blocks) if module.block is None else blocks.index(module.block)
        text = "noise" if module.kl <= found.floor else words.spell(module.kl, _two_digits)
        spots[row, columns.index(module.kind)] = Spot(text, _shade(module.kl, low, finite))
    return Map(
        "sensitivity",
        f"KL of each matrix of {model} quantized alone to {found.scheme}, blocks by modules",
        f"KL (nats a token) of each matrix quantized alone to {found.scheme}. Darker is more "
        "sensitive, on a logarithmic scale; noise: not above the noise floor.",
        tuple(rows),
        tuple(columns),
        spots,
    )


def _shade(kl: float, low: float, finite: Sequence[float]) -> float:
    high = max(finite, default=low)
    if not math.isfinite(kl):
        return 1.0
    if kl <= low or high <= low:
        return 0.0
    return math.log(kl / low) / math.log(high / low)


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}".replace("e-0", "e-")


def _part(kl: float, total: float) -> float:
    return kl / total if total > 0 and math.isfinite(kl) else 0.0
