"""Changes inputs by their structure, so that what is behind a digest or a length is reached.

All of it is drawn from a `random.Random` that is given.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 8, 255, 2**31, 2**63, -(2**63), 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", ".", "..", "../../escape", "/etc/passwd", "a/b", "a\\b", "a\0b", "\ud800", "x" * 300),
    *("<script>alert(1)</script>", "\x1b[31mred", "a\nb", "{{7*7}}", "nan", "1", "9" * 400),
    *("(a+)+$", "re:(a|a)*$", "re:(((", "ok", "F32", "I32", "é日"),
)
"""Values that readers stumble over."""

WORDS = (0, 1, 2, 7, 8, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
"""Counts and lengths that binary readers stumble over."""

DEEP = 40, 400, 3000
"""Nestings: of no harm, deeper than anything here, deeper than Python's stack."""


def value(generator: random.Random) -> Any:
    """Return something to stand where something else is expected; never very deep."""
    kind = generator.random()
    if kind < 0.8:
        return generator.choice(SCALARS)
    if kind < 0.9:
        return [generator.choice(SCALARS) for _ in range(generator.randrange(4))]
    return {str(generator.choice(SCALARS)): generator.choice(SCALARS)}


def change(document: Any, generator: random.Random) -> Any:
    """Return `document` (changed in place) with one part replaced, removed, doubled or wrapped."""
    owner, key = _place(document, generator)
    if owner is None:
        return value(generator)
    action = generator.randrange(8)
    if action <= 3:
        owner[key] = value(generator)
    elif action == 4:
        del owner[key]
    elif action == 5:
        other = generator.choice(list(owner)) if isinstance(owner, dict) else 0
        owner[key] = owner[other]
    elif action == 6 and isinstance(owner, dict):
        owner[str(generator.choice(SCALARS))] = owner[key]
    elif action == 6:
        owner.append(owner[key])
    else:
        owner[key] = generator.choice(([owner[key]], {"a": owner[key]}, str(owner[key])[:400]))
    return document


def _place(document: Any, generator: random.Random) -> tuple[Any, Any]:
    """Return a container in `document` and a key of it; (None, None) where there is none."""
    owner, key, node = None, None, document
    while isinstance(node, dict | list) and node and (owner is None or generator.random() < 0.8):
        owner = node
        key = (
            generator.choice(list(node))
            if isinstance(node, dict)
            else generator.randrange(len(node))
        )
        node = owner[key]
    return owner, key


def json_changes(
    seal: Callable[[Any], Any] = lambda document: document,
) -> Callable[[bytes, random.Random], bytes]:
    """Return a change of JSON inputs; `seal` repairs the digest of a changed document."""

    def mutate(data: bytes, generator: random.Random) -> bytes:
        document = parsed(data)
        for _ in range(generator.randrange(1, 4)):
            document = change(document, generator)
        if generator.random() < 0.95:
            document = seal(document)
        text = json.dumps(document)
        if generator.random() < 0.01:
            text = nested(text, generator)
        return text.encode()

    return mutate


def parsed(data: bytes) -> Any:
    """Return the content of JSON bytes, None where they are none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def nested(text: str, generator: random.Random) -> str:
    """Return JSON `text` with one empty object or null in it replaced by a deep nesting."""
    depth = generator.choice(DEEP)
    hole = generator.choice(("{}", "null", "[]", "1"))
    return text.replace(hole, "[" * depth + "]" * depth, 1)


def words(data: bytes, generator: random.Random) -> bytes:
    """Return `data` with 4 or 8 of its bytes replaced by a number that readers stumble over."""
    form = generator.choice(("<I", "<Q"))
    number = generator.choice(WORDS) % (1 << (8 * struct.calcsize(form)))
    at = generator.randrange(len(data) + 1)
    put = struct.pack(form, number)
    return data[:at] + put + data[at + (len(put) if generator.random() < 0.8 else 0) :]


def damaged(data: bytes, most: int, generator: random.Random) -> bytes:
    """Return `data` with bytes changed, cut, doubled or put in, where there is no atheris."""
    at = generator.randrange(len(data) + 1)
    action = generator.randrange(5)
    if action == 0:
        return data[:at]
    if action == 1:
        return (data[:at] + generator.randbytes(generator.randrange(1, 9)) + data[at:])[:most]
    if action == 2:
        return data[:at] + data[at + generator.randrange(1, 9) :]
    if action == 3:
        return (data[:at] + data[max(0, at - 16) :])[:most]
    return data[:at] + bytes([generator.randrange(256)]) + data[at + 1 :]


def spliced(snippets: Sequence[bytes]) -> Callable[[bytes, random.Random], bytes]:
    """Return a change that puts one of `snippets` somewhere into an input, or words, or both."""

    def mutate(data: bytes, generator: random.Random) -> bytes:
        if generator.random() < 0.4:
            data = words(data, generator)
        at = generator.randrange(len(data) + 1)
        return data[:at] + generator.choice(snippets) + data[at:]

    return mutate
