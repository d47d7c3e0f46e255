"""A page for each cell: everything that its record holds, beside the report that links to it.

The pages stand alone: their style is in them, they have no script and ask for nothing. What they
show is gathered here; `templates/cell.html.jinja` lays it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.record import Record, Value
from reports import addresses, sections, words
from reports.allocation import allocation_map
from reports.blocks import Block, Map
from reports.drawing.strips import Strip, strip
from reports.evidence import EvidenceLine, line, samples_text, title_of
from reports.extra import job_blocks
from reports.layout import html_page
from reports.page import DETAILS, Page
from reports.rows import Group, Row, family, kept_back, mapping, sequence
from reports.summary import compare
from reports.verdicts import Judged, judge

MOST_ENTRIES = 24
"""Entries of a list that are shown; of longer ones only their number."""

HAS_PLACE = frozenset(
    ("kernels", "execution", "decoding", "coverage", "generation", "notes", "calibration", "model")
) | {"sensitivity", "deploy", "search"}
"""Details that have a place of their own on the page."""

IDENTITIES = ("cell_key", "artefact_key")


@dataclass(frozen=True)
class Node:
    """One entry of a nested list: its name, and its text or what is below it."""

    name: str
    text: str
    below: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Held:
    """What a record says beside its values, as nested lists; `rest` has no place of its own."""

    axes: tuple[Node, ...]
    identities: tuple[Node, ...]
    configuration: tuple[Node, ...]
    environment: tuple[Node, ...]
    model: tuple[Node, ...]
    calibration: tuple[Node, ...]
    rest: tuple[Node, ...]


@dataclass(frozen=True)
class Figure:
    """One value: as text, held against the baseline's, and with its samples.

    `judged` is what the samples say against the baseline and `test` by which test, where they
    allow one.
    """

    value: Value
    title: str
    text: str
    spread: str
    against: str
    judged: EvidenceLine | None
    test: str
    strip: Strip | None


@dataclass(frozen=True)
class Part:
    """Values of one kind, with their heading."""

    title: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class CellPage:
    """Everything shown of one cell.

    Attributes:
        row: the cell.
        back: address of its place in the report.
        baseline: label and address of the cell that it is compared with.
        repeated: of which repetitions it is one, as `3 seeds`; empty where it stands alone.
        held: what the record says beside values.
        parts: its values.
        left_out: values that the report does not show, and why.
        kernels, coverages, prompts, notes, missing: as in a section of the report.
        maps: pictures of layers x modules.
        blocks: of a cell of another job, what it found.
    """

    row: Row
    back: str
    baseline: tuple[str, str] | None
    repeated: str
    held: Held
    parts: tuple[Part, ...]
    left_out: tuple[str, ...]
    kernels: tuple[sections.KernelLine, ...]
    coverages: tuple[sections.Coverage, ...]
    prompts: tuple[sections.Prompt, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    maps: tuple[Map, ...]
    blocks: tuple[Block, ...]


def cell_files(page: Page) -> Iterator[tuple[str, bytes]]:
    """Yield the address of every cell of the report, relative to the report, and its page."""
    for one in cell_pages(page):
        text = html_page("cell.html.jinja", {}, cell=one)
        yield addresses.cell_page(one.row.record.cell), text.encode()


def cell_pages(page: Page) -> Iterator[CellPage]:
    """Return what the pages of all cells show, those of other jobs last."""
    for group in page.groups:
        judged = judge(group)
        for row in group.rows:
            back = f"../report.html#{page.anchors[row.record.cell]}"
            for cell in row.cells:
                yield _of_row(group, judged, (row, cell), back)
    labels = {cell.record.cell: cell.label for cell in page.cells}
    for other in page.others:
        yield _of_job(other, labels)


def tree(found: Any) -> tuple[Node, ...]:
    """Return nested mappings and lists as nodes; long lists are counted, not written out."""
    if isinstance(found, Mapping):
        return tuple(_node(str(name), value) for name, value in found.items())
    return tuple(_node(str(place), value) for place, value in enumerate(sequence(found), 1))


def _node(name: str, value: Any) -> Node:
    if not value or not isinstance(value, Mapping | list | tuple):
        return Node(name, _scalar(value))
    if isinstance(value, Mapping):
        return Node(name, "", tree(value))
    if len(value) > MOST_ENTRIES:
        return Node(name, f"{len(value):,} entries, in record.json")
    if any(isinstance(entry, Mapping | list | tuple) for entry in value):
        return Node(name, "", tree(value))
    return Node(name, ", ".join(map(_scalar, value)))


def _scalar(value: Any) -> str:
    if value is None or value in ({}, [], (), ""):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_row(group: Group, judged: Judged, rows: tuple[Row, Row], back: str) -> CellPage:
    """Return the page of the second of `rows`, which is the first or one of its repetitions."""
    row, cell = rows
    # What a section says of the rows of a group, asked of one.
    alone = Group(group.model, group.hardware, (cell,))
    base = next((found for found in group.baselines if found.suite == row.suite), row)
    address = addresses.cell_page(base.record.cell).rpartition("/")[2]
    drawn = allocation_map(cell)
    return CellPage(
        row=cell,
        back=back,
        baseline=None if base is row else (base.label, address),
        repeated=row.repeated,
        held=_held(cell.record),
        parts=_parts([_figure(group, judged, rows, value) for value in cell.values.values()]),
        left_out=tuple(_left_out(cell)),
        kernels=tuple(sections.kernel_lines(alone)),
        coverages=tuple(sections.coverages(alone)),
        prompts=tuple(sections.prompts(alone, None)),
        notes=tuple(said.text for said in sections.notes(alone)),
        missing=tuple(said.text for said in sections.missing(alone)),
        maps=() if drawn is None else (drawn,),
        blocks=(),
    )


def _of_job(row: Row, labels: Mapping[str, str]) -> CellPage:
    """Return the page of a cell of another job than measuring a row."""
    values = {(value.metric, value.protocol): value for value in row.record.values}
    return CellPage(
        row=row,
        back="../report.html#jobs",
        baseline=None,
        repeated="",
        held=_held(row.record),
        parts=_parts([_plain_figure(value) for value in values.values()]),
        left_out=(),
        kernels=(),
        coverages=(),
        prompts=(),
        notes=tuple(words.one_line(note) for note in sequence(row.record.details.get("notes"))),
        missing=(),
        maps=(),
        blocks=tuple(job_blocks([row.record], labels)),
    )


def _held(record: Record) -> Held:
    config, details = record.config, record.details
    axes = {k: v for k, v in config.items() if k not in ("command", "resolved", *IDENTITIES)}
    identities = {
        "cell": record.cell,
        **{name.replace("_", " "): config.get(name) for name in IDENTITIES},
        "started": record.started or "not stated",
        "seconds": f"{record.seconds:,.1f}",
    }
    return Held(
        axes=tree(axes),
        identities=tree(identities),
        configuration=tree(mapping(config.get("resolved"))),
        environment=tree(record.environment),
        model=tree(mapping(details.get("model"))),
        calibration=tree(mapping(details.get("calibration"))),
        rest=tree({k: v for k, v in details.items() if k not in HAS_PLACE}),
    )


def _parts(figures: Sequence[Figure]) -> tuple[Part, ...]:
    """Return `figures` by the kinds of the report's tables."""
    known = {name: title for title, families, _ in DETAILS for name in families}
    by_title: dict[str, list[Figure]] = {title: [] for title, *_ in DETAILS}
    for figure in figures:
        by_title.setdefault(known.get(family(figure.value), "Other figures"), []).append(figure)
    return tuple(Part(title, tuple(found)) for title, found in by_title.items() if found)


