"""The server of children outlives a terminal's Ctrl-C from its first moment."""

from __future__ import annotations

import subprocess
import sys

DRIVER = """
import os, signal
from multiprocessing import forkserver

from harness import fork_server

fork_server._context().set_forkserver_preload([])
fork_server._start_server()
server = forkserver._forkserver._forkserver_pid
os.kill(server, signal.SIGINT)
child = fork_server.start(print, ("forked",))
child.join()
assert forkserver._forkserver._forkserver_pid == server, "it had to be started again"
raise SystemExit(child.exitcode)
"""


def test_ctrl_c_while_the_server_starts_does_not_end_it() -> None:
    done = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "forked\n", "")
