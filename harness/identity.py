"""The two identities of a cell, computed before anything heavy is imported.

Artefact key: model, method with all its options, calibration text, seed, and the versions of the
code and libraries that make the artefact. Cell key: artefact key, hardware and machine, suite,
evaluation text, baseline, and the versions of the code that measures. Code counts by the digest of
its source files, so no result of older code is ever taken for one of today's.
"""

from __future__ import annotations

import ast
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from harness.hardware import machine_name, package_versions
from harness.record import digest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "kernels", "methods")
KEY_LENGTH = 12


def code_digest(*modules: str) -> str:
    """Return one digest over the source of `modules` and of all of the project they import.

    A folder that bears a module's name holds its data (`tasks.py`, `tasks/`) and counts with it.
    """
    sources: set[Path] = set()
    waiting = {path for module in modules for path in _files_of(module)}
    while waiting:
        path = waiting.pop()
        if path not in sources:
            sources.add(path)
            waiting |= _imports(path)
    data = {
        file
        for source in sources
        for file in source.with_suffix("").glob("*")
        if source.name != "__init__.py" and file.is_file()
    }
    state = hashlib.sha256()
    for path in sorted(sources | data):
        state.update(path.relative_to(ROOT).as_posix().encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def _files_of(module: str) -> set[Path]:
    """Return the project files that importing `module` (or a name inside one) runs."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return set()
    paths = [ROOT.joinpath(*parts[:length]) for length in range(1, len(parts) + 1)]
    candidates = [
        file for path in paths for file in (path / "__init__.py", path.with_suffix(".py"))
    ]
    return {path for path in candidates if path.is_file()}


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Return the project files that the source at `path` imports, at whatever depth it does so."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found.update(*(_files_of(name) for name in names))
    return frozenset(found)


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
            "code": code_digest("harness.quantize", method["_target_"]),
            "packages": _library_versions(),
        }
    )


def cell_key(artefact: str, baseline: str, config: dict[str, Any], evaluation: str) -> str:
    """Return the key of the cell that measures `artefact` as `config` says."""
    return digest(
        {
            "artefact": artefact,
            "baseline": baseline,
            "hardware": _hardware(config),
            "machine": machine_name(config["hardware"]["device"]),
            "suite": config["suite"],
            "evaluation": evaluation,
            "reference_dtype": config["reference_dtype"],
            "code": measuring_code(config),
            "packages": _library_versions(),
        }
    )


def measuring_code(config: dict[str, Any]) -> str:
    """Return the digest of the code that measures a cell: its method's loading code included."""
    methods = (config["method"]["_target_"], config["baseline"]["_target_"])
    return code_digest("harness.measure", "harness.sizes", *methods, *_measures(config))


def reference_key(model: str, config: dict[str, Any], evaluation: str) -> str:
    """Return the key of what the unquantized model says to a suite; no method changes it."""
    return digest(
        {
            "model": model,
            "hardware": _hardware(config),
            "suite": config["suite"],
            "evaluation": evaluation,
            "seed": config["seed"],
            "dtype": config["reference_dtype"],
            "code": code_digest("harness.reference", *_measures(config)),
            "packages": _library_versions(),
        }
    )


def _measures(config: dict[str, Any]) -> list[str]:
    return [node["_target_"] for node in config["suite"]["measures"].values()]


def _hardware(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of the hardware a figure depends on; limits only decide whether there is one."""
    limits = ("memory_limit_bytes", "time_limit_seconds")
    return {key: value for key, value in config["hardware"].items() if key not in limits}


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
