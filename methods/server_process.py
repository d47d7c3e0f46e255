"""A server of our own as a child process: started, waited for, and stopped in every case.

The child stays in the process group of its parent and asks the kernel to be killed when the parent
ends (`PR_SET_PDEATHSIG`), so that no way of ending leaves it behind. The signal is sent when the
*thread* that started the child ends, so a thread of its own starts it and waits for it. The child
chooses a free port itself; which one is read from its open sockets, so there is no moment at which
another process could take it. Its configuration, which holds a key, and its log are files in memory
without a name: nothing is left on a disk, however it ends.

Run as a script (`python -P server_process.py PARENT MODULE [ARGUMENTS]`) this file is the beginning
of the child: it asks for the signal and becomes `python -m MODULE`. Nothing but the standard
library may be imported for that.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.05
STOP_SECONDS = 3.0
LAST_WORDS_BYTES = 4000
LAST_LINES = 3


class ServerProcess:
    """A running `python -m MODULE OPTION FILE`, where FILE holds `configuration`."""

    def __init__(
        self, module: str, option: str, configuration: str, environment: Mapping[str, str]
    ) -> None:
        self._log: int | None = os.memfd_create("log")
        given = os.memfd_create("configuration")
        os.write(given, configuration.encode())
        self._given = given
        self._command = [
            *(sys.executable, "-P", str(Path(__file__).resolve())),
            *(str(os.getpid()), module, option, f"/dev/fd/{given}"),
        ]
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: list[OSError] = []
        started = Event()
        Thread(target=self._hold, args=(started,), name=f"holds {module}", daemon=True).start()
        started.wait()
        os.close(given)
        if self._errors:
            self._forget_log()
            raise self._errors[0]

    def _hold(self, started: Event) -> None:
        """Start the child and outlive it."""
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=[self._given],
            )
        except OSError as error:
            self._errors.append(error)
        started.set()
        if self._process is not None:
            self._process.wait()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._running().pid

    @property
    def exit_code(self) -> int | None:
        """How the child ended (minus the signal, if one ended it); None while it runs."""
        return self._running().poll()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def wait_for(self, is_up: Callable[[], bool], seconds: float) -> str | None:
        """Wait until `is_up`; return None then, else why it did not come to that.

        The child's end is noticed at once.
        """
        deadline = time.monotonic() + seconds
        while True:
            code = self.exit_code
            if code is not None:
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                return f"it ended with {how}{self.last_words()}"
            if is_up():
                return None
            if time.monotonic() > deadline:
                return f"it was not up within {seconds:g} seconds{self.last_words()}"
            time.sleep(POLL_SECONDS)

    def port(self) -> int | None:
        """Return the loopback port that the child listens on, None while it does not."""
        import psutil

        try:
            sockets = psutil.Process(self.pid).net_connections(kind="tcp4")
        except psutil.Error:
            return None
        ports = [int(one.laddr.port) for one in sockets if one.status == psutil.CONN_LISTEN]
        return ports[0] if ports else None

    def last_words(self) -> str:
        """Return the end of the child's log as the end of a sentence; empty where it is empty."""
        if self._log is None:
            return ""
        begin = max(0, os.fstat(self._log).st_size - LAST_WORDS_BYTES)
        text = os.pread(self._log, LAST_WORDS_BYTES, begin).decode(errors="replace")
        lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
        return f"; its last words: {' | '.join(lines[-LAST_LINES:])}" if lines else ""

    def stop(self) -> None:
        """End the child: SIGTERM, then SIGKILL. A second call does nothing."""
        process = self._running()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._forget_log()

    def _forget_log(self) -> None:
        if self._log is not None:
            os.close(self._log)
        self._log = None


def become(parent: int, module: str, arguments: Sequence[str]) -> None:
    """Ask to be killed when `parent` ends, then run `module` as `python -m` does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before the kernel was asked.
        os._exit(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
