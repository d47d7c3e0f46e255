"""Decoding speed on cards that are not here: what their memory allows, always called projected.

At batch 1 each decoded token reads every weight it needs once, so tokens/s are at most the memory's
bytes a second over the bytes of weights a token reads (the roofline's memory side: Williams,
Waterman and Patterson, Communications of the ACM 52(4):65-76, 2009). Bytes a token are those of the
record: of a row whose speed was measured, what the speed measure counted in the artefact; else what
was computed from the architecture. Cards and their sources: `cards.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from reports import entries, words
from reports.blocks import Block, Field, Grid, Head, number, share
from reports.rows import Group, Row, machine, main_protocol, mapping, sequence

BATCH_1 = "_batch1"
"""How protocols of one sequence at a time end: at others one reading serves several tokens."""

SMALL_BYTES = 100e6
"""Weights below it may stay in the caches of a large card, which hold tens of megabytes."""

MOST_ROWS, LISTED = 300, 60
"""Rows that the table has; of more so many are listed."""

_FIELDS = ("name", "gigabytes_per_second", "memory_gigabytes", "source")
_KINDS = {
    **dict.fromkeys(("name", "source"), entries.text),
    "gigabytes_per_second": entries.number,
    "memory_gigabytes": entries.several(entries.number),
}


@dataclass(frozen=True)
class Card:
    """A card that is projected to: its bandwidth, the sizes of memory it is sold with, the source.

    Units are bytes a second and bytes.
    """

    name: str
    bytes_per_second: float
    memory_bytes: tuple[float, ...]
    source: str

    @property
    def memory(self) -> str:
        """The sizes of its memory in words."""
        sizes = "/".join(f"{size / 1e9:g}" for size in self.memory_bytes)
        return f"{sizes} GB"


@dataclass(frozen=True)
class Projection:
    """What is known of one row.

    Attributes:
        row: the row.
        read: bytes of weights that decoding one token reads.
        stored: bytes of the whole model on disk, None where unknown.
        copy: bytes a second of this machine's memory, measured with the row, None where not.
        measured: the row's own tokens/s on this machine, None where not measured.
        cached: whether its weights fit into this machine's caches.
    """

    row: Row
    read: float
    stored: float | None
    copy: float | None
    measured: float | None
    cached: bool

    @property
    def here(self) -> float | None:
        """The bound of this machine in tokens/s."""
        return None if self.copy is None else bound(self.copy, self.read)

    @property
    def reached(self) -> float | None:
        """Share of this machine's bound that was measured."""
        if self.here is None or self.measured is None:
            return None
        return self.measured / self.here


@cache
def cards() -> tuple[Card, ...]:
    """Return the cards of `cards.yaml`.

    Raises:
        ValueError: as `read_card`.
    """
    return read_cards(entries.read_yaml(Path(__file__).with_name("cards.yaml")))


def read_cards(found: Any) -> tuple[Card, ...]:
    """Return what the content of `cards.yaml` says.

    Raises:
        ValueError: as `read_card`.
    """
    if not entries.several(entries.mapping)(found):
        raise ValueError("cards.yaml is no list of cards")
    return tuple(map(read_card, found))


def read_card(entry: Mapping[str, Any]) -> Card:
    """Return one entry of the file as a card.

    Raises:
        ValueError: a field is missing, unknown, or no positive figure; the sentence names the card.
    """
    name = f"cards.yaml: {entry.get('name', 'a card')}"
    if wrong := sorted(set(entry) ^ set(_FIELDS)):
        raise ValueError(f"{name} lacks, or has beside the known fields: {', '.join(wrong)}")
    entries.check_entry(entry, name, _KINDS)
    sizes = entry["memory_gigabytes"]
    if not sizes or min(entry["gigabytes_per_second"], *sizes) <= 0:
        raise ValueError(f"{name} needs a bandwidth and sizes of memory above 0")
    return Card(
        entry["name"],
        1e9 * entry["gigabytes_per_second"],
        tuple(1e9 * size for size in sorted(sizes)),
        entry["source"],
    )


def bound(bytes_per_second: float, read: float) -> float:
    """Return the tokens/s that a memory allows at batch 1, each token reading `read` bytes."""
    return bytes_per_second / read


def project(group: Group) -> list[Projection]:
    """Return the rows of `group` whose bytes a token are known."""
    return [found for row in group.measured if (found := _of(row)) is not None]


def projection_blocks(group: Group) -> list[Block]:
    """Return the block of projected speeds, none where no row has its bytes a token."""
    found = project(group)
    if not found:
        return []
    here = next((machine(one.row) for one in found if one.copy is not None), "")
    return [
        Block(
            "Decode speed projected to other cards",
            sentences=(*_sentences(found), *_left_out(found)),
            grids=(_speeds(_listed(found), here), _sources()),
            legend=LEGEND,
        )
    ]


LEGEND = (
    "Projected tokens/s = bytes a second of the card's memory (datasheet, see Cards) / bytes of "
    "weights that one token reads, at batch 1. Bytes a token: achieved_bytes_per_second / "
    "decode_tokens_per_second of the same protocol where the row's speed was measured, else "
    "read_bytes_per_token, computed from the architecture. This machine's bandwidth is "
    "copy_bytes_per_second of the row's own record; the share reached is the measured speed over "
    "that bound. It is a bound, not a forecast: it leaves out the KV cache, which grows with the "
    "context, activations, the start of kernels, and computing; a kernel that converts packed "
    "weights to floats in memory first reads and writes more than the packed bytes. Too large "
    "means that the stored model alone is larger than the card's memory (GB as 1e9 bytes)."
)


