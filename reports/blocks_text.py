"""Blocks (`reports.blocks`) as plain text for a terminal: sentences, tables, no colour.

A folded table is left to the pages: its title and its length stand for it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from reports import words
from reports.blocks import Block, Grid

PLAIN_WIDTH = 160
"""Columns of text that goes to a file or a pipe."""


def blocks_text(blocks: Sequence[Block], width: int | None = None) -> str:
    """Return `blocks` as text, at most `width` columns wide; None is PLAIN_WIDTH."""
    columns = PLAIN_WIDTH if width is None else width
    return "\n".join(_block(block, columns) for block in blocks)


def _block(block: Block, width: int) -> str:
    lines = [words.one_line(block.title)]
    for sentence in block.sentences:
        lines += wrapped(sentence, width)
    open_ = [grid for grid in block.grids if not grid.folded]
    for grid in open_:
        lines += [words.one_line(grid.title)] if len(open_) > 1 else []
        lines.append(_grid(grid, width).rstrip("\n"))
    for grid in block.grids:
        if grid.folded:
            count = words.count(len(grid.lines), "line")
            lines += wrapped(f"{grid.title}: {count}, on the pages only.", width)
    if block.legend:
        lines += wrapped(block.legend, width)
    return "\n".join(lines) + "\n"


def wrapped(text: str, width: int) -> list[str]:
    """Return `text` in lines of at most `width` columns, indented below the first."""
    return textwrap.wrap(words.one_line(text), width, initial_indent="  ", subsequent_indent="    ")


def _grid(grid: Grid, width: int) -> str:
    table = Table(
        *(
            Column(
                f"{head.text} {head.unit}".rstrip(),
                justify="right" if head.numeric else "left",
                overflow="fold",
            )
            for head in grid.heads
        ),
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for line in grid.lines:
        table.add_row(*(words.one_line(field.text) for field in line))
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    with console.capture() as text:
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().splitlines())