def _figure(group: Group, judged: Judged, rows: tuple[Row, Row], value: Value) -> Figure:
    row, cell = rows
    plain = _plain_figure(value)
    found = judged.get(row, value.metric, value.protocol)
    return Figure(
        value=value,
        title=plain.title,
        text=plain.text,
        spread=plain.spread,
        against=compare(group, cell, value),
        judged=None if found is None else line(found),
        test="" if found is None else f"{found.comparison.test}, {samples_text(found)}",
        strip=plain.strip,
    )


def _plain_figure(value: Value) -> Figure:
    """Return `value` without a comparison."""
    format_ = words.column_format(value.metric, [value.value])
    text = f"{format_.write(value.value)} {format_.unit}".rstrip()
    title = title_of(value)
    return Figure(value, title, text, format_.spread(value.stderr), "", None, "", strip(value))


def _left_out(cell: Row) -> Iterator[str]:
    """Say which values of the record stand nowhere in the report."""
    by_reason: dict[str, list[str]] = {}
    for value in cell.record.values:
        reason = kept_back(cell, family(value))
        if reason:
            by_reason.setdefault(reason, []).append(value.metric)
    for reason, metrics in by_reason.items():
        names = words.listed(list(dict.fromkeys(metrics)))
        why = "simulated" if reason == "simulated" else f"of {reason}"
        yield f"Not shown, since the row is {why}: {names}."
