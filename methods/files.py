"""Files of a checkpoint that somebody else has made: taken, and read without believing them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kernels.errors import ConfigError

MOST_JSON_BYTES = 64 << 20
"""Of a configuration; those of checkpoints with a rule for each matrix have a hundredth of it."""
MOST_DEPTH = 100
"""Brackets that may be open at once; what is nested deeper cannot even be shown by Python."""


def take(source: Path, target: Path) -> None:
    """Link a file, or copy it where the two folders are on different file systems."""
    try:
        # The hub's cache holds links; what they lead to is linked.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint.

    Raises:
        ConfigError: there is no such file, it is too large, or it holds something else.
    """
    try:
        if path.stat().st_size > MOST_JSON_BYTES or not path.is_file():
            raise ConfigError(f"{path} is no file of at most {MOST_JSON_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        if (
            max(accumulate((sign in "[{") - (sign in "]}") for sign in text), default=0)
            > MOST_DEPTH
        ):
            raise ConfigError(f"{path} is nested deeper than {MOST_DEPTH}")
        found = json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object; download it again")
    return found


def whole(found: Any, least: int, most: int) -> bool:
    """Whether it is a whole number (true and false are none) from `least` to `most`."""
    return type(found) is int and least <= found <= most


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Give the tensors of a safetensors file (`safetensors.safe_open`).

    Raises:
        ConfigError: its header or its length says something that cannot be.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} cannot be read as safetensors: {reason}") from error
