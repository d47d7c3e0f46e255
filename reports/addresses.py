"""Where the pages of a report are, as addresses relative to its folder."""

from __future__ import annotations

import hashlib
import re

CELLS = "cells"
LONGEST = 150
"""Characters of a cell's id that stand in a file name; file systems take 255 bytes."""


def cell_page(cell: str) -> str:
    """Return the address of a cell's own page, `cells/<cell>.html`, from the report's folder.

    What may not stand in a file name or an address becomes `-`, and a digest tells such ids apart.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", cell).strip("-.")[:LONGEST]
    if safe != cell or not cell:
        safe = f"{safe}-{hashlib.sha256(cell.encode()).hexdigest()[:10]}".lstrip("-")
    return f"{CELLS}/{safe}.html"
