"""Which module has which target; a module is imported when one of its targets is asked for."""

from __future__ import annotations

from importlib import import_module

from tests.fuzz.target import Target

GROUPS = {
    **dict.fromkeys(("record", "manifest", "plan"), "records"),
    **dict.fromkeys(("artefact", "cache", "safetensors", "checkpoint"), "weights"),
    **dict.fromkeys(("gguf", "gguf_vocabulary", "nanogpt_meta", "nanogpt_checkpoint"), "models"),
    **dict.fromkeys(("folder", "rows"), "models"),
    **dict.fromkeys(("documents", "published", "cards", "advice", "listings"), "texts"),
    "values": "values",
}
"""Name of a target -> the module of `tests.fuzz` that has it."""


def load(name: str) -> Target:
    """Return the target called `name`."""
    found: tuple[Target, ...] = import_module(f"tests.fuzz.{GROUPS[name]}").TARGETS
    return next(target for target in found if target.name == name)
