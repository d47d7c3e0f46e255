"""What the bench writes: rows with what follows from them, targets beside what was reached.

GB/s counts weights, scales and zero points, not activations; the share is of the copy bandwidth of
the same run, which counts bytes read and bytes written. A copy reads and writes, and a kernel only
reads, so a share can pass 100 %. The best peer is the fastest of the same bits that is not ours.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from kernels.bench_core import Role, Scheme
from kernels.bench_timing import Timing

MEGABYTE = 10**6


@dataclass(frozen=True)
class Row:
    """One contender at one shape and number of tokens; `refusal` says why there are no times.

    Attributes:
        nbytes: of weights, scales and zero points.
        samples: seconds of one call.
        how: `calls`, `graph` or `events`, see `kernels.bench_timing`.
        error: largest, against float64, relative to the largest output.
    """

    shape: str
    out_features: int
    in_features: int
    tokens: int
    bits: int
    group_size: int
    contender: str
    role: Role
    nbytes: int = 0
    copies: int = 0
    median: float = 0.0
    spread: float = 0.0
    samples: tuple[float, ...] = ()
    how: str = ""
    error: float = 0.0
    pack_seconds: float = 0.0
    registers: int | None = None
    note: str = ""
    refusal: str = ""

    @property
    def scheme(self) -> str:
        """Short name of bits and group."""
        return Scheme(self.bits, self.group_size).name

    @property
    def bandwidth(self) -> float:
        """Bytes of the weight per second."""
        return self.nbytes / self.median

    @property
    def operations(self) -> float:
        """Floating-point operations per second."""
        return 2 * self.tokens * self.out_features * self.in_features / self.median


@dataclass(frozen=True)
class Derived:
    """What follows from a row and the others: None where there is nothing to compare with."""

    row: Row
    share: float
    faster: float | None
    ahead: float | None


def derive(rows: Sequence[Row], copy_bandwidth: float) -> list[Derived]:
    """Return every timed row with its share of the copy bandwidth (bytes/s) and its speed-ups."""
    timed = [row for row in rows if row.samples]
    baseline = {_cell(row): row.median for row in timed if row.role == "baseline"}
    best: dict[tuple[str, int, int], float] = {}
    for row in timed:
        if row.role == "peer":
            key = (*_cell(row), row.bits)
            best[key] = min(best.get(key, row.median), row.median)
    derived = []
    for row in timed:
        base, peer = baseline.get(_cell(row)), best.get((*_cell(row), row.bits))
        derived.append(
            Derived(
                row,
                row.bandwidth / copy_bandwidth,
                None if base is None else base / row.median,
                None if peer is None else peer / row.median,
            )
        )
    return derived


def _cell(row: Row) -> tuple[str, int]:
    return row.shape, row.tokens


@dataclass(frozen=True)
class Target:
    """What `performance.md`, section 4, asks for: the least value of a quantity over some rows.

    Attributes:
        quantity: share of the copy bandwidth, speed-up over 16 bits, over the best peer.
        tokens: first and last number of tokens.
        megabytes: smallest and largest weight, in its own format.
        shape: one only, as [out, in].
        peer: ahead of this one instead of the best.
    """

    text: str
    wanted: float
    quantity: Literal["share", "faster", "ahead"]
    bits: int | None
    tokens: tuple[int, int] = (1, 1)
    megabytes: tuple[float, float] = (0, float("inf"))
    shape: tuple[int, int] | None = None
    peer: str | None = None

    def values(self, derived: Iterable[Derived]) -> list[float]:
        """Return the quantity of each of our rows that the target is about."""
        everything = list(derived)
        found = []
        for entry in everything:
            row = entry.row
            fits = (
                row.role == "ours"
                and self.bits in (None, row.bits)
                and self.tokens[0] <= row.tokens <= self.tokens[1]
                and self.megabytes[0] <= row.nbytes / MEGABYTE <= self.megabytes[1]
                and self.shape in (None, (row.out_features, row.in_features))
            )
            value = self._value(entry, everything) if fits else None
            if value is not None:
                found.append(value)
        return found

    def _value(self, entry: Derived, everything: list[Derived]) -> float | None:
        if self.peer is None:
            return {"share": entry.share, "faster": entry.faster, "ahead": entry.ahead}[
                self.quantity
            ]
        for other in everything:
            if _cell(other.row) == _cell(entry.row) and other.row.contender == self.peer:
                return other.row.median / entry.row.median
        return None


LARGE, MIDDLE = (40.0, float("inf")), (8.0, 25.0)
FOREVER = 1 << 30
INT4_SHAPE = (11008, 4096)

CARD_TARGETS = (
    Target(
        "W4 g128, M = 1, 40 MB and more: of the copy bandwidth", 0.65, "share", 4, (1, 1), LARGE
    ),
    Target("W4 g128, M = 1, 8 to 25 MB: of the copy bandwidth", 0.45, "share", 4, (1, 1), MIDDLE),
    Target("W8, M = 1: of the copy bandwidth", 0.75, "share", 8),
    Target("W2 g64, M = 1: of the copy bandwidth", 0.45, "share", 2),
    Target("W4 g128, 40 MB and more, M to 128: times 16 bit", 1.0, "faster", 4, (1, 128), LARGE),
    Target("W4 g128, 40 MB and more, M to 256: times 16 bit", 0.95, "faster", 4, (129, 256), LARGE),
    Target(
        "W4 g128, 40 MB and more, M above: times 16 bit", 0.85, "faster", 4, (257, FOREVER), LARGE
    ),
    Target("W4 g128, 8 to 25 MB, M to 64: times 16 bit", 1.0, "faster", 4, (1, 64), MIDDLE),
    Target("W8, M to 128: times 16 bit", 1.0, "faster", 8, (1, 128)),
    Target("W2 g64, M to 128: times 16 bit", 1.0, "faster", 2, (1, 128)),
    Target("every shape and M: times the best peer", 1.0, "ahead", None, (1, FOREVER)),
)
"""On an H200. Its seventh line, tokens per second of a 7B model, is not of single products."""

PROCESSOR_TARGETS = (
    Target("W4 g128, M = 1, 11008x4096: times bf16", 3.0, "faster", 4, shape=INT4_SHAPE),
    Target(
        "W4 g128, M = 1, 11008x4096: times llama.cpp Q4_0",
        1.0,
        "ahead",
        4,
        shape=INT4_SHAPE,
        peer="llama.cpp Q4_0",
    ),
    Target("W4 g128, M = 16: times bf16", 0.95, "faster", 4, (16, 16)),
    Target("W4 g128, M = 128: times bf16", 0.95, "faster", 4, (128, 128)),
)


def target_table(targets: Iterable[Target], derived: Sequence[Derived]) -> str:
    """Return targets beside the worst of what was reached, as Markdown."""
    lines = ["| target | wanted | reached (worst) | rows | met |", "|---|---:|---:|---:|---|"]
    for target in targets:
        values = target.values(derived)
        worst = min(values, default=None)
        shown = "not measured" if worst is None else f"{worst:.2f}"
        met = "" if worst is None else ("yes" if worst >= target.wanted else "no")
        lines.append(f"| {target.text} | {target.wanted:.2f} | {shown} | {len(values)} | {met} |")
    return "\n".join(lines) + "\n"


COLUMNS: tuple[tuple[str, Callable[[Derived], str]], ...] = (
    ("M", lambda d: str(d.row.tokens)),
    ("weights", lambda d: d.row.scheme),
    ("contender", lambda d: d.row.contender),
    ("median, us", lambda d: f"{d.row.median * 1e6:.1f}"),
    ("IQR, us", lambda d: f"{d.row.spread * 1e6:.1f}"),
    ("GB/s", lambda d: f"{d.row.bandwidth / 1e9:.1f}"),
    ("of copy", lambda d: f"{d.share:.0%}"),
    ("TFLOP/s", lambda d: f"{d.row.operations / 1e12:.3g}"),
    ("x 16 bit", lambda d: _times(d.faster)),
    ("x best peer", lambda d: _times(d.ahead) if d.row.role == "ours" else ""),
    ("error", lambda d: f"{d.row.error:.1e}"),
    ("registers", lambda d: "" if d.row.registers is None else str(d.row.registers)),
    ("packing, s", lambda d: f"{d.row.pack_seconds:.2f}"),
    ("remark", lambda d: "; ".join(filter(None, [d.row.note, _how(d.row)]))),
)
LEFT_ALIGNED = ("weights", "contender", "remark")


def result_tables(derived: Sequence[Derived]) -> str:
    """Return one Markdown table a shape."""
    parts = []
    for shape in dict.fromkeys(entry.row.shape for entry in derived):
        entries = [entry for entry in derived if entry.row.shape == shape]
        first = entries[0].row
        names = [name for name, _ in COLUMNS]
        rules = ["---" if name in LEFT_ALIGNED else "---:" for name in names]
        lines = [f"## {shape}: {first.out_features} x {first.in_features}", ""]
        lines += [f"| {' | '.join(names)} |", f"|{'|'.join(rules)}|"]
        lines += [f"| {' | '.join(cell(entry) for _, cell in COLUMNS)} |" for entry in entries]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def refusals(rows: Iterable[Row]) -> str:
    """Return who refused what, once each, as a Markdown list."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.refusal:
            shapes = found.setdefault((row.contender, row.scheme, row.refusal), [])
            if row.shape not in shapes:
                shapes.append(row.shape)
    return "".join(
        f"- {name}, {scheme}: {why} ({', '.join(shapes)})\n"
        for (name, scheme, why), shapes in found.items()
    )


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _how(row: Row) -> str:
    return "no graph" if row.how == "events" else ""


