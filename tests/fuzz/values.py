"""Values of the configuration: what is built of them before a cell runs, the names they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import identity, planning, units
from kernels.errors import ConfigError
from tests.fuzz.mutation import json_changes, parsed
from tests.fuzz.target import Target

BUILT = {
    "rtn": "methods.rtn.RTN",
    "hqq": "methods.hqq.HQQ",
    "gguf": "methods.gguf.Gguf",
    "prune_quant": "methods.prune_quant.PruneQuant",
    "cpu": "harness.hardware.Hardware",
    "text": "harness.data.TextFile",
    "gguf_model": "harness.gguf_model.GgufModel",
    "local": "harness.models.LocalModel",
    "hub": "harness.models.HubModel",
    "perplexity": "harness.measures.perplexity.Perplexity",
}
"""Choice -> what it is built as: a value of the command line cannot be that."""

KEY = "0123456789abcdef"


def _seeds(folder: Path) -> Sequence[bytes]:
    nodes: list[dict[str, Any]] = [
        {"choice": "rtn", "name": "rtn", "bits": 4, "group_size": 128, "symmetric": False},
        {"choice": "hqq", "name": "hqq", "bits": 4, "group_size": 64},
        {"choice": "gguf", "name": "gguf_Q4_0", "type": "Q4_0"},
        {"choice": "cpu", "name": "cpu", "device": "cpu", "threads": 1, "environment": {"A": "b"}},
        {"choice": "text", "name": "t", "text": "t", "path": "text.txt"},
        {"choice": "gguf_model", "name": "gguf", "path": "model.gguf"},
        {"choice": "local", "name": "local", "path": "model", "reference": None},
        {"choice": "hub", "name": "hub", "id": "owner/name", "config": {"model_type": "llama"}},
        {"choice": "perplexity", "protocol": "gptq", "seq_len": 128},
    ]
    names = {"model": "m", "method": "rtn", "hardware": "cpu", "suite": "smoke", "job": "cell"}
    limits = {"limit": "8GB", "share": "3%"}
    made = [json.dumps({"node": node, "names": names, **limits}).encode() for node in nodes]
    for data in made:
        # What is imported on the way is no concern of the guard.
        _read(data, folder)
    return made


def _read(data: bytes, folder: Path) -> None:
    given = parsed(data)
    if not isinstance(given, dict):
        raise ConfigError("a configuration is a mapping")
    names = given.get("names")
    if isinstance(names, dict) and {"model", "method", "hardware", "suite", "job"} <= set(names):
        config = {group: {"name": name} for group, name in names.items()}
        made = identity.cell_id(config, KEY)
        if made != Path(made).name or len(made) > identity.LONGEST_ID:
            raise AssertionError(f"a cell's folder is {made!r}")
    node = given.get("node")
    if isinstance(node, dict) and node.get("choice") in tuple(BUILT):
        values = {key: value for key, value in node.items() if not key.startswith("_")}
        target = BUILT[values.pop("choice")]
        planning._instantiate({**values, "_target_": target})
    for name, table in (("limit", units.BYTES), ("share", units.SHARES)):
        if isinstance(given.get(name), str | int | float):
            units.parse(given[name], table, name)


TARGETS = (Target("values", _read, (ConfigError,), _seeds, json_changes()),)
