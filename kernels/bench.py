"""`python -m kernels.bench`: our packed kernels beside every other that is installed.

Each of ours is checked against float64, and then all are timed in turns, shape by shape and number
of tokens by number of tokens, on weights that are in no cache. Results go to
`benchmarks/<card or processor>/kernels/` as JSON, with every sample, and as Markdown; they are
written after each number of tokens, so that a run that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kernels import bench_cpu, bench_cuda, bench_targets
from kernels.bench_core import (
    SCHEMES,
    UNQUANTIZED,
    Contender,
    Failed,
    Prepared,
    Rotation,
    Scheme,
    largest_error,
    on_grid,
    prepare,
    tolerance,
)
from kernels.bench_report import Row, machine, refusals, slug, write
from kernels.bench_targets import Line
from kernels.bench_timing import cache_bytes, copy_bandwidth, time_calls
from kernels.errors import ConfigError

CONTENDERS = {"cpu": bench_cpu.CONTENDERS, "cuda": bench_cuda.CONTENDERS}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPE = {"cpu": "bfloat16", "cuda": "float16"}

SHAPES: dict[str, tuple[int, int]] = {
    "7B gate+up": (22016, 4096),
    "7B up": (11008, 4096),
    "7B down": (4096, 11008),
    "7B qkv": (12288, 4096),
    "7B o": (4096, 4096),
    "13B gate+up": (27648, 5120),
    "13B up": (13824, 5120),
    "13B down": (5120, 13824),
    "13B qkv": (15360, 5120),
    "13B o": (5120, 5120),
    "odd": (4095, 4097),
    "odd wide": (1000, 11000),
}
"""Name -> [out, in]: linear maps of LLaMA, fused and not, one that nothing divides, and one whose
inputs 64 does not."""

TOKENS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
QUICK_SHAPES, QUICK_TOKENS = ("7B up", "7B o"), (1, 16, 128)

CHECK_SHAPES = {"small": (64, 128), "ragged": (67, 193), "odd": (1023, 1025), "7B o": (4096, 4096)}
CHECK_TOKENS: tuple[int, ...] = (1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 128, 200, 1024)
"""Both sides of every number of tokens at which another kernel takes over."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long.

    Attributes:
        seconds: for all contenders of one shape and number of tokens.
        minutes: no further round of timing is begun after so many; each shape has its share.
        check: errors only, no times.
    """

    device: str
    dtype: torch.dtype
    shapes: dict[str, tuple[int, int]]
    tokens: tuple[int, ...]
    seconds: float = 1.0
    minutes: float = float("inf")
    check: bool = False
    cache_bytes: int = 0
    schemes: tuple[Scheme, ...] = SCHEMES


@dataclass(frozen=True)
class Entry:
    """A contender that holds the weight of a shape, and the row that its results go into."""

    row: Row
    weight: Tensor
    prepared: Prepared
    rotation: Rotation


Keep = Callable[[Sequence[Row], Sequence[str]], object]
"""Takes the rows so far, and what was left out."""


def _keep_nothing(rows: Sequence[Row], left_out: Sequence[str]) -> None:
    pass


def measure(
    settings: Settings, contenders: Sequence[Contender], keep: Keep = _keep_nothing
) -> tuple[list[Row], list[str]]:
    """Return one row for each contender, scheme, shape and number of tokens, and what was left out.

    Contenders that are not installed have no rows. `keep` gets both after each number of tokens.
    """
    present = [contender for contender in contenders if contender.missing() is None]
    if settings.check:
        present = [contender for contender in present if contender.role == "ours"]
    end = time.monotonic() + 60 * settings.minutes
    rows: list[Row] = []
    left_out: list[str] = []
    for number, (shape, (out, columns)) in enumerate(settings.shapes.items()):
        now = time.monotonic()
        if now >= end:
            left_out.append(shape)
            continue
        shape_end = now + (end - now) / (len(settings.shapes) - number)
        generator = torch.Generator().manual_seed(out * columns)
        weight = (torch.randn(out, columns, generator=generator) * 0.02).to(settings.device)
        entries, refused = _prepared(settings, present, shape, weight)
        rows += refused
        for tokens in settings.tokens:
            if time.monotonic() >= shape_end:
                left_out.append(f"{shape} with M = {tokens}")
                continue
            x = torch.randn(tokens, columns, generator=generator)
            rows += _timed(settings, entries, x.to(settings.device, settings.dtype), shape_end)
            keep(rows, left_out)
    return rows, left_out


def _prepared(
    settings: Settings, contenders: Sequence[Contender], shape: str, weight: Tensor
) -> tuple[list[Entry], list[Row]]:
    """Put a weight into every contender's format, for every scheme; return who could, who not."""
    entries: list[Entry] = []
    refused: list[Row] = []
    out, columns = weight.shape
    for scheme in (UNQUANTIZED, *settings.schemes):
        asked = [contender for contender in contenders if contender.takes(scheme)]
        if not asked:
            continue
        given = on_grid(weight, scheme)
        for contender in asked:
            row = Row(
                shape,
                out,
                columns,
                0,
                scheme.bits,
                scheme.group_size,
                contender.name,
                contender.role,
                scheme.zero_points,
                scheme.activation_bits,
            )
            contender.load()
            start = time.perf_counter()
            prepared = prepare(contender, given, settings.dtype)
            _synchronize(settings.device)
            row = replace(row, pack_seconds=time.perf_counter() - start)
            if isinstance(prepared, str):
                failed = isinstance(prepared, Failed)
                refused.append(replace(row, refusal=prepared, failed=failed))
                continue
            rotation = Rotation(prepared, settings.cache_bytes)
            row = replace(row, nbytes=prepared.nbytes, copies=rotation.copies, note=prepared.note)
            entries.append(Entry(row, given.weight, prepared, rotation))
    return entries, refused


