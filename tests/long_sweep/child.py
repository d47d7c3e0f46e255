"""What a child of the simulated sweep does: it writes a record of made-up figures.

The figures are those of `tests.reports.synthetic`, drawn from the cell's own axes. The model's name
says that they are simulated, and so does a note in every record.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.launch import Stage
from harness.record import write_record
from tests.reports.synthetic import Synthetic

FULL_PRECISION = 32


def main(job: dict[str, Any], stage: Stage) -> None:
    """Write the record of the cell that `job` describes."""
    stage("simulate")
    summary = job["summary"]
    seed = zlib.crc32(job["cell"].encode())
    made = Synthetic(summary["model"], summary["hardware"], seed).cell(
        summary["method"],
        summary["bits"] or FULL_PRECISION,
        summary["group_size"],
        "packed",
        f"simulated {summary['method']}",
    )
    write_record(replace(made, cell=job["cell"], config=summary), Path(job["folder"]))
