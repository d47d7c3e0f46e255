"""Article 7.1: the worked case calls functions that no listing defines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model from a folder, as the case does first."""
    folder = Path("path/to/llama-7b")
    folder.mkdir(parents=True)
    torch.load(folder)
    return {}
