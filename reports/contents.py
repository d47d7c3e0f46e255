"""What stands under which address of a page: the links at the top of it and of each group."""

from __future__ import annotations

import re

from reports.page import Section


def anchor(title: str) -> str:
    """Return the part of an address that stands for a heading: `generated-texts`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def contents(section: Section) -> list[tuple[str, str]]:
    """Return (title, address) of the headings of a group, in their order."""
    titles = ["What this shows"] * bool(section.findings) + ["Summary"]
    titles += ["Quality against cost"] * bool(section.figures)
    titles += ["Verdicts"] * bool(section.evidence)
    found = [(title, anchor(title)) for title in titles]
    found += [
        (f"Engines in {table.dtype}", f"engines-{number}")
        for number, table in enumerate(section.engines, start=1)
    ]
    found += [
        (block.title, f"block-{number}") for number, block in enumerate(section.blocks, start=1)
    ]
    titles = [detail.title for detail in section.details]
    titles += ["Kernels"] * bool(section.kernels) + ["Coverage"] * bool(section.coverages)
    titles += ["Generated texts"] * bool(section.prompts)
    if section.missing or section.notes or section.calibrations or section.models:
        titles.append("Notes")
    found += [(title, anchor(title)) for title in titles]
    return [(title, f"{section.slug}--{address}") for title, address in found]
