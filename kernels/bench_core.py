"""What the bench compares: contenders, what they hold, their error, and copies beyond the caches.

Every contender gets the same weight, already rounded to the grid of round-to-nearest (symmetric,
scales in float16), so one that rounds as we do multiplies by that very weight, and its error
against float64 is the kernel's. One with a grid of its own rounds once more: its error shows that.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.pack import pack, unpack
from kernels.reference import dequantize_packed
from kernels.stored import Stored

Role = Literal["ours", "peer", "baseline"]

CHECKED_TOKENS = 16
"""Outputs of so many tokens are compared: all of them in float64 would outlast the bench."""

CHECKED_ROWS = 4096
"""Weight rows held in float64 at once."""

SPREAD = 2
"""Copies of a weight together take so many times the cache."""

MOST_COPIES = 256

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest error of our kernels, relative to the largest output, by the type of the activations: its
rounding of scales, products and results."""


@dataclass(frozen=True)
class Scheme:
    """Bits of a weight, and inputs that share a scale; -1 is a whole row."""

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """Short name: `w4 g128`, `w8` with one scale a row, `16 bit`."""
        if self.bits == 16:
            return "16 bit"
        return f"w{self.bits}" + ("" if self.group_size == -1 else f" g{self.group_size}")


UNQUANTIZED = Scheme(16, -1)
SCHEMES = (Scheme(4, 128), Scheme(8, -1), Scheme(3, 128), Scheme(2, 64))


@dataclass(frozen=True)
class Prepared:
    """A weight in a contender's format.

    Attributes:
        module: [tokens, in] -> [tokens, out]; a deep copy of it holds its own weights.
        nbytes: of weights, scales and zero points.
        note: what differs from the others: rounded activations, a grid of its own.
        registers: of a thread of the kernel, where known.
    """

    module: Callable[[Tensor], Tensor]
    nbytes: int
    note: str = ""
    registers: int | None = None


Prepare = Callable[[Tensor, int, int, torch.dtype], Prepared | str]
"""Weight float32 [out, in], bits, group_size, type of the activations -> what is timed, or one
sentence that says why it cannot."""


@dataclass(frozen=True)
class Contender:
    """Something that multiplies by a stored weight.

    Attributes:
        bits: for which it is asked.
        package: has to be importable; None: nothing beyond torch.
        absent: what to say where the package is not there.
    """

    name: str
    role: Role
    bits: tuple[int, ...]
    prepare: Prepare
    package: str | None = None
    absent: str = ""

    def missing(self) -> str | None:
        """Return why it cannot take part at all, None where it can."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return self.absent or f"{self.package} is not installed"

    def load(self) -> None:
        """Import the package, so that no time counts it; `prepare` says what is wrong with it."""
        if self.package is not None:
            with contextlib.suppress(Exception):
                importlib.import_module(self.package)


def prepare(
    contender: Contender, weight: Tensor, scheme: Scheme, dtype: torch.dtype
) -> Prepared | str:
    """Put a weight into a contender's format, or say why not; ours may not fail, a library may."""
    if contender.role == "ours":
        return contender.prepare(weight, scheme.bits, scheme.group_size, dtype)
    try:
        return contender.prepare(weight, scheme.bits, scheme.group_size, dtype)
    except Exception as error:  # noqa: BLE001  # whatever a library raises is its refusal
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def quantize(weight: Tensor, bits: int, group_size: int) -> Stored:
    """Round a weight [out, in] to nearest: symmetric, the largest of a group at +-(2**(bits-1)-1).

    Rounding the result again changes nothing.
    """
    rows, columns = weight.shape
    span = columns if group_size == -1 else group_size
    groups = -(-columns // span)
    grouped = functional.pad(weight, (0, groups * span - columns)).view(rows, groups, span)
    largest = 2 ** (bits - 1) - 1
    scale = (grouped.abs().amax(-1) / largest).clamp_min(2.0**-24).half()
    codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(-largest, largest)
    stored = (codes + 2 ** (bits - 1)).to(torch.uint8).flatten(1)
    return Stored(pack(stored, bits), scale, None, bits, group_size, columns)


def codes_of(stored: Stored) -> Tensor:
    """Return the codes of a stored weight, uint8 [out, groups * group_size]."""
    width = stored.columns
    if stored.group_size != -1:
        width = stored.scale.shape[-1] * stored.group_size
    return unpack(stored.packed, stored.bits, width)


def on_grid(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return a weight as every contender of a scheme gets it: float32, on the scheme's grid."""
    if scheme.bits == 16:
        return weight
    held = quantize(weight, scheme.bits, scheme.group_size)
    return dequantize_packed(
        held.packed, held.scale, None, scheme.bits, scheme.group_size, held.columns
    )


def largest_error(x: Tensor, y: Tensor, weight: Tensor) -> float:
    """Return the largest error of y = x @ weight.T against float64, relative to the largest output.

    x [tokens, in], y [tokens, out]; some tokens from both ends are compared. Infinite where an
    output is no number.
    """
    tokens = x.shape[0]
    if tokens > CHECKED_TOKENS:
        half = CHECKED_TOKENS // 2
        chosen = torch.cat([torch.arange(half), torch.arange(tokens - half, tokens)]).to(x.device)
        x, y = x[chosen], y[chosen]
    error, scale = 0.0, 0.0
    for start in range(0, weight.shape[0], CHECKED_ROWS):
        rows = slice(start, start + CHECKED_ROWS)
        expected = x.double() @ weight[rows].double().T
        difference = (y[:, rows].double() - expected).abs().max()
        if not torch.isfinite(difference):
            return float("inf")
        error, scale = max(error, float(difference)), max(scale, float(expected.abs().max()))
    return error / scale if scale else error


def held_bytes(module: nn.Module) -> int:
    """Return the bytes of all buffers and parameters."""
    return sum(tensor.nbytes for tensor in [*module.buffers(), *module.parameters()])


class Rotation:
    """A prepared weight and copies of it, called in turn, so that none is still in a cache."""

    def __init__(self, prepared: Prepared, cache_bytes: int) -> None:
        needed = -(-SPREAD * cache_bytes // max(prepared.nbytes, 1))
        # One that alone exceeds the cache pushes its own beginning out.
        self.copies = min(max(needed, 1), MOST_COPIES)
        copied = [copy.deepcopy(prepared.module) for _ in range(self.copies - 1)]
        self._modules = cycle([prepared.module, *copied])

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply by the next copy."""
        return next(self._modules)(x)
