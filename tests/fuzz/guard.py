"""Sees what a reader opens, writes, starts or connects to: Python's audit events (PEP 578).

An audit hook cannot be taken away again, so there is one, which does nothing outside `watched`.
What it sees is kept beside being raised: a reader may swallow an exception.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CODE = tuple(f"{place}{os.sep}" for place in {sys.prefix, sys.base_prefix, str(ROOT)})
"""Where Python code lies that a reader may import while it runs."""

FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
    "ctypes.dlopen",
)
CHANGING = (
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "os.utime",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
)
LOOKING = ("os.listdir", "os.scandir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class EscapedError(BaseException):
    """A reader touched what it has no business with; none catches it as an error of its own."""


class _State:
    """The folder that may be touched now (empty: nothing is watched), and what was seen."""

    folder = ""
    seen: list[str]

    def __init__(self) -> None:
        self.seen = []


@cache
def _state() -> _State:
    """Return the one state, with the hook installed behind it."""
    state = _State()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if state.folder and (wrong := _wrong(state.folder, event, arguments)):
            state.seen.append(wrong)
            raise EscapedError(wrong)

    sys.addaudithook(hook)
    return state


def _wrong(folder: str, event: str, arguments: tuple[Any, ...]) -> str:
    """Return what is wrong about an event, empty where nothing is."""
    if event == "open":
        place, _, flags = arguments
        if isinstance(place, int) or _inside(place, folder):
            return ""
        reads = not (isinstance(flags, int) and flags & WRITING)
        return "" if reads and _text(place).startswith(CODE) else f"open {place!r}"
    if event in CHANGING and not all(_inside(place, folder) for place in _places(arguments)):
        return f"{event} {arguments!r}"
    if event in LOOKING and not _inside(arguments[0], folder):
        return "" if _text(arguments[0]).startswith(CODE) else f"{event} {arguments!r}"
    return f"{event} {arguments!r:.200}" if event.startswith(FORBIDDEN) else ""


def _places(arguments: tuple[Any, ...]) -> list[Any]:
    return [place for place in arguments if isinstance(place, str | bytes | os.PathLike)]


def _text(place: Any) -> str:
    # A NUL makes the operating system refuse; it is no path at all.
    # Not resolved: what is a link is looked at apart.
    return os.path.abspath(os.fsdecode(place)) if place is not None else ""  # noqa: PTH100


def _inside(place: Any, folder: str) -> bool:
    found = _text(place)
    if found != folder and not found.startswith(folder + os.sep):
        return False
    # Links lead elsewhere; only what is there can be one.
    resolved = os.path.realpath(found)
    return resolved == folder or resolved.startswith(folder + os.sep)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Raise EscapedError where the block touches more than `folder` and the code of Python.

    Not for blocks within blocks, nor for several threads.
    """
    state = _state()
    state.folder, state.seen = str(folder), []
    try:
        yield
    finally:
        state.folder = ""
    if state.seen:
        raise EscapedError("; ".join(state.seen))
