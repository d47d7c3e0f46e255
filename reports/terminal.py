"""The table that a sweep ends with, as plain text: aligned, ASCII, no wider than the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from harness.record import Record
from reports import protocols, words
from reports.gather import make_groups, make_rows
from reports.jobs import job_rows
from reports.rows import Row
from reports.sensitivity import sensitivity_text
from reports.summary import Column, Table, decodes_otherwise, summary_table

HEADS = {
    "artefact_bytes": "size",
    "bits_per_weight": "bits/w",
    "computed_bytes": "computed",
    "computed_bits_per_weight": "bits/w",
    "peak_memory_bytes": "memory",
    "perplexity": "perplexity",
    "kl_mean": "KL",
    "embedding_cosine": "cosine",
    "similarity_rank_agreement": "rank",
    "masked_perplexity": "masked ppl",
    "masked_top1_agreement": "masked top-1",
    "latency_seconds": "latency",
    "latency_speedup": "speed-up",
    "top1_agreement": "top-1",
    "prefill_tokens_per_second": "prefill",
    "decode_tokens_per_second": "decode",
    "quantize_seconds": "quantize",
    "quantize_peak_bytes": "quantize memory",
}
SCORES = {"exact_match_strict": "strict", "exact_match_flexible": "flexible"}
UNITS = {"tokens/s": "tok/s", "µs": "us"}
DROPPED_FIRST = (
    *("quantize_peak_bytes", "quantize_seconds", "top1_agreement", "prefill_tokens_per_second"),
)
DROPPED_NEXT = ("peak_memory_bytes", "bits_per_weight", "computed_bits_per_weight", "kl_mean")
"""What a narrow terminal goes without, in this order; task scores go between the two."""

MARKS = {"best": "*", "next": "+", "": " "}
VERDICTS = {"better": "^", "even": "~", "open": "?", "worse": "!"}
"""Behind a figure of quality: what its samples say of it against the baseline."""

ABSENT = "n/m"
WIDEST, WIDEST_LABEL, WIDEST_WITH_OPTIONS = 120, 40, 56
GAP = "  "


def summary_text(
    records: Sequence[Record], problems: Sequence[str] = (), width: int | None = None
) -> str:
    """Return the tables of `records`, at most `width` columns wide; None is the terminal's width.

    Each group of rows that compare has its table, the baseline first; failed cells and `problems`
    (the sentences of records that could not be read) follow, each with its reason. Of other jobs,
    sensitivity analyses have a short text; deployments and searches have printed their own.
    """
    if width is None:
        width = min(WIDEST, shutil.get_terminal_size((WIDEST, 0)).columns)
    rows = make_rows(records)
    blocks = [_group_text(summary_table(group), width) for group in make_groups(rows)]
    for lines in filter(None, (sensitivity_text(record).splitlines() for record in records)):
        blocks.append("\n".join(part for line in lines for part in _wrapped(line, width)))
    failures = _failures([*rows, *job_rows(records)], problems, width)
    blocks += [failures] if failures else []
    return "\n\n".join(blocks) + "\n" if blocks else ""


def _group_text(table: Table, width: int) -> str:
    group = table.group
    baselines = [row.label for row in group.baselines]
    title = f"{group.title}; baseline {baselines[0] if baselines else 'not measured'}"
    if any(row.random_weights for row in group.rows):
        title += "; random weights: no quality figures"
    if not table.rows:
        return f"{_clean(title)}\n  no cell of this group was measured"
    columns, dropped = _fitting(table, width)
    blocks = [_label_block(table), *(_block(column) for column in columns)]
    lines = [GAP.join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    lines.insert(2, "-" * max(len(line) for line in lines))
    return "\n".join([_clean(title), *lines, *_notes(table, columns, dropped, width)])


def _fitting(table: Table, width: int) -> tuple[list[Column], list[Column]]:
    """Return the columns that fit into `width`, and those left out for it."""
    columns = list(table.columns)
    dropped: list[Column] = []
    order = [c for metric in DROPPED_FIRST for c in columns if c.metric == metric]
    order += [c for c in reversed(columns) if c.family == "tasks"]
    order += [c for metric in DROPPED_NEXT for c in columns if c.metric == metric]
    label_width = len(_label_block(table)[0])
    for column in order:
        used = label_width + sum(len(GAP) + len(_block(c)[0]) for c in columns)
        if used <= width:
            break
        columns = [c for c in columns if c is not column]
        dropped.append(column)
    return columns, dropped


def _label_block(table: Table) -> list[str]:
    """Return two head lines and one line a row: label and execution state, padded."""
    labels = [_label(row) for row in table.rows]
    states = [row.execution for row in table.rows]
    width = max(len(label) for label in [*labels, "method"])
    state_width = max(len(state) for state in [*states, "execution"])
    lines = [("method", "execution"), ("", ""), *zip(labels, states, strict=True)]
    return [f"{label:<{width}}{GAP}{state:<{state_width}}" for label, state in lines]


def _label(row: Row) -> str:
    label = _clean(row.label)
    if len(label) <= WIDEST_LABEL:
        return label
    # What stands in brackets tells rows of equal bits and groups apart.
    axes, _, options = label.partition(" (")
    for whole in (label, f"{axes.split()[0]} ... ({options}"):
        if options and len(whole) <= WIDEST_WITH_OPTIONS:
            return whole
    return f"{label[: WIDEST_LABEL - 3]}..."


def _block(column: Column) -> list[str]:
    """Return two head lines and one line a row, all of one width."""
    texts = [
        (_clean(cell.text) if cell.value is not None else ABSENT)
        + (VERDICTS.get(cell.tone) or MARKS[cell.mark])
        for cell in column.cells
    ]
    # The unit of a task's difference stands in the legend.
    compares = [_clean(cell.compare).removesuffix(" points") for cell in column.cells]
    head, below = HEADS.get(column.metric, column.metric), UNITS.get(column.unit, column.unit)
    if column.family == "tasks":
        head = protocols.task_of(column.protocol)
        below = f"{SCORES.get(column.metric, column.metric)} {below}".rstrip()
    heads = [f"{_clean(part)} " for part in (head, below)]
    width = max(map(len, [*texts, *heads]))
    aside = max(map(len, compares))
    return [f"{head:>{width}}{' ' * (aside + bool(aside))}" for head in heads] + [
        f"{text:>{width}}{f' {other:<{aside}}' if aside else ''}"
        for text, other in zip(texts, compares, strict=True)
    ]


def _notes(
    table: Table, columns: Sequence[Column], dropped: Sequence[Column], width: int
) -> list[str]:
    used: dict[str, list[str]] = {}
    for column in columns:
        if column.family in (
            *("perplexity", "divergence", "speed", "tasks"),
            *("embedding", "masked", "latency"),
        ):
            used.setdefault(column.protocol, []).append(_name(column))
    notes = [f"{', '.join(heads)}: {_clean(name)}" for name, heads in used.items()]
    marks = {cell.mark for column in columns for cell in column.cells}
    legend = []
    if marks & {"best", "next"}:
        legend.append("* best of the column")
    if "next" in marks:
        legend.append("+ best after the baseline")
    tones = {cell.tone for column in columns for cell in column.cells}
    meanings = (
        ("better", "^ better"),
        ("even", "~ equivalent within 3 %"),
        ("open", "? the samples cannot tell"),
        ("worse", "! worse, tested against the baseline"),
    )
    legend += [meaning for tone, meaning in meanings if tone in tones]
    if any(cell.compare for column in columns for cell in column.cells):
        legend.append("x0.27: the row over the baseline")
    if any(cell.compare.endswith(" points") for column in columns for cell in column.cells):
        legend.append("-1.2: points")
    if any(cell.value is None for column in columns for cell in column.cells):
        legend.append(f"{ABSENT}: not measured")
    if dropped:
        names = ", ".join(_name(c) for c in dropped)
        legend.append(f"in the report only: {names}")
    notes += ["; ".join(legend)] if legend else []
    otherwise = [_label(row) for row in table.rows if decodes_otherwise(row)]
    if otherwise:
        notes.append(
            f"decoded in transformers where the baseline is not, or the other way round: "
            f"{', '.join(otherwise)}"
        )
    flagged = [
        _label(row)
        for index, row in enumerate(table.rows)
        if any(column.cells[index].flag for column in columns)
    ]
    if flagged:
        every = 1 < len(flagged) == len(table.rows)
        notes.append(f"noisy timing: {'every row' if every else ', '.join(flagged)}")
    return [line for note in notes for line in _wrapped(note, width)]


def _name(column: Column) -> str:
    """Return what the notes call a column."""
    if column.family == "tasks":
        return _clean(column.head)
    return HEADS.get(column.metric, _clean(column.head))


def _failures(rows: Sequence[Row], problems: Sequence[str], width: int) -> str:
    lines = []
    for row in rows:
        reasons = "; ".join(f"{error.stage}: {error.message}" for error in row.errors)
        if row.status != "ok":
            where = f"{row.label} ({row.group_title})"
            reason = reasons or "the record gives no reason"
            lines.append(f"{row.status.upper()} {where}: {reason}")
    lines += [f"UNREADABLE {problem}" for problem in problems]
    return "\n".join(part for line in lines for part in _wrapped(_clean(line), width))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="    ", break_long_words=True)


def _clean(text: str) -> str:
    return words.one_line(text).replace("×", "x").replace("–", "-").replace("µ", "u")
