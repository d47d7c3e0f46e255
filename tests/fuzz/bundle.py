"""Several files as one input: JSON, name of a file -> its content.

A content is any JSON, or `{"safetensors": header, "hex": data}` for a file of that format. An input
that is no such JSON is the first file as it is. Only the files that a target names are written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.mutation import parsed


def unpacked(data: bytes, folder: Path, names: Sequence[str]) -> None:
    """Write the files `names` of an input into `folder`; those that it lacks are removed."""
    found = parsed(data)
    if not isinstance(found, dict):
        found = {}
        (folder / names[0]).write_bytes(data)
    for name in names:
        if name in found:
            (folder / name).write_bytes(_content(found[name]))
        elif found or name != names[0]:
            (folder / name).unlink(missing_ok=True)


def _content(part: Any) -> bytes:
    if isinstance(part, dict) and "safetensors" in part:
        return safetensors(part["safetensors"], part.get("hex"))
    return json.dumps(part).encode()


def safetensors(header: Any, data: Any) -> bytes:
    """Return a file with any header and data (hexadecimal)."""
    text = json.dumps(header).encode()
    try:
        body = bytes.fromhex(data)
    except (TypeError, ValueError):
        body = b""
    return len(text).to_bytes(8, "little") + text + body


def packed(folder: Path, names: Sequence[str]) -> bytes:
    """Return the input that has the files `names` of `folder`."""
    found: dict[str, Any] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        content = path.read_bytes()
        if name.endswith(".safetensors"):
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            found[name] = {"safetensors": header, "hex": content[8 + length :].hex()}
        else:
            found[name] = json.loads(content)
    return json.dumps(found).encode()
