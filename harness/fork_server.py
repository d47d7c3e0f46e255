"""The server that children are forked from: it has imported what every cell needs.

Each driver has one of its own, started with the first child and again where it has ended. Its
socket stands in a folder of the driver's name. Torch-free: only the server imports torch.
"""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

from harness.owner import this_process
from harness.temporary import SUFFIX, remove

STARTS = 3
SOCKET_CHARACTERS = len("/pymp-12345678/listener-12345678")
LONGEST_SOCKET = 107
"""Characters of a socket's path (sockaddr_un of Linux, without the zero at its end)."""


def start(target: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    """Start a child that calls `target`; None where the server ends again and again.

    A server that has ended is started anew by multiprocessing; one that ends meanwhile is not.
    """
    for _ in range(STARTS):
        process = _context().Process(target=target, args=arguments, daemon=False)
        try:
            _start_server()
            process.start()
        except (EOFError, ConnectionError):
            continue
        return process
    return None


def _start_server() -> None:
    """Start the server where none runs, deaf to Ctrl-C from its first moment.

    It ignores it only after its imports, seconds in which a terminal's Ctrl-C, which all of a group
    get, would end it with a trace. A child hears it again (`harness.launch`).
    """
    resource_tracker.ensure_running()  # would unblock the signal once it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _context() -> Any:
    """Return the multiprocessing context whose server has the heavy imports."""
    _keep_socket_removable()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "harness.preload"])
    return context


@cache
def _keep_socket_removable() -> None:
    """Let the fork server's socket be in a folder of this driver's name.

    Multiprocessing removes its folder at its end. Of a driver that is killed the next run removes
    this one, as whatever else bears the name of a process that has ended.
    """
    before = tempfile.gettempdir()
    folder = Path(before) / f".quantbench.{this_process().token}{SUFFIX}"
    if len(str(folder)) + SOCKET_CHARACTERS > LONGEST_SOCKET:
        return
    folder.mkdir(exist_ok=True)
    # Multiprocessing's own folder in it is removed with priority -100.
    util.Finalize(None, remove, args=(folder,), exitpriority=-101)
    try:
        tempfile.tempdir = str(folder)
        util.get_temp_dir()
    finally:
        tempfile.tempdir = before
