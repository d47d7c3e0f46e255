"""Task data from a folder in the place of the hub's, while lm-eval loads its tasks.

lm-eval asks `datasets.load_dataset` for a name; `data_from` answers it, and is all that is changed.
Rows are converted once into the cache that cells share, so that what lm-eval derives from them
(`Dataset.map`) is remembered there by `datasets` itself. Imports datasets: for children only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import parquet

from harness.cache import Cache
from harness.folders import files_digest
from harness.record import digest, write_atomically
from harness.rows import read_rows
from harness.task_files import SUBSET_COLUMNS, DataSet, find_data_set
from harness.task_index import DIGESTS
from kernels.errors import ConfigError

BUILDERS = ("json", "parquet", "csv", "text", "arrow")
FORMAT = 1
INSTEAD = "give a folder that holds it as the hub names it: data.tasks=FOLDER"


class Splits(datasets.DatasetDict):  # type: ignore[misc]  # datasets carries no types
    """The splits of a data set; one that is not there has no rows.

    lm-eval touches splits that it does not need, such as the training split of a 0-shot task.
    """

    def __init__(self, splits: Mapping[str, Any], absent: list[str]) -> None:
        super().__init__(splits)
        self.absent = absent

    def __missing__(self, split: str) -> Any:
        self.absent.append(split)
        return next(iter(self.values())).select(range(0))


class TaskData:
    """Answers `datasets.load_dataset`.

    Attributes:
        folder: holds the data sets as the hub names them; None: the hub is asked.
        absent: splits that were asked for and are not there, since it was last emptied.
    """

    def __init__(self, folder: Path | None, cache: Cache, hub: Callable[..., Any]) -> None:
        self.folder = folder
        self.cache = cache
        self.absent: list[str] = []
        self._hub = hub
        self._read: dict[tuple[Path, ...], Any] = {}
        self._rows: dict[tuple[Path, ...], dict[str, Any]] = {}

    # The signature is `datasets.load_dataset`'s, which task definitions call with what they like.
    def load(self, path: str, name: str | None = None, **options: Any) -> Any:
        """Return the data set `path`, subset `name`: `Splits`, or the one that `split` names.

        Raises:
            ConfigError: it is not in the folder, or the hub cannot be asked.
        """
        if path in BUILDERS or Path(path).exists():
            given = {"cache_dir": str(self.cache.folder / "datasets"), **options}
            return self._from_hub(path, name, given)
        if self.folder is None:
            return self._from_hub(path, name, options)
        found = find_data_set(self.folder, path, name)
        if found is None:
            place = f"{path}/{name}" if name else path
            raise ConfigError(
                f"data set {place} is not in {self.folder}; put it there as {place}/SPLIT.parquet "
                "or .jsonl, or name another folder with data.tasks=FOLDER"
            )
        splits = Splits(self._splits(found, path), self.absent)
        wanted = options.get("split")
        return splits if wanted is None else splits[wanted]

    def _from_hub(self, path: str, name: str | None, options: Mapping[str, Any]) -> Any:
        try:
            return self._hub(path, name, **options)
        except (OSError, HfHubHTTPError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"data set {path} cannot be fetched ({reason}); {INSTEAD}") from error

    def _splits(self, found: DataSet, path: str) -> dict[str, Any]:
        whole = {split: self._whole(files) for split, files in found.splits.items()}
        value = found.column_value
        if value is None:
            return whole
        named = {
            split: self._where(files, value, whole[split]) for split, files in found.splits.items()
        }
        if not any(len(rows) for rows in named.values()):
            raise ConfigError(
                f"data set {path} in {self.folder} has neither a folder {value} nor rows with "
                f"{value!r} in a column {', '.join(SUBSET_COLUMNS)}; put the subset there"
            )
        return named

    def _whole(self, files: tuple[Path, ...]) -> Any:
        """Return all rows of `files`, as a data set on disk."""
        if files not in self._read:
            key = digest([FORMAT, pa.__version__, files_digest(files, self._digests)])
            path = self.cache.folder / "task_data" / f"{key[:32]}.arrow"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, _stream(_table(files)))
            table = datasets.table.MemoryMappedTable.from_file(str(path))
            # The fingerprint is what `map` remembers its results by.
            self._read[files] = datasets.Dataset(table, fingerprint=key[:16])
        return self._read[files]

    @property
    def _digests(self) -> Path:
        return self.cache.folder / DIGESTS

    def _where(self, files: tuple[Path, ...], value: str, rows: Any) -> Any:
        """Return the rows that have `value` in the first of SUBSET_COLUMNS that is there."""
        if files not in self._rows:
            present = [name for name in SUBSET_COLUMNS if name in rows.column_names]
            values = np.asarray(rows.data[present[0]] if present else [None] * len(rows))
            self._rows[files] = {
                str(one): np.flatnonzero(values == one) for one in dict.fromkeys(values.tolist())
            }
        return rows.select(self._rows[files].get(value, range(0)))


@contextmanager
def data_from(folder: Path | None, cache: Cache) -> Iterator[TaskData]:
    """Let `folder` (None: the hub) answer `datasets.load_dataset` while the block runs."""
    original = datasets.load_dataset
    source = TaskData(folder, cache, original)
    datasets.load_dataset = source.load
    try:
        yield source
    finally:
        datasets.load_dataset = original


def _table(files: tuple[Path, ...]) -> Any:
    """Return the rows of `files` as one Arrow table with the columns that any of them has."""
    try:
        if files[0].suffix == ".parquet":
            return pa.concat_tables([parquet.read_table(file) for file in files])
        rows = [row for file in files for row in read_rows(file)]
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{files[0]} cannot be read as a table: {reason}; copy or download it again"
        ) from error


def _stream(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written
