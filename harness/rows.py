"""Rows of data sets on disk, as the hub lays them out, and plain text files. Torch-free."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels.errors import ConfigError

ROW_FORMATS = (".jsonl.gz", ".json.gz", ".jsonl", ".parquet")


def read_text(path: Path, role: str) -> str:
    """Return the content of a UTF-8 text file; ConfigError (`role` named) where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{role}: {path} cannot be read ({error.strerror}); give a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{role}: {path} is not UTF-8 text ({error.reason})") from error
    if not text.strip():
        raise ConfigError(f"{role}: {path} holds no text")
    return text


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of one split: `<split>.<format>`, or the hub's `<split>-*.parquet`."""
    for ending in ROW_FORMATS:
        if (folder / f"{split}{ending}").is_file():
            return [folder / f"{split}{ending}"]
    return sorted(folder.glob(f"{split}-*.parquet"))


def column(files: Sequence[Path], name: str) -> list[str]:
    """Return one text column of all rows of `files`; raises ConfigError where it is missing."""
    found = [cell(row, name, file) for file in files for row in read_rows(file)]
    if not any(text.strip() for text in found):
        raise ConfigError(f"{files[0]} holds no text in column {name!r}")
    return found


def cell(row: Mapping[str, Any], name: str, file: Path) -> str:
    """Return the text in one column of a row of `file`; raises ConfigError where it has none."""
    value = row.get(name)
    if not isinstance(value, str):
        columns = ", ".join(sorted(row))
        raise ConfigError(f"{file} has no text column {name!r}; its columns are {columns}")
    return value


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .parquet file, or of one with a JSON object a line, gzipped or not.

    Raises:
        ConfigError: the file is damaged; the sentence names it.
    """
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
            return
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a line is not a JSON object")
                yield row
    except (OSError, EOFError, ValueError, RecursionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read: {reason}; copy or download it again") from error
