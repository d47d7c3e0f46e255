"""What of a suite's tasks belongs into a cell's key: their data, and the user's definitions.

Data in a folder count by the contents of exactly the data sets that the tasks use. Of data from
the hub the names are known, which stand in the suite, and lm-eval's version: a change there makes
no new cell. The embedded tasks count with the code. Torch-free: the driver asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.embedded.tasks import NAMES
from harness.folders import files_digest
from harness.task_files import find_data_set, include_folder, tree_digest
from harness.task_index import DIGESTS, Part, parts_of


def task_identity(
    measures: Iterable[Mapping[str, Any]], folder: Path | None, cache: Path
) -> list[dict[str, Any]]:
    """Return JSON that changes with the tasks' data and definitions; empty where there is nothing.

    `measures` are nodes of a suite, `folder` holds the data (None: the hub), `cache` is what cells
    share.

    Raises:
        ConfigError: a task is unknown, or the include folder is not there.
    """
    found = [_identity(node, folder, cache) for node in measures if node.get("tasks")]
    return found if any(found) else []


def _identity(node: Mapping[str, Any], folder: Path | None, cache: Path) -> dict[str, Any]:
    include = include_folder(node.get("include"))
    names = [name for name in node["tasks"] if include is not None or name not in NAMES]
    if not names or (folder is None and include is None):
        return {}
    parts = parts_of(names, include, cache)
    digests = cache / DIGESTS
    found: dict[str, Any] = {
        "files": sorted({files_digest([Path(name)], digests) for p in parts for name in p.files})
    }
    if include is not None:
        found["include"] = tree_digest(include, digests)
    if folder is not None:
        found["data"] = _data_sets(parts, folder, digests)
    return found


def _data_sets(parts: Iterable[Part], folder: Path, digests: Path) -> dict[str, Any]:
    """Return data set and subset -> split -> digest of its files; None for one that is absent."""
    wanted = {(p.dataset, p.subset) for p in parts if p.dataset is not None and not p.files}
    known: dict[tuple[Path, ...], str] = {}
    described: dict[str, Any] = {}
    for name, subset in wanted:
        found = find_data_set(folder, name, subset)
        described[f"{name} {subset}"] = found and {
            split: known.get(files) or known.setdefault(files, files_digest(files, digests))
            for split, files in found.splits.items()
        }
    return described
