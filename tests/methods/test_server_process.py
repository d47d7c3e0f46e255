"""A child of our own comes up, is stopped in every case, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from threading import Thread

import psutil
import pytest

from methods.server_process import ServerProcess
from tests.methods.fake_server import wait_until

ROOT = Path(__file__).resolve().parents[2]
HTTP = """
import http.server, sys
print("the configuration says", open(sys.argv[2]).read(), flush=True)
http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler).serve_forever()
"""
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HTTP
DIES = "import sys\nprint('one')\nprint('two')\nsys.exit('no model at all')\n"


@pytest.fixture
def modules(tmp_path: Path) -> dict[str, str]:
    """Write the programs as modules; returns the environment in which they can be imported."""
    for name, text in (("http_child", HTTP), ("stubborn_child", STUBBORN), ("dead_child", DIES)):
        (tmp_path / f"{name}.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def started(module: str, environment: dict[str, str]) -> ServerProcess:
    return ServerProcess(module, "--file", "hello", environment)


def test_a_child_listens_and_is_stopped(modules: dict[str, str]) -> None:
    child = started("http_child", modules)
    assert child.wait_for(lambda: child.port() is not None, 30) is None
    port = child.port()
    assert port is not None
    assert port > 0
    assert child.last_words() == "; its last words: the configuration says hello"
    assert os.getpgid(child.pid) == os.getpgid(0), "what ends the group ends the child"
    assert "hello" not in " ".join(psutil.Process(child.pid).cmdline())
    child.stop()
    assert child.exit_code == -signal.SIGTERM
    child.stop()


def test_a_child_that_does_not_want_to_end_is_killed(
    modules: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("methods.server_process.STOP_SECONDS", 0.1)
    child = started("stubborn_child", modules)
    assert child.wait_for(lambda: child.port() is not None, 30) is None
    child.stop()
    assert child.exit_code == -signal.SIGKILL


def test_a_child_that_dies_is_noticed_with_its_last_words(modules: dict[str, str]) -> None:
    child = started("dead_child", modules)
    reason = child.wait_for(lambda: False, 60)
    assert reason == "it ended with exit code 1; its last words: one | two | no model at all"


def test_a_child_that_does_not_come_up_is_given_up(modules: dict[str, str]) -> None:
    child = started("http_child", modules)
    try:
        reason = child.wait_for(lambda: False, 0.1)
    finally:
        child.stop()
    assert reason is not None
    assert reason.startswith("it was not up within 0.1 seconds")


def test_a_child_outlives_the_thread_that_asked_for_it(modules: dict[str, str]) -> None:
    children: list[ServerProcess] = []
    thread = Thread(target=lambda: children.append(started("http_child", modules)))
    thread.start()
    thread.join()
    (child,) = children
    assert child.wait_for(lambda: child.port() is not None, 30) is None
    assert child.exit_code is None
    child.stop()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_way_of_ending_leaves_a_child_behind(
    how: signal.Signals, modules: dict[str, str], tmp_path: Path
) -> None:
    program = textwrap.dedent(
        f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from methods.server_process import ServerProcess
        child = ServerProcess("http_child", "--file", "hello", dict(os.environ))
        print(child.pid, flush=True)
        time.sleep(60)
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=modules,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout as output:
        pid = int(output.readline())
    child = psutil.Process(pid)
    parent.send_signal(how)
    parent.wait(30)
    assert wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_child_whose_parent_is_gone_ends_at_once(modules: dict[str, str]) -> None:
    script = ROOT / "methods" / "server_process.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), "1", "http_child", "--file", "/dev/null"],
        env=modules,
        timeout=60,
        capture_output=True,
    )
    assert done.returncode == 1
