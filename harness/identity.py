"""The two identities of a cell, computed before anything heavy is imported.

Artefact key: model, method with all its options, calibration text, seed, and the versions of the
code and libraries that make the artefact. Cell key: artefact key, hardware and machine, suite,
evaluation text, baseline, and the versions of the code that measures. Code counts by the digest of
its source files, so no result of older code is ever taken for one of today's.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from harness.hardware import machine_name, package_versions
from harness.record import digest

ROOT = Path(__file__).resolve().parent.parent
QUANTIZING_CODE = (
    "methods/base.py",
    "methods/layers.py",
    "methods/affine.py",
    "methods/linear.py",
    "methods/artefact.py",
    "kernels/pack.py",
    "harness/load.py",
    "harness/quantize.py",
)
MEASURING_CODE = (
    "kernels/ops.py",
    "kernels/reference.py",
    "methods/engine.py",
    "harness/measure.py",
    "harness/reference.py",
    "harness/context.py",
    "harness/data.py",
    "harness/sizes.py",
    "harness/measures/*.py",
)
KEY_LENGTH = 12


@cache
def code_digest(patterns: tuple[str, ...]) -> str:
    """Return one digest over the project's source files that match `patterns`."""
    state = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            state.update(path.relative_to(ROOT).as_posix().encode())
            state.update(path.read_bytes())
    return state.hexdigest()


def method_source(node: dict[str, Any]) -> str:
    """Return the project file of a method's node (`methods.rtn.RTN` -> methods/rtn.py)."""
    return node["_target_"].rpartition(".")[0].replace(".", "/") + ".py"


def artefact_key(
    model: dict[str, Any], method: dict[str, Any], calibration: str | None, seed: int
) -> str:
    """Return the key of the artefact that `method` makes of `model` (identities as JSON)."""
    return digest(
        {
            "model": model,
            "method": method,
            "calibration": calibration,
            "seed": seed,
            "code": code_digest((*QUANTIZING_CODE, method_source(method))),
            "packages": _library_versions(),
        }
    )


def cell_key(artefact: str, baseline: str, config: dict[str, Any], evaluation: str) -> str:
    """Return the key of the cell that measures `artefact` as `config` says."""
    limits = ("memory_limit_bytes", "time_limit_seconds")
    return digest(
        {
            "artefact": artefact,
            "baseline": baseline,
            "hardware": {k: v for k, v in config["hardware"].items() if k not in limits},
            "machine": machine_name(config["hardware"]["device"]),
            "suite": config["suite"],
            "evaluation": evaluation,
            "reference_dtype": config["reference_dtype"],
            "code": code_digest(MEASURING_CODE),
            "packages": _library_versions(),
        }
    )


def _library_versions() -> dict[str, str]:
    # The project's own version changes with every release; its code digest is what counts.
    return {name: v for name, v in package_versions().items() if name != "quantbench"}


def cell_id(config: dict[str, Any], key: str) -> str:
    """Return the folder name of a cell: readable axes and the start of its key."""
    method = config["method"]
    parts = [config["model"]["name"], method["name"]]
    if method.get("bits") is not None:
        parts.append(f"{method['bits']}b")
    if method.get("group_size") is not None:
        parts.append("perchannel" if method["group_size"] == -1 else f"g{method['group_size']}")
    parts += [config["hardware"]["name"], config["suite"]["name"], key[:KEY_LENGTH]]
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(part)).strip(".") or "_" for part in parts)
