"""Which blocks a report has: of the rows of a group, and of the records that are no rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.record import Record
from reports.allocation import allocation_blocks
from reports.blocks import Block
from reports.calibration import calibration_blocks
from reports.compression import compression_blocks
from reports.drawing.intervals import interval_blocks
from reports.drawing.multiples import multiple_blocks
from reports.gather import is_row
from reports.jobs import deploy_blocks, search_blocks
from reports.projection import projection_blocks
from reports.rows import Group, Row, axes_label
from reports.sensitivity import sensitivity_blocks
from reports.training import training_blocks


def group_blocks(group: Group) -> list[Block]:
    """Return the blocks of a group's rows: pictures of them all, and what their methods left."""
    return [
        *interval_blocks(group),
        *multiple_blocks(group),
        *allocation_blocks(group),
        *training_blocks(group),
        *compression_blocks(group),
        *calibration_blocks(group),
        *projection_blocks(group),
    ]


def job_blocks(records: Sequence[Record], labels: Mapping[str, str]) -> list[Block]:
    """Return the blocks of records of other jobs; `labels` are of the report's rows, by cell."""
    found = [record for record in records if not is_row(record)]
    labels = {**{r.cell: axes_label(Row(r, "", {}, "")) for r in found}, **labels}
    return [*deploy_blocks(found), *search_blocks(found, labels), *sensitivity_blocks(found)]
