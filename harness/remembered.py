"""What is remembered only to save time: JSON with its digest, absent where it does not verify.

A file whose bits have changed may still be JSON, and a changed digit in it a wrong answer. So what
does not verify is as if it had never been written, and what cannot be written is not remembered.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.json_file import read_json
from harness.record import digest, write_atomically


def recall(path: Path) -> Any:
    """Return what was remembered in `path`, None where there is nothing that verifies."""
    try:
        document = read_json(path)
    except (OSError, ValueError):
        return None
    content = document.get("content") if isinstance(document, dict) else None
    return content if content is not None and document.get("digest") == digest(content) else None


def remember(path: Path, content: Any) -> None:
    """Write `content` (JSON) to `path`; without room for it, it is not remembered."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"digest": digest(content), "content": content}
        write_atomically(path, json.dumps(document, indent=1).encode())
