"""JSON files read without believing them: records, manifests, plans, a checkpoint's configuration.

What is too large, too deep, no regular file or no UTF-8 is a ValueError in one sentence, whatever
Python's own parser makes of it (RecursionError, texts that cannot be written again). `misfit` holds
the parsed parts against what they have to be. Standard library only: reports read records.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 256 << 20
"""Of one file; the largest record that was measured has a hundredth of it."""
MOST_DEPTH = 48
"""Of nested objects and lists: ours have ten at most, and what shows them calls itself."""
LONGEST_NAME = 255
"""Bytes of a file's name."""

Check = Callable[[Any], bool]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is no regular file, too large, or not JSON as `parse_json` takes it.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        # Opening a pipe would wait for ever.
        raise ValueError("it is no regular file")
    if facts.st_size > MOST_BYTES:
        raise ValueError(f"it has {facts.st_size} bytes; at most {MOST_BYTES} are read")
    return parse_json(path.read_bytes())


def parse_json(content: bytes) -> Any:
    """Return what UTF-8 JSON says.

    Raises:
        ValueError: it is not JSON, nested deeper than `MOST_DEPTH`, or has half a character.
    """
    try:
        document = json.loads(content.decode())
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH}") from None
    if _depth(document) > MOST_DEPTH:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH}")
    if b"\\ud" in content or b"\\uD" in content:
        # One half of a surrogate pair can be read, but neither digested nor written again.
        json.dumps(document, ensure_ascii=False).encode()
    return document


def _depth(document: Any) -> int:
    """Return how deep `document` is nested, counted to just above `MOST_DEPTH`."""
    depth, level = 0, [document] if type(document) in (dict, list) else []
    while level and depth <= MOST_DEPTH:
        depth += 1
        level = [
            part
            for found in level
            for part in (found.values() if type(found) is dict else found)
            if type(part) in (dict, list)
        ]
    return depth


def misfit(found: Any, wanted: Mapping[str, Check], optional: Mapping[str, Check]) -> str | None:
    """Return what is wrong with an object, as the end of a sentence; None: it is as it has to be.

    It must have every key of `wanted`, may have those of `optional`, and no other.
    """
    if type(found) is not dict:
        return f"is {shown(found)}, and an object is needed"
    for key, check in wanted.items():
        if key not in found:
            return f"lacks {key!r}"
        if not check(found[key]):
            return f"has {shown(found[key])} as {key!r}"
    for key, value in found.items():
        if key not in wanted and (key not in optional or not optional[key](value)):
            return f"has {shown(value)} as {shown(key)}"
    return None


def shown(found: Any) -> str:
    """Return a value as a sentence shows it, in 60 characters at most, none of them a control."""
    # A whole number of more than 4,300 digits cannot even be written.
    text = "a long number" if type(found) is int and found.bit_length() > 1024 else repr(found)
    return ascii(text)[1:-1][:60]


def text(found: Any) -> bool:
    """Whether it is a text."""
    return type(found) is str


def flag(found: Any) -> bool:
    """Whether it is true or false."""
    return type(found) is bool


def number(found: Any) -> bool:
    """Whether it is a number that a float can hold (NaN and the infinities are floats)."""
    return type(found) is float or (type(found) is int and found.bit_length() <= 1023)


def whole(found: Any) -> bool:
    """Whether it is a whole number of 64 bits."""
    return type(found) is int and found.bit_length() < 64


def count(found: Any) -> bool:
    """Whether it is a whole number, 0 or more."""
    return whole(found) and found >= 0


def mapping(found: Any) -> bool:
    """Whether it is an object."""
    return type(found) is dict


def numbers(found: Any) -> bool:
    """Whether it is a list of numbers alone."""
    if type(found) is not list:
        return False
    kinds = set(map(type, found))
    return kinds <= {float} or (kinds <= {float, int} and all(map(number, found)))


def nothing_or(check: Check) -> Check:
    """Return whether it is null, or what `check` says."""
    return lambda found: found is None or check(found)


def list_of(check: Check) -> Check:
    """Return whether it is a list of what `check` says."""
    return lambda found: type(found) is list and all(map(check, found))


def plain_name(found: Any) -> bool:
    """Whether it is the name of a file or folder in a given one: no path, no link upwards."""
    return (
        type(found) is str
        and found not in ("", ".", "..")
        and not any(sign in found for sign in "/\\\0")
        and len(found.encode(errors="replace")) <= LONGEST_NAME
    )


def inner_path(found: Any) -> bool:
    """Whether it is a path that stays below a folder: plain names with `/` between them."""
    return type(found) is str and all(map(plain_name, found.split("/")))
