"""What the assembler says about a kernel: registers, shared memory, stack and spills.

Read from the log that `ptxas -v` writes, one block of lines a kernel. Numbers hold for one compiler
and one architecture: another compiler gives the same source other registers. Shared memory is the
static part; what a launch asks for beyond it is no property of the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '[^']+'")
STACK = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", re.MULTILINE
)
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers of a thread, bytes of a thread, bytes of a block.

    Attributes:
        registers: of a thread.
        spill_stores_bytes: of a thread, written to memory because registers ran out.
        spill_loads_bytes: of a thread, read back.
        shared_bytes: of a block, without what a launch asks for.
        stack_bytes: of a thread, arrays indexed at run time and spilled registers.
    """

    registers: int
    spill_stores_bytes: int
    spill_loads_bytes: int
    shared_bytes: int
    stack_bytes: int = 0

    @property
    def spills(self) -> bool:
        """Whether a register went to memory."""
        return self.spill_stores_bytes > 0 or self.spill_loads_bytes > 0


def parse_log(log: str) -> dict[str, Resources]:
    """Return the resources of each kernel that a log of `ptxas -v` names.

    Functions that were not inlined have lines of their own below their kernel; what they spill and
    keep on the stack counts as the kernel's.
    """
    found: dict[str, Resources] = {}
    entries = list(ENTRY.finditer(log))
    for entry, following in zip_longest(entries, entries[1:]):
        block = log[entry.end() : following.start() if following else len(log)]
        stacks = [tuple(map(int, match.groups())) for match in STACK.finditer(block)]
        registers, shared = REGISTERS.search(block), SHARED.search(block)
        if not stacks or registers is None:
            continue
        found[entry.group(1)] = Resources(
            registers=int(registers.group(1)),
            spill_stores_bytes=sum(stack[1] for stack in stacks),
            spill_loads_bytes=sum(stack[2] for stack in stacks),
            shared_bytes=int(shared.group(1)) if shared else 0,
            stack_bytes=sum(stack[0] for stack in stacks),
        )
    return found


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture, or why there is none."""

    file: str
    function: str
    defines: str
    arch: str
    resources: Resources | None
    error: str = ""

    @property
    def sound(self) -> bool:
        """Whether the kernel compiled and spills nothing."""
        return self.resources is not None and not self.resources.spills


def table(rows: Iterable[Row], compiler: str) -> str:
    """Return the rows as Markdown, under the compiler that made them."""
    lines = [
        "# Registers of the kernels",
        "",
        f"Compiled by {compiler}, on no card; `python -m kernels.build` writes this table. Shared",
        "memory is static; stack and spills are bytes of a thread.",
        "",
        "| file | kernel | defines | architecture | registers | shared | stack | spills |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        names = f"| {row.file} | {row.function} | {row.defines} | {row.arch} |"
        found = row.resources
        if found is None:
            lines.append(f"{names} failed | | | |")
            continue
        spilled = found.spill_stores_bytes + found.spill_loads_bytes
        lines.append(
            f"{names} {found.registers} | {found.shared_bytes} | {found.stack_bytes} | {spilled} |"
        )
    return "\n".join(lines) + "\n"