def _of(row: Row) -> Projection | None:
    protocol = _protocol(row)
    speed = None if protocol is None else row.get("decode_tokens_per_second", protocol)
    rate = None if protocol is None else row.get("achieved_bytes_per_second", protocol)
    copy = None if protocol is None else row.get("copy_bytes_per_second", protocol)
    if speed is not None and rate is not None:
        read = rate.value / speed.value if speed.value else math.nan
    else:
        read = _first(row, "read_bytes_per_token") or math.nan
    if not (math.isfinite(read) and read > 0):
        return None
    stored = _first(row, "artefact_bytes") or _first(row, "computed_bytes")
    return Projection(
        row,
        read,
        stored,
        None if copy is None else copy.value,
        None if speed is None else speed.value,
        _fits_into_caches(row, protocol),
    )


def _protocol(row: Row) -> str | None:
    """Return the protocol of batch 1 that most says how fast the row decodes, None without one."""
    found = [v.protocol for v in row.all_of("decode_tokens_per_second")]
    single = [protocol for protocol in found if protocol.endswith(BATCH_1)]
    main = main_protocol([row], "decode_tokens_per_second")
    return main if main in single else next(iter(sorted(single, key=words.natural)), None)


def _first(row: Row, metric: str) -> float | None:
    values = row.all_of(metric)
    return values[0].value if values else None


def _fits_into_caches(row: Row, protocol: str | None) -> bool:
    points = map(mapping, sequence(mapping(row.record.details.get("speed")).get("points")))
    return any(
        point.get("protocol") == protocol and point.get("weights_fit_into_caches")
        for point in points
    )


def _sentences(found: Sequence[Projection]) -> list[str]:
    said = []
    cached = [one.row.label for one in found if one.cached]
    if cached:
        said.append(
            f"The weights of {_some(cached)} fit into the caches of this machine's processor: "
            "there the memory's bandwidth is no bound, and a share above 100 % is no mistake."
        )
    if any(one.read < SMALL_BYTES for one in found):
        said.append(
            f"Where a token reads less than {words.figure('read_bytes', SMALL_BYTES)}, the start "
            "of kernels and the processor decide, not the memory: no card decodes near such a "
            "bound."
        )
    shares = [one for one in found if one.reached is not None]
    if shares:
        best = max(shares, key=lambda one: one.reached or 0.0)
        said.append(
            f"Of this machine's bound, {best.row.label} reached most: "
            f"{share(best.reached).text} ({words.figure('tokens_per_second', best.measured or 0)} "
            f"of {words.figure('tokens_per_second', best.here or 0)})."
        )
    return said


def _listed(found: Sequence[Projection]) -> Sequence[Projection]:
    """Return what the table lists: all, or of very many those that read the fewest bytes."""
    if len(found) <= MOST_ROWS:
        return found
    least = sorted(one.read for one in found)[LISTED - 1]
    return [one for one in found if one.read <= least][:LISTED]


def _left_out(found: Sequence[Projection]) -> list[str]:
    if len(found) <= MOST_ROWS:
        return []
    return [
        f"Listed are {LISTED} of {len(found):,} rows, those that read the fewest bytes a token."
    ]


def _some(labels: Sequence[str], most: int = 4) -> str:
    if len(labels) <= most:
        return words.listed(labels)
    return f"{', '.join(labels[:most])} and {len(labels) - most} more"


def _speeds(found: Sequence[Projection], here: str) -> Grid:
    this = "this machine" + (f" ({here})" if here else "")
    heads = [
        Head("Row"),
        Head("Weights read a token", numeric=True),
        Head("Stored", numeric=True),
        *(Head(f"Projected: {card.name}", "tokens/s", numeric=True) for card in cards()),
        Head(f"Projected: {this}", "tokens/s", numeric=True),
    ]
    measured = any(one.measured is not None for one in found)
    if measured:
        heads += [
            Head("Measured on this machine", "tokens/s", numeric=True),
            Head("Share of its bound reached", "%", numeric=True),
        ]
    lines = []
    for one in found:
        fields = [
            Field(one.row.label),
            number("read_bytes", one.read),
            number("stored_bytes", one.stored),
            *(_projected(card, one) for card in cards()),
            _rate(one.here),
        ]
        lines.append((*fields, *([_rate(one.measured), _percent(one.reached)] if measured else [])))
    return Grid("Projected", tuple(heads), tuple(lines))


def _projected(card: Card, one: Projection) -> Field:
    value = bound(card.bytes_per_second, one.read)
    text = _rate(value).text
    if one.stored is None:
        return Field(f"{text}, size unknown", value)
    fitting = [size for size in card.memory_bytes if size >= one.stored]
    if not fitting:
        return Field(f"{text}, too large", value)
    if len(fitting) < len(card.memory_bytes):
        return Field(f"{text}, needs {fitting[0] / 1e9:g} GB", value)
    return Field(text, value)


def _rate(value: float | None) -> Field:
    if value is None:
        return Field(words.NOT_MEASURED)
    return Field(f"{value:,.0f}" if value >= 100 else f"{value:.3g}", value)


def _percent(value: float | None) -> Field:
    return Field(words.NOT_MEASURED) if value is None else Field(f"{100 * value:.1f}", value)


def _sources() -> Grid:
    heads = (Head("Card"), Head("Bandwidth", numeric=True), Head("Memory"), Head("Source"))
    lines = tuple(
        (
            Field(card.name),
            Field(f"{card.bytes_per_second / 1e9:,.0f} GB/s", card.bytes_per_second),
            Field(card.memory),
            Field(card.source),
        )
        for card in cards()
    )
    return Grid("Cards", heads, lines, folded=True)
