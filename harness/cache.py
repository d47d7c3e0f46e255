"""Things computed once and used by many cells: tokenized text, the reference's outputs.

An entry is one file: a SHA-256 digest of the rest, then safetensors bytes. It is written to a
temporary file and renamed, verified at each read, and treated as absent when it does not verify,
so a torn or damaged entry is rebuilt and never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from harness.record import digest, write_atomically

DIGEST_BYTES = 32


@dataclass(frozen=True)
class Cache:
    """Verified entries under one folder, each named by a digest of what it was made from."""

    folder: Path

    def path(self, kind: str, key: Any) -> Path:
        """Return the file of the entry `key` (any JSON) of `kind`."""
        return self.folder / kind / f"{digest(key)[:32]}.safetensors"

    def read(self, kind: str, key: Any) -> dict[str, Tensor] | None:
        """Return the entry's tensors, or None where it is absent or does not verify."""
        try:
            content = self.path(kind, key).read_bytes()
        except FileNotFoundError:
            return None
        body = content[DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != content[:DIGEST_BYTES]:
            return None
        try:
            tensors: dict[str, Tensor] = from_bytes(body)
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
            # Its digest is right: written by something else, or in a type that torch has not.
            return None
        return tensors

    def write(self, kind: str, key: Any, tensors: dict[str, Tensor]) -> None:
        """Write an entry, whole or not at all."""
        path = self.path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        body = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_atomically(path, hashlib.sha256(body).digest() + body)

    def get(self, kind: str, key: Any, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the entry, built and written first where it is absent or damaged."""
        tensors = self.read(kind, key)
        if tensors is None:
            tensors = build()
            self.write(kind, key, tensors)
        return tensors
