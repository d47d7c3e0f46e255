"""Listings that save a folder: the files they left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDERS = ("gpt2-gptq-4bit", "llama-2-7b-awq", "llama-7b-gptq-4bit", "llama-7b-awq-4bit")


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bytes of the weights in the folder that the listing wrote."""
    folder = next(Path(name) for name in FOLDERS if Path(name).is_dir())
    return {"weights_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}
