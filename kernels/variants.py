"""Which kernels there are: each source file with each set of defines that an op compiles it with.

The sizes of tiles and pipelines are asked of `kernels.plans`, which the ops ask too. `python -m
kernels.build` compiles all of `variants()`, its test those of `selection()`, so a kernel that an op
can ask for and that does not compile, or spills, is found without a card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, product

from kernels import plans
from kernels.fragments import GROUPS, ROWS, STEP, UNITS

ARCHITECTURES = tuple(plans.SHARED_BYTES)
"""A100; 3090; 4090; H100 and H200; B200."""

BITS = tuple(UNITS)
DTYPES = (0, 1)
"""DTYPE of the sources: fp16, bf16."""

SOURCES_OF_WEIGHTS = (*DTYPES, 2)
"""SOURCE of quantize.cu: fp16, bf16, fp32."""

Defines = Mapping[str, int | str]


@dataclass(frozen=True)
class Variant:
    """One kernel as an op asks for it.

    Attributes:
        file: source, below `kernels/cuda`.
        function: name of the kernel, declared `extern "C"`.
        defines: macros.
        architectures: for which it exists.
    """

    file: str
    function: str
    defines: Defines = field(default_factory=dict)
    architectures: tuple[str, ...] = ARCHITECTURES


def format_defines(bits: int, group_size: int, zeros: bool) -> dict[str, int]:
    """Return the defines of a stored format; `group_size` 0 is per channel."""
    return {"BITS": bits, "GROUP": group_size, "ZEROS": int(zeros)}


@cache
def variants() -> tuple[Variant, ...]:
    """Return every kernel of the ops."""
    found: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[str]] = {}
    for arch in ARCHITECTURES:
        for file, function, defines in _kernels(plans.shared_limit(arch)):
            found.setdefault((file, function, tuple(defines.items())), []).append(arch)
    return tuple(
        Variant(file, function, dict(defines), tuple(architectures))
        for (file, function, defines), architectures in found.items()
    )


def selection(every: Sequence[Variant] | None = None) -> list[Variant]:
    """Return some of `variants()`: each kernel at each number of bits on each architecture.

    Among the others of its kind each architecture gets another one, so that groups, zero points,
    types and tiles all come up.
    """
    every = variants() if every is None else every
    chosen: list[Variant] = []
    step = 0
    for _, kind in groupby(sorted(every, key=_kind), key=_kind):
        members = list(kind)
        for arch in ARCHITECTURES:
            own = [variant for variant in members if arch in variant.architectures]
            step += len(own) // len(ARCHITECTURES) + 1
            picked = own[step % len(own)]
            chosen.append(Variant(picked.file, picked.function, picked.defines, (arch,)))
    return chosen


def _kind(variant: Variant) -> tuple[str, str, str]:
    return variant.file, variant.function, str(variant.defines.get("BITS", ""))


def _kernels(limit: int) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Yield file, kernel and defines of all that a card needs; `limit`: see `plans.tile_plan`."""
    for regime, bits in product(("decode", "batch", "prefill", "dequantize"), BITS):
        for defines in _linears(bits, regime, limit):
            yield f"{regime}.cu", regime, defines
    for bits, symmetric, source in product(BITS, (0, 1), SOURCES_OF_WEIGHTS):
        yield "quantize.cu", "quantize", {"BITS": bits, "SYMMETRIC": symmetric, "SOURCE": source}
    for bits in BITS:
        yield "unpack.cu", "unpack", {"BITS": bits}
    for dtype in DTYPES:
        yield "prepare.cu", "prepare", {"DTYPE": dtype}
    for function, dtype in product(("quantize_tokens", "w8a8", "rescale"), DTYPES):
        for tiles in _tiles("w8a8", 8, 0, False, limit):
            yield "w8a8.cu", function, {"DTYPE": dtype, **tiles}


def _linears(bits: int, regime: str, limit: int) -> Iterator[dict[str, int]]:
    """Yield the defines of a regime for every format and type of activations."""
    for group_size, zeros, dtype in product((0, *GROUPS), (False, True), DTYPES):
        for tiles in _tiles(regime, bits, group_size, zeros, limit):
            yield {**format_defines(bits, group_size, zeros), "DTYPE": dtype, **tiles}


def _tiles(
    regime: str, bits: int, group_size: int, zeros: bool, limit: int
) -> list[dict[str, int]]:
    """Return the different defines that the plans of a regime give, over its numbers of tokens."""
    shape, card = (ROWS, STEP), (1, limit)
    if regime == "decode":
        every = [
            plans.decode_plan(shape, m, group_size, zeros, 1)
            for m in range(1, plans.DECODE_TOKENS + 1)
        ]
    elif regime == "w8a8":
        every = [plans.w8a8_plan(shape, m, 1) for m in range(1, plans.W8A8_TOKENS + 1)]
    elif regime == "dequantize":
        return [{}]
    else:
        batch = range(plans.DECODE_TOKENS + 1, plans.BATCH_TOKENS + 1)
        tokens = batch if regime == "batch" else (plans.BATCH_TOKENS + 1, plans.VENDOR_TOKENS - 1)
        every = [plans.tile_plan(shape, m, bits, group_size, zeros, card) for m in tokens]
    return [dict(found) for found in dict.fromkeys(tuple(plan.defines.items()) for plan in every)]
