"""Files that are being written: named after their writer, and removed once it has ended.

`write_atomically` of `harness.record` and the folders of unfinished artefacts use these names, so
that what a killed process left can be told from what another one is writing. Standard library only.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.owner import Owner, parse_owner, this_process

SUFFIX = ".tmp"
DEPTH = 4
"""Folders below the run folder in which something is written: `cache/reference/<kind>/`."""
OLD_SECONDS = 7 * 24 * 3600
"""What another machine has not touched for so long is given up: longer than any child works before
it writes, since the time of a folder is that of its last new entry."""


def temporary_beside(path: Path) -> Path:
    """Return a path beside `path` that no other writer uses."""
    return path.with_name(f".{path.name}.{this_process().token}.{secrets.token_hex(4)}{SUFFIX}")


def remove_abandoned(folder: Path, now: float, depth: int = DEPTH) -> list[Path]:
    """Remove what ended processes were writing in `folder` and `depth` levels of folders in it.

    Returns what was removed.

    `now` is the file system's own time (seconds since the epoch), as of a file just written: a
    writer on another machine cannot be asked whether it lives, so its file has to be a week old.
    What another user left, or lies where nothing can be written, stays.
    """

    def abandoned(path: Path, owner: Owner) -> bool:
        return owner.ended() or now - path.lstat().st_mtime >= OLD_SECONDS

    return _remove(folder, depth, abandoned)


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove what anybody was writing in `folder` and the folders in it; return what was removed.

    For who has just taken `folder` over: a writer that stood still ever since its last look at its
    claim then finds nothing to give a name to.
    """
    return _remove(folder, DEPTH, lambda path, owner: True)


def _remove(folder: Path, depth: int, which: Callable[[Path, Owner], bool]) -> list[Path]:
    removed = []
    for path in _temporaries(str(folder), depth):
        owner = parse_owner(path.name)
        try:
            if owner is None or not which(path, owner):
                continue
            remove(path)
        except OSError:
            continue
        removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it; a link itself and never what it points at."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _temporaries(folder: str, depth: int) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") and entry.name.endswith(SUFFIX):
            yield Path(entry.path)
        elif depth > 1 and entry.is_dir(follow_symlinks=False):
            yield from _temporaries(entry.path, depth - 1)
