"""What the script of a page has to know of a table's columns: units, axes of charts, limits.

`templates/chart.js` draws quality against cost from the figures of the summary, and
`templates/tables.js` offers limits for some of them; both read it from attributes of the heads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from reports import words
from reports.rows import DEPLOYMENT, QUALITY
from reports.summary import Column, Table

COST = DEPLOYMENT | {"quantize"}
"""Families of figures that quality is bought with."""

LIMITED = (
    *("perplexity", "kl_mean", "masked_perplexity", "embedding_cosine"),
    *("artefact_bytes", "computed_bytes", "peak_memory_bytes"),
    *("decode_tokens_per_second", "latency_seconds"),
)
"""Figures that a reader may set a limit for."""


@dataclass(frozen=True)
class Axis:
    """A column as an axis of a chart.

    Attributes:
        side: `quality` or `cost`.
        better: `less` or `more`.
        limit: `at most` or `at least`, empty where no limit is offered.
    """

    side: str
    better: str
    limit: str


def factor(column: Column) -> float:
    """Return what one of the column's unit is in the unit of its values: 1e6 for bytes in MB."""
    values = [cell.value for cell in column.cells if cell.value is not None]
    return words.column_format(column.metric, values).factor


def axis(table: Table, column: Column) -> Axis | None:
    """Return `column` as an axis, None where neither less nor more of it is better."""
    side = "quality" if column.family in QUALITY else "cost" if column.family in COST else ""
    found = (row.get(column.metric, column.protocol) for row in table.rows)
    better = {value.higher_is_better for value in found if value is not None}
    if not side or len(better) != 1 or None in better:
        return None
    more = better == {True}
    limit = ("at least" if more else "at most") if column.metric in LIMITED else ""
    return Axis(side, "more" if more else "less", limit)


def shown(table: Table) -> set[tuple[str, str]]:
    """Return (metric, protocol) of every column of `table`."""
    return {(column.metric, column.protocol) for column in table.columns}


def told(
    columns: Iterable[Column], known: Collection[tuple[str, str]] | None
) -> list[tuple[Column, float, bool]]:
    """Return each column with its factor, and whether verdicts stand in it.

    They do unless the column is `known`, by (metric, protocol), from a table above.
    """
    return [
        (column, factor(column), (column.metric, column.protocol) not in (known or ()))
        for column in columns
    ]
