"""What the bench compares: contenders, what they hold, their error, and copies beyond the caches.

Every contender gets the same weight, already rounded to the grid of round-to-nearest (scales in
float16), and its codes: one that takes them multiplies by that very weight, and its error against
float64 is the kernel's. One with a grid of its own rounds once more, and one that rounds
activations to 8 bits does that: its error shows it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.errors import ConfigError
from kernels.pack import pack, unpack
from kernels.reference import dequantize_packed, unpack_zero_point
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

INT8_TOLERANCE = 2e-2
"""With activations rounded to 8 bits: half a step of 1 / 127 of a token's largest for each input,
about 0.8 % of the largest output of normal numbers; twice that would be another rounding."""

NAME = re.compile(r"w([2348])(a8)?(?: g(\d+))?( zeros)?")


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are stored.

    Attributes:
        bits: of a weight.
        group_size: inputs that share a scale; -1 is a whole row.
        zero_points: whether a group has one.
        activation_bits: 16, or 8: rounded token by token at each call.
    """

    bits: int
    group_size: int
    zero_points: bool = False
    activation_bits: int = 16

    @property
    def name(self) -> str:
        """Short name: `w4 g128`, `w8` with one scale a row, `w2 g64 zeros`, `w8a8`, `16 bit`."""
        if self.bits == 16:
            return "16 bit"
        rounded = "a8" if self.activation_bits == 8 else ""
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        return f"w{self.bits}{rounded}{group}{' zeros' if self.zero_points else ''}"

    @staticmethod
    def of(name: str) -> Scheme:
        """Return the scheme of a short name.

        Raises:
            ConfigError: it is none.
        """
        found = NAME.fullmatch(name)
        if found is None:
            raise ConfigError(f"{name!r} is no scheme; schemes are like 'w4 g128 zeros' or 'w8a8'")
        bits, rounded, group, zeros = found.groups()
        return Scheme(int(bits), int(group or -1), zeros is not None, 8 if rounded else 16)


UNQUANTIZED = Scheme(16, -1)
SCHEMES = tuple(
    map(
        Scheme.of,
        (
            "w4 g128",
            "w8",
            "w3 g128",
            "w2 g64",
            "w4 g128 zeros",
            "w3 g128 zeros",
            "w2 g64 zeros",
            "w8a8",
            "w4a8 g128",
        ),
    )
)


@dataclass(frozen=True)
class Given:
    """A weight as a contender gets it: float32 [out, in], and its codes where it is quantized."""

    weight: Tensor
    scheme: Scheme
    stored: Stored | None

    @property
    def codes(self) -> Stored:
        """The stored form; raises ValueError for an unquantized weight."""
        if self.stored is None:
            raise ValueError("an unquantized weight has no codes")
        return self.stored


@dataclass(frozen=True)
class Prepared:
    """A weight in a contender's format.

    Attributes:
        module: [tokens, in] -> [tokens, out].
        nbytes: of weights, scales and zero points.
        note: what differs from the others: rounded activations, a grid of its own.
        kernel: number of tokens -> name of the kernel, empty where that says nothing more.
        registers: number of tokens -> those of a thread of the kernel, None where not known.
        again: makes the module once more, with weights of its own; None: a deep copy does.
    """

    module: Callable[[Tensor], Tensor]
    nbytes: int
    note: str = ""
    kernel: Callable[[int], str] = lambda tokens: ""
    registers: Callable[[int], int | None] = lambda tokens: None
    again: Callable[[], Callable[[Tensor], Tensor]] | None = None


Prepare = Callable[[Given, torch.dtype], Prepared | str]
"""Weight and type of the activations -> what is timed, or one sentence that says why it cannot."""


@dataclass(frozen=True)
class Contender:
    """Something that multiplies by a stored weight.

    Attributes:
        bits: of the weights for which it is asked.
        zero_points: whether it is asked for schemes with zero points, too.
        activation_bits: of the schemes for which it is asked.
        package: has to be importable; None: nothing beyond torch.
        absent: what to say where the package is not there.
    """

    name: str
    role: Role
    bits: tuple[int, ...]
    prepare: Prepare
    package: str | None = None
    absent: str = ""
    zero_points: bool = False
    activation_bits: tuple[int, ...] = (16,)

    def takes(self, scheme: Scheme) -> bool:
        """Whether it is asked for a scheme."""
        return (
            scheme.bits in self.bits
            and scheme.activation_bits in self.activation_bits
            and (self.zero_points or not scheme.zero_points)
        )

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


class Failed(str):
    """A refusal that was raised: of a library as good as any other, of ours a fault."""

    @staticmethod
    def of(error: Exception) -> Failed:
        """Return the kind of an error and its first line."""
        first = (str(error).strip() or "no message").splitlines()[0]
        return Failed(f"{type(error).__name__}: {first}")


def prepare(contender: Contender, given: Given, dtype: torch.dtype) -> Prepared | str:
    """Put a weight into a contender's format, or say why not."""
    try:
        return contender.prepare(given, dtype)
    except Exception as error:  # noqa: BLE001  # whatever a library raises is its refusal
        return Failed.of(error)


def quantize(weight: Tensor, scheme: Scheme) -> Stored:
    """Round a weight [out, in] to nearest, scales in float16.

    Symmetric: the largest of a group at +-(2**(bits-1)-1), and rounding the result again changes
    nothing. With zero points: from the smallest to the largest of a group, 0 among them.
    """
    bits, group_size = scheme.bits, scheme.group_size
    rows, columns = weight.shape
    span = columns if group_size == -1 else group_size
    groups = -(-columns // span)
    grouped = functional.pad(weight, (0, groups * span - columns)).view(rows, groups, span)
    if scheme.zero_points:
        top = 2**bits - 1
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = ((high - low) / top).clamp_min(2.0**-24).half()
        zeros = (-low / scale.float()).round().clamp(0, top)
        codes = (grouped / scale.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
        stored = codes.clamp(0, top).to(torch.uint8).flatten(1)
        zero_point = pack(zeros.to(torch.uint8).flatten(), bits)
        return Stored(pack(stored, bits), scale, zero_point, bits, group_size, columns)
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


def zeros_of(stored: Stored) -> Tensor:
    """Return the zero point of each group, uint8 of the shape of the scales."""
    zeros = unpack_zero_point(stored.zero_point, stored.scale, stored.bits)
    if zeros is None:
        return torch.full_like(stored.scale, 2 ** (stored.bits - 1), dtype=torch.uint8)
    return zeros


def on_grid(weight: Tensor, scheme: Scheme) -> Given:
    """Return a float32 weight as every contender of a scheme gets it: on the scheme's grid."""
    if scheme.bits == 16:
        return Given(weight, scheme, None)
    held = quantize(weight, scheme)
    rounded = dequantize_packed(
        held.packed, held.scale, held.zero_point, held.bits, held.group_size, held.columns
    )
    return Given(rounded, scheme, held)


def tolerance(activation_bits: int, dtype: torch.dtype) -> float:
    """Return the largest error that our kernels may have."""
    return INT8_TOLERANCE if activation_bits == 8 else TOLERANCE[dtype]


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
        again = prepared.again or partial(copy.deepcopy, prepared.module)
        copied = [again() for _ in range(self.copies - 1)]
        self._modules = cycle([prepared.module, *copied])

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply by the next copy."""
        return next(self._modules)(x)
