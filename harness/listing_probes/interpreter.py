"""The version of the interpreter itself."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the version, as 3.11.2."""
    return {"version": platform.python_version()}
