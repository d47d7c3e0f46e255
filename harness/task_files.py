"""Where task data lie in a folder, and the user's folder of task definitions. Torch-free.

A data set is `<folder>/<owner>/<dataset>[/<subset>]/<split>` in any row format, as the hub names
them; the owner may be left out. Where the subset has no folder of its own, a column of the rows
may name it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.folders import files_digest
from harness.record import digest
from harness.rows import ROW_FORMATS, split_files
from kernels.errors import ConfigError

DEFAULT_SUBSETS = (None, "default")
SUBSET_COLUMNS = ("subject", "subset", "config")
SHARD = r"-\d{5}-of-\d{5}\.parquet"


@dataclass(frozen=True)
class DataSet:
    """What a folder has of one data set.

    Attributes:
        splits: name -> its files.
        column_value: value that one of SUBSET_COLUMNS must have; None: all rows count.
    """

    splits: Mapping[str, tuple[Path, ...]]
    column_value: str | None = None


def find_data_set(folder: Path, name: str, subset: str | None) -> DataSet | None:
    """Return the files of a data set, None where `folder` has none of them."""
    for base in dict.fromkeys((folder / name, folder / name.rpartition("/")[2])):
        whole = [base, base / "default", base / "data"]
        own = whole if subset in DEFAULT_SUBSETS else [base / str(subset)]
        for place in own:
            splits = splits_in(place)
            if splits:
                return DataSet(splits)
        splits = splits_in(base)
        if splits:
            return DataSet(splits, subset)
    return None


def splits_in(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Return split -> its files, of all splits whose files lie in `folder`."""
    if not folder.is_dir():
        return {}
    endings = "|".join([SHARD, *map(re.escape, ROW_FORMATS)])
    matches = [re.fullmatch(f"(.+?)({endings})", path.name) for path in sorted(folder.iterdir())]
    names = dict.fromkeys(match[1] for match in matches if match)
    return {name: tuple(split_files(folder, name)) for name in names}


def include_folder(value: str | None) -> Path | None:
    """Return the folder that a measure's `include` names.

    Raises:
        ConfigError: there is none.
    """
    if value is None:
        return None
    folder = Path(value).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"include is {value}, but there is no folder {folder}; it must hold the YAML files of "
            "lm-eval tasks"
        )
    return folder


def tree_digest(folder: Path, digests: Path) -> str:
    """Return one SHA-256 over names and contents of all files under `folder`, hidden ones aside.

    `digests` remembers those of large files, as in `harness.folders`.
    """
    by_place: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith((".", "__")) for part in inside.parts):
            by_place.setdefault(inside.parent.as_posix(), []).append(path)
    return digest({place: files_digest(files, digests) for place, files in by_place.items()})