class _Product:
    """A call without arguments; it tells how many copies take turns."""

    def __init__(self, rotation: Rotation, x: Tensor) -> None:
        self.copies = rotation.copies
        self._rotation, self._x = rotation, x

    def __call__(self) -> Tensor:
        return self._rotation(self._x)


def _timed(
    settings: Settings, entries: Sequence[Entry], x: Tensor, end: float = float("inf")
) -> list[Row]:
    """Check all contenders at one number of tokens, then time those that answered."""
    rows: list[Row] = []
    running: dict[str, tuple[Row, _Product]] = {}
    tokens = x.shape[0]
    for entry in entries:
        row = replace(entry.row, tokens=tokens)
        try:
            error = largest_error(x, entry.rotation(x), entry.weight)
            kernel, registers = entry.prepared.kernel(tokens), entry.prepared.registers(tokens)
        except Exception as fault:  # noqa: BLE001  # whatever a library raises is its refusal
            rows.append(replace(row, refusal=Failed.of(fault), failed=True))
            # Where a kernel broke the context of the card, nothing else can run: this raises.
            _synchronize(settings.device)
            continue
        row = replace(row, error=error, kernel=kernel, registers=registers)
        running[f"{row.scheme} {row.contender}"] = (row, _Product(entry.rotation, x))
    if settings.check:
        return rows + [row for row, _ in running.values()]
    calls = {name: product for name, (_, product) in running.items()}
    for name, timing in time_calls(calls, settings.device, settings.seconds, end=end).items():
        rows.append(
            replace(
                running[name][0],
                median=timing.median,
                spread=timing.spread,
                samples=timing.samples,
                how=timing.how,
            )
        )
    return rows


def wrong(rows: Sequence[Row], dtype: torch.dtype) -> list[str]:
    """Return one sentence for each of our rows that failed, or is wrong beyond the tolerance."""
    sentences = []
    for row in rows:
        if row.role != "ours":
            continue
        name = f"{row.contender} {row.scheme} at {row.out_features}x{row.in_features}"
        allowed = tolerance(row.activation_bits, dtype)
        if row.failed:
            sentences.append(f"{name}, M = {row.tokens}: {row.refusal}")
        elif not row.refusal and not row.error <= allowed:
            error = f"error {row.error:.1e}, allowed {allowed:.0e}"
            sentences.append(f"{name}, M = {row.tokens}: {error}")
    return sentences