LIBRARIES = (
    "torch",
    "triton",
    "bitsandbytes",
    "torchao",
    "hqq",
    "gemlite",
    "humming-kernels",
    "llama-cpp-python",
    "cuda-core",
    "nvidia-cuda-nvrtc",
)
"""Whose versions are written down."""

TARGETS = {"cpu": PROCESSOR_TARGETS, "cuda": CARD_TARGETS}


def machine(device: str) -> str:
    """Return the name of the card or processor."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """Return a name as a folder: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(
    folder: Path,
    environment: dict[str, Any],
    copy: Timing,
    rows: Sequence[Row],
    absent: dict[str, str],
) -> str:
    """Write `results.json` and `README.md` into a folder; return the table of targets.

    `environment` has machine, device, dtype, threads; `copy` the bandwidth in bytes a second;
    `absent` what was not measured, and why.
    """
    derived = derive(rows, copy.median)
    targets = target_table(TARGETS[environment["device"]], derived)
    environment = {
        **environment,
        "copy_bytes_per_second": copy.samples,
        "python": platform.python_version(),
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"environment": environment, "missing": absent, "rows": [asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    threads = f", {environment['threads']} threads" if environment["threads"] else ""
    missing = "".join(f"- {name}: {why}\n" for name, why in absent.items())
    text = (
        f"# Kernels on {environment['machine']}\n\n"
        f"Activations in {environment['dtype']}{threads}; copy bandwidth {copy.median / 1e9:.1f} "
        f"GB/s (IQR {copy.spread / 1e9:.1f}), bytes read and written. Written by "
        "`python -m kernels.bench`; samples and versions are in `results.json`.\n\n"
        f"## Targets\n\n{targets}\n{result_tables(derived)}\n"
        f"## Not measured\n\n{missing}{refusals(rows)}"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return targets


def versions() -> dict[str, str]:
    """Return the versions of what takes part, where installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
