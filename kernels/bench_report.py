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
from typing import Any

import torch

from kernels import bench_targets
from kernels.bench_core import Role, Scheme
from kernels.bench_targets import SINGLE, Line, Target
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
        pack_seconds: from codes to the contender's format; from the float weight where it has a
            rounding of its own.
        kernel: its name, where the contender says it.
        failed: whether the refusal was raised as an error.
    """

    shape: str
    out_features: int
    in_features: int
    tokens: int
    bits: int
    group_size: int
    contender: str
    role: Role
    zero_points: bool = False
    activation_bits: int = 16
    nbytes: int = 0
    copies: int = 0
    median: float = 0.0
    spread: float = 0.0
    samples: tuple[float, ...] = ()
    how: str = ""
    error: float = 0.0
    pack_seconds: float = 0.0
    registers: int | None = None
    kernel: str = ""
    note: str = ""
    refusal: str = ""
    failed: bool = False

    @property
    def scheme(self) -> str:
        """Short name of the scheme."""
        return Scheme(self.bits, self.group_size, self.zero_points, self.activation_bits).name

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


def reached(target: Target, derived: Sequence[Derived]) -> list[float]:
    """Return the target's quantity of each of our rows that it is about."""
    found = []
    for entry in derived:
        row = entry.row
        fits = (
            row.role == "ours"
            and target.scheme in (None, row.scheme)
            and target.tokens[0] <= row.tokens <= target.tokens[1]
            and target.megabytes[0] <= row.nbytes / MEGABYTE <= target.megabytes[1]
            and (not target.shapes or (row.out_features, row.in_features) in target.shapes)
        )
        value = _quantity(target, entry, derived) if fits else None
        if value is not None:
            found.append(value)
    return found


def _quantity(target: Target, entry: Derived, derived: Sequence[Derived]) -> float | None:
    if target.peer is None:
        values = {"share": entry.share, "faster": entry.faster, "ahead": entry.ahead}
        return values[target.quantity]
    for other in derived:
        if _cell(other.row) == _cell(entry.row) and other.row.contender == target.peer:
            return other.row.median / entry.row.median
    return None


def target_lines(targets: Iterable[Target], derived: Sequence[Derived]) -> list[Line]:
    """Return targets beside the worst of what was reached."""
    return [bench_targets.line(t.text, t.wanted, reached(t, derived)) for t in targets]


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
    ("remark", lambda d: "; ".join(filter(None, [d.row.kernel, d.row.note, _how(d.row)]))),
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
) -> list[Line]:
    """Write `results.json` and `README.md` into a folder, each whole; return the targets.

    `environment` has machine, device, dtype, threads; `copy` the bandwidth in bytes a second;
    `absent` what was not measured, and why.
    """
    derived = derive(rows, copy.median)
    targets = target_lines(SINGLE[environment["device"]], derived)
    environment = {
        **environment,
        "copy_bytes_per_second": copy.samples,
        "python": platform.python_version(),
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "environment": environment,
        "missing": absent,
        "targets": [asdict(line) for line in targets],
        "rows": [asdict(row) for row in rows],
    }
    replace_text(folder / "results.json", json.dumps(facts) + "\n")
    threads = f", {environment['threads']} threads" if environment["threads"] else ""
    missing = "".join(f"- {name}: {why}\n" for name, why in absent.items())
    text = (
        f"# Kernels on {environment['machine']}\n\n"
        f"Activations in {environment['dtype']}{threads}; copy bandwidth {copy.median / 1e9:.1f} "
        f"GB/s (IQR {copy.spread / 1e9:.1f}), bytes read and written. Written by "
        "`python -m kernels.bench`; samples and versions are in `results.json`.\n\n"
        f"## Targets\n\n{bench_targets.table(targets)}\n{result_tables(derived)}\n"
        f"## Not measured\n\n{missing}{refusals(rows)}"
    )
    replace_text(folder / "README.md", text)
    return targets


def replace_text(path: Path, text: str) -> None:
    """Write a file that is whole at any time: what it was, or the text."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Return the versions of what takes part, where installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