def parse(arguments: Sequence[str] | None) -> tuple[Settings, Path]:
    """Return settings and the folder for results.

    Raises:
        ConfigError: an option names something that is not there.
    """
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type of the activations")
    parser.add_argument("--shapes", help="names or OUTxIN, by commas: '7B up,4095x4097'")
    parser.add_argument("--schemes", help="by commas: 'w4 g128,w2 g64 zeros,w8a8'")
    parser.add_argument("--m", help="numbers of tokens, by commas")
    parser.add_argument("--quick", action="store_true", help="two shapes, M = 1, 16, 128")
    parser.add_argument("--check", action="store_true", help="errors of our kernels, no times")
    parser.add_argument("--seconds", type=float, default=1.0, help="for one shape and M")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a CUDA card, and torch sees none")
    shapes, tokens = (CHECK_SHAPES, CHECK_TOKENS) if asked.check else (SHAPES, TOKENS)
    if asked.quick:
        shapes, tokens = {name: SHAPES[name] for name in QUICK_SHAPES}, QUICK_TOKENS
    if asked.shapes:
        shapes = dict(_shape(text.strip()) for text in asked.shapes.split(","))
    if asked.m:
        tokens = tuple(_tokens(text) for text in asked.m.split(","))
    schemes = SCHEMES
    if asked.schemes:
        schemes = tuple(Scheme.of(text.strip()) for text in asked.schemes.split(","))
    settings = Settings(
        device=asked.device,
        dtype=DTYPES[asked.dtype or DEFAULT_DTYPE[asked.device]],
        shapes=shapes,
        tokens=tokens,
        seconds=asked.seconds,
        minutes=asked.minutes,
        check=asked.check,
        cache_bytes=0 if asked.check else cache_bytes(asked.device),
        schemes=schemes,
    )
    return settings, asked.output / slug(machine(asked.device)) / "kernels"


def _shape(text: str) -> tuple[str, tuple[int, int]]:
    if text in SHAPES:
        return text, SHAPES[text]
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ConfigError(f"--shapes has {text}; shapes are OUTxIN, or one of {', '.join(SHAPES)}")
    return text, (int(found.group(1)), int(found.group(2)))


def _tokens(text: str) -> int:
    if not text.strip().isdigit() or int(text) == 0:
        raise ConfigError(f"--m has {text}; numbers of tokens are whole and above 0")
    return int(text)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; return 1 where one of our kernels is wrong."""
    try:
        settings, folder = parse(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    contenders = CONTENDERS[settings.device]
    absent = {c.name: why for c in contenders if (why := c.missing()) is not None}
    for name, why in absent.items():
        print(f"not measured: {name}: {why}")
    if settings.check:
        return _check(settings, contenders)
    environment = {
        "machine": machine(settings.device),
        "device": settings.device,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if settings.device == "cpu" else None,
        "cache_bytes": settings.cache_bytes,
    }
    copy = copy_bandwidth(settings.device)

    def keep(rows: Sequence[Row], left_out: Sequence[str]) -> list[Line]:
        missing = absent | dict.fromkeys(left_out, "the time was up")
        return write(folder, environment, copy, rows, missing)

    rows, left_out = measure(settings, contenders, keep)
    for name in left_out:
        print(f"not measured: {name}: the time was up")
    print(bench_targets.table(keep(rows, left_out)), end="")
    print(f"results in {folder}")
    return _complain(rows, settings.dtype)


def _check(settings: Settings, contenders: Sequence[Contender]) -> int:
    """Print how many products of ours are right; return 1 where one is wrong, or none was made."""
    rows, _ = measure(settings, contenders)
    checked = [row for row in rows if row.role == "ours" and not row.refusal]
    errors = len(wrong(rows, settings.dtype))
    print(f"checked {len(checked)} products against float64, {errors} beyond tolerance")
    print(refusals(rows), end="")
    return _complain(rows, settings.dtype) or int(not checked)


def _complain(rows: Sequence[Row], dtype: torch.dtype) -> int:
    errors = wrong(rows, dtype)
    for sentence in errors:
        print(sentence, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
