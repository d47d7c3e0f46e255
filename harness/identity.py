"""The two identities of a cell, computed before anything heavy is imported.

Artefact key: model, method with all its options, calibration text, seed, and the versions of the
code and libraries that make the artefact. Cell key: artefact key, hardware and machine, suite,
evaluation text and task data, baseline, and the versions of the code that measures. Code counts by
the digest of its source files, so no result of older code is ever taken for one of today's;
libraries count by the versions of those that this code imports, so that a new version makes its
own cells new.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.hardware import machine_name
from harness.known import Known
from harness.record import digest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "kernels", "methods")
KEY_LENGTH = 12
LONGEST_ID = 180
"""Characters of a cell's id."""

_COMPILED = {
    ROOT / "kernels/host_build.py": ROOT / "kernels/c",
    ROOT / "kernels/compiler.py": ROOT / "kernels/cuda",
}
"""Module -> folder of the sources that it compiles: code, too, though no import names them."""


def code_digest(*modules: str) -> str:
    """Return one digest over the source of `modules` and of all of the project they import.

    A folder that bears a module's name holds its data (`tasks.py`, `tasks/`) and counts with it; so
    do the sources that a module compiles.
    """
    sources = _sources(modules)
    folders = {source.with_suffix("") for source in sources if source.name != "__init__.py"}
    folders |= {folder for module, folder in _COMPILED.items() if module in sources}
    data = {file for folder in folders for file in folder.glob("*") if file.is_file()}
    state = hashlib.sha256()
    for path in sorted(sources | data):
        state.update(path.relative_to(ROOT).as_posix().encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def library_versions(*modules: str) -> dict[str, str]:
    """Return the installed versions of the libraries that `modules` and their imports import."""
    names = {name for path in _sources(modules) for name in _imported(path)}
    tops = {name.partition(".")[0] for name in names} - set(PACKAGES)
    found = {name: _version(name) for name in sorted(tops - sys.stdlib_module_names)}
    return {name: version for name, version in found.items() if version is not None}


@cache
def _version(name: str) -> str | None:
    """Return the version of the distribution that brings module `name`, if there is one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        found = _distributions().get(name)
        return metadata.version(found[0]) if found else None


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Return top-level module -> names of the distributions that bring it (llama_cpp, yaml)."""
    return metadata.packages_distributions()


def _sources(modules: Iterable[str]) -> set[Path]:
    """Return the project's source files behind `modules`, all that they import included."""
    sources: set[Path] = set()
    waiting = {path for module in modules for path in _files_of(module)}
    while waiting:
        path = waiting.pop()
        if path not in sources:
            sources.add(path)
            waiting |= _imports(path)
    return sources


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
    return frozenset().union(*(_files_of(name) for name in _imported(path)))


@cache
def _imported(path: Path) -> frozenset[str]:
    """Return what the source at `path` imports, wherever in it: modules, and names inside them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def artefact_key(
    model: dict[str, Any],
    method: dict[str, Any],
    calibration: str | None,
    seed: int,
    known: Known | None = None,
) -> str:
    """Return the key of the artefact that `method` makes of `model` (identities as JSON).

    Here and below, `known` holds the versions of code and libraries that were looked up before.
    """
    return digest(
        {
            "model": model,
            "method": method,
            "calibration": calibration,
            "seed": seed,
            **_versions(known, "harness.quantize", *targets(method)),
        }
    )


def cell_key(
    artefact: str,
    baseline: str,
    config: dict[str, Any],
    evaluation: str,
    tasks: Sequence[Any] = (),
    known: Known | None = None,
) -> str:
    """Return the key of the cell that measures `artefact` as `config` says.

    `evaluation` is the text's digest; `tasks` what `harness.task_identity` found, and where that is
    nothing the key is that of a cell without tasks. A job of one child counts by its own module.
    """
    return digest(
        {
            **({"tasks": list(tasks)} if tasks else {}),
            "job": {key: config["job"].get(key) for key in ("child", "options")},
            "artefact": artefact,
            "baseline": baseline,
            "hardware": _hardware(config),
            "machine": config["hardware"].get("machine")
            or machine_name(config["hardware"]["device"]),
            "suite": config["suite"],
            "evaluation": evaluation,
            "reference_dtype": config["reference_dtype"],
            **_versions(known, *_measuring(config)),
        }
    )


def _measuring(config: dict[str, Any]) -> list[str]:
    """Return the modules that measure a cell: those that load its methods included."""
    methods = [*targets(config["method"]), *targets(config["baseline"])]
    child = config["job"].get("child")
    jobs = [child.partition(":")[0]] if child else []
    return ["harness.measure", "harness.sizes", *jobs, *methods, *_measures(config)]


def calibrates(node: Any) -> bool:
    """Whether a node, or one in it, is shown calibration text."""
    if isinstance(node, Mapping):
        if node.get("train") is False:
            return False  # what its calibration is for is not done
        return bool(node.get("calibration")) or any(calibrates(value) for value in node.values())
    return isinstance(node, list) and any(calibrates(value) for value in node)


def targets(node: Any) -> list[str]:
    """Return what a node and the nodes in it instantiate: methods are made of methods."""
    if isinstance(node, Mapping):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [found for value in node.values() for found in targets(value)]
    if isinstance(node, list):
        return [found for value in node for found in targets(value)]
    return []


def _versions(known: Known | None, *modules: str) -> dict[str, Any]:
    """Return what identifies the code of `modules` and the libraries under it."""

    def find() -> dict[str, Any]:
        return {"code": code_digest(*modules), "packages": library_versions(*modules)}

    return find() if known is None else known.once(("versions", *modules), find)


def reference_key(
    model: str, config: dict[str, Any], evaluation: str, known: Known | None = None
) -> str:
    """Return the key of what the unquantized model says to a suite; no method changes it."""
    return digest(
        {
            "model": model,
            "hardware": _hardware(config),
            "suite": config["suite"],
            "evaluation": evaluation,
            "seed": config["seed"],
            "dtype": config["reference_dtype"],
            **_versions(known, "harness.reference", *_measures(config)),
        }
    )


def _measures(config: dict[str, Any]) -> list[str]:
    return [node["_target_"] for node in config["suite"]["measures"].values()]


def _hardware(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of the hardware a figure depends on; limits only decide whether there is one.

    The machine has its own place in the key of a cell, and how a job is handed out is none of it.
    """
    others = ("memory_limit_bytes", "time_limit_seconds", "machine", "launch")
    return {key: value for key, value in config["hardware"].items() if key not in others}


def cell_id(config: dict[str, Any], key: str) -> str:
    """Return the folder name of a cell: readable axes and the start of its key."""
    job = config["job"]["name"]
    parts = [] if job == "cell" else [job]
    parts.append(config["model"]["name"])
    method: Mapping[str, Any] | None = config["method"]
    while method:
        parts.append(method["name"])
        if method.get("bits") is not None:
            parts.append(f"{method['bits']}b")
        if method.get("group_size") is not None:
            parts.append("perchannel" if method["group_size"] == -1 else f"g{method['group_size']}")
        method = method.get("then")
    parts += [config["hardware"]["name"], config["suite"]["name"], key[:KEY_LENGTH]]
    words = (re.sub(r"[^A-Za-z0-9.]+", "_", str(part)).strip(".") or "_" for part in parts)
    name = "-".join(words)
    # A file system takes 255 bytes, and temporary names are longer; the key tells cells apart.
    return name if len(name) <= LONGEST_ID else f"{name[: LONGEST_ID - KEY_LENGTH]}{parts[-1]}"
