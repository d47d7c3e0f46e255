"""What the assembler says about a kernel: registers, shared memory, stack and spills.

Read from the log that `ptxas -v` writes, one block of lines a kernel. Numbers hold for one compiler
and one architecture: another compiler gives the same source other registers. Shared memory is the
static part; what a launch asks for beyond it is no property of the code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '[^']+'")
STACK = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", re.MULTILINE
)
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")

FAMILY = ("BITS", "TILES", "TOKEN_TILES", "SYMMETRIC")
"""Defines that decide the size of a kernel; kernels alike in these share a line of the table."""


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
    defines: Mapping[str, int | str]
    arch: str
    resources: Resources | None
    error: str = ""

    @property
    def sound(self) -> bool:
        """Whether the kernel compiled and spills nothing."""
        return self.resources is not None and not self.resources.spills

    @property
    def shown(self) -> str:
        """Defines in one line."""
        return " ".join(f"{key}={value}" for key, value in self.defines.items())

    @property
    def family(self) -> tuple[str, str]:
        """Kernel and those defines that a line of the table has of its own."""
        own = (f"{key}={self.defines[key]}" for key in FAMILY if key in self.defines)
        return f"{self.file}: {self.function}", " ".join(own)


def table(rows: Sequence[Row], compiler: str) -> str:
    """Return the rows as Markdown, least and most of each family, under what compiled them."""
    architectures = sorted({row.arch for row in rows}, key=lambda arch: int(arch.strip("sm_a")))
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    unsound = [row for row in rows if not row.sound]
    stack = sum(1 for row in rows if row.resources and row.resources.stack_bytes)
    lines = [
        "# Registers of the kernels",
        "",
        f"Compiled by {compiler}, on no card;",
        "`python -m kernels.build --output FILE` writes this table.",
        "",
        f"{len(rows)} kernels, each for one architecture: {len(unsound)} fail or spill, {stack}",
        "use a stack. A line has the least and the most registers of a thread over all groups,",
        "zero points, types and depths of pipelines, and how many of these there are.",
        "",
        f"| kernel | defines | variants | {' | '.join(architectures)} |",
        f"|---|---|---:|{'---|' * len(architectures)}",
    ]
    for (name, defines), family in families.items():
        cells = [_range([row for row in family if row.arch == arch]) for arch in architectures]
        count = len({row.shown for row in family})
        lines.append(f"| {name} | {defines} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(rows: Sequence[Row]) -> str:
    """Return least and most registers; what fails or spills stands before them."""
    used = sorted(row.resources.registers for row in rows if row.resources is not None)
    failed, spilling = len(rows) - len(used), sum(bool(r.resources and not r.sound) for r in rows)
    parts = [f"{failed} failed"] if failed else []
    parts += [f"{spilling} spill"] if spilling else []
    if used:
        parts.append(str(used[0]) if used[0] == used[-1] else f"{used[0]}-{used[-1]}")
    return ", ".join(parts)
