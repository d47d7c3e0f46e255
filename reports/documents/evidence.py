"""What there is to judge the documents by, and the words of a verdict.

`holds here` and `does not hold here` are said of the rows that are named, whose model and text are
not the documents'; `reproduced` and `differs` of the documents' own model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.record import Record
from reports.gather import is_row
from reports.rows import Group, Row, mapping
from reports.sensitivity import Analysis, analyses

HOLDS, FAILS, UNDECIDED = "holds here", "does not hold here", "cannot be decided here"
DIFFERS, REPRODUCED, PARTLY = "differs", "reproduced", "holds in part here"
OF_DEMONSTRATION = "This is the demonstration model, which decides nothing about others."


@dataclass(frozen=True)
class Verdict:
    """What is said of a claim, and why."""

    verdict: str
    why: str


@dataclass(frozen=True)
class Evidence:
    """What a report has: its groups of rows, and all its records."""

    groups: tuple[Group, ...]
    records: tuple[Record, ...]

    @property
    def rows(self) -> Iterator[tuple[Group, Row]]:
        """Every measured row with its group."""
        return ((group, row) for group in self.groups for row in group.measured)

    @property
    def real(self) -> Evidence:
        """The same without the demonstration model, which tells nothing of other models."""
        return Evidence(
            tuple(g for g in self.groups if not all(demonstration(r.record) for r in g.rows)),
            tuple(record for record in self.records if not demonstration(record)),
        )

    @property
    def analyses(self) -> list[Analysis]:
        """Every sensitivity analysis."""
        return [found for record in self.records for found in analyses(record)]

    def jobs(self, name: str) -> list[Record]:
        """Return the records that hold what job `name` leaves."""
        return [r for r in self.records if not is_row(r) and mapping(r.details.get(name))]


def demonstration(record: Record) -> bool:
    """Whether the record is of the model that this project carries to be tried on."""
    return bool(mapping(record.details.get("model")).get("kind") == "embedded")
