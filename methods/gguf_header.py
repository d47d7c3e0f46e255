"""The header of a GGUF file: metadata and places of the tensors, read without believing it.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md), versions 2 and 3, little endian. Every
count is held against the length of the file before anything is made for it; `gguf.GGUFReader`
believes what a damaged file states and fills the memory with it. Importing this imports no gguf.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from kernels.errors import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_DIMENSIONS = 4
# No vocabulary comes near; a file that states more is damaged, and walking it would take minutes.
MOST_ITEMS = 1 << 22
# The largest models have some thousands of each.
MOST_ENTRIES = 1 << 16
STRING, ARRAY = 8, 9
# Value types of the specification, as struct formats; strings and arrays stand apart.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: ggml's type name (`Q4_K`), bytes of its data, shape as [out, in]."""

    type: str
    bytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What stands before the data: metadata by key; (tensor, offset in the file) by name."""

    fields: dict[str, Any]
    tensors: dict[str, tuple[StoredTensor, int]]


class _DamagedError(Exception):
    """Says what the header states that the file cannot hold."""


class _Cursor:
    """Reads values one after the other and never past the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if count > self.left():
            raise _DamagedError(f"it ends inside its header, at byte {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        text = self.take(self.number("Q"))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise _DamagedError("its header has a text that is not UTF-8") from None

    def count(self, smallest: int, what: str, most: int = MOST_ITEMS) -> int:
        """Return a count of things of `smallest` bytes or more, which must fit in."""
        count: int = self.number("Q")
        if count > most or count * smallest > self.left():
            raise _DamagedError(f"its header states {count} {what}, more than it can hold")
        return count

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise _DamagedError(f"its header has a value of unknown type {kind}")
        return self.number(SCALARS[kind])

    def array(self) -> list[Any]:
        kind = self.number("I")
        if kind == STRING:
            count = self.count(8, "texts")
            # Vocabularies have pieces that are no whole characters.
            return [self.take(self.number("Q")).decode(errors="replace") for _ in range(count)]
        if kind not in SCALARS:
            raise _DamagedError(f"its header has an array of type {kind}")
        size = struct.calcsize(f"<{SCALARS[kind]}")
        count = self.count(size, "numbers")
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size)))


def read_header(path: Path) -> Header:
    """Return metadata and places of the tensors of the GGUF file `path`; no data is read.

    Raises:
        ConfigError: the file is missing, no GGUF file, one of several parts, truncated or damaged.
    """
    require_gguf()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _walk(_Cursor(data))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # mapping an empty file
        raise ConfigError(f"{path} is no GGUF file: it is empty") from error
    except _DamagedError as error:
        raise ConfigError(
            f"{path} is no GGUF file that can be read: {error}; download or write it again"
        ) from error


def require_gguf() -> None:
    """Raise ConfigError where the gguf package, which knows the block formats, is missing."""
    if find_spec("gguf") is None:
        raise ConfigError(
            "reading a GGUF file needs the package gguf, which is not installed here; install it: "
            "python -m pip install --constraint constraints.txt gguf"
        )


def _walk(cursor: _Cursor) -> Header:
    if cursor.take(4) != MAGIC:
        raise _DamagedError("it does not begin with the letters GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise _DamagedError(
            f"its version is {version}, and versions 2 and 3 (little endian) are known"
        )
    tensor_count = cursor.count(24, "tensors", MOST_ENTRIES)
    fields: dict[str, Any] = {}
    for _ in range(cursor.count(13, "values", MOST_ENTRIES)):
        key = cursor.string()
        if key in fields:
            raise _DamagedError(f"its header states {key!r:.80} twice")
        fields[key] = cursor.value(cursor.number("I"))
    if fields.get("split.count", 1) != 1:
        raise _DamagedError("it is one of several parts; join them with llama-gguf-split --merge")
    infos = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamagedError(f"its alignment is {alignment!r:.40}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, tuple[StoredTensor, int]] = {}
    for name, tensor, offset in infos:
        if name in tensors:
            raise _DamagedError(f"tensor {name!r:.80} stands in it twice")
        if start + offset + tensor.bytes > len(cursor.data):
            raise _DamagedError(
                f"it is truncated: tensor {name!r:.80} ends behind the end of the file"
            )
        tensors[name] = (tensor, start + offset)
    return Header(fields, tensors)


def _tensor(cursor: _Cursor) -> tuple[str, StoredTensor, int]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string()
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise _DamagedError(f"tensor {name!r:.80} has {dimensions} dimensions")
    widths = [cursor.number("Q") for _ in range(dimensions)]
    number, offset = cursor.number("I"), cursor.number("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise _DamagedError(f"tensor {name!r:.80} is of an unknown type, number {number}") from None
    block, size = GGML_QUANT_SIZES[kind]
    if widths[0] % block or 0 in widths:
        raise _DamagedError(
            f"rows of tensor {name!r:.80} are {widths[0]} wide, which {kind.name} is not"
        )
    return name, StoredTensor(kind.name, prod(widths) // block * size, tuple(widths[::-1])), offset
