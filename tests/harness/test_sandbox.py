"""What a program in the sandbox may not do, each beside something like it that it may."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import sandbox
from harness.sandbox import Limits, Outcome, run_program
from kernels.errors import ConfigError

ROOT = Path(__file__).parents[2]
NOBODY = 65534
QUICK = Limits(seconds=2.0, cpu_seconds=1, memory_mib=256)
PASSED = Outcome(True, "passed")


@pytest.fixture(scope="module", autouse=True)
def isolation() -> None:
    try:
        assert run_program("") == PASSED
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start the sandbox from a file of this test alone, and see that none of it remains."""
    copy = tmp_path / "child_of_this_test.py"
    shutil.copy(sandbox.CHILD, copy)
    monkeypatch.setattr(sandbox, "CHILD", copy)
    yield copy
    assert processes_of(copy) == []


def processes_of(file: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(file) in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def reason(program: str, limits: Limits = QUICK) -> str:
    """Return why the program did not pass."""
    outcome = run_program(program, limits)
    assert not outcome.passed
    return outcome.reason


# --- what is meant to run -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "",
        "import collections, decimal, hashlib, math, random, re, ssl, typing\nassert math.pi > 3",
        "import numpy as np\nassert np.linalg.norm(np.eye(4)) == 2",
        "import sys, threading\n"
        "found = []\n"
        "thread = threading.Thread(target=found.append, args=(1,))\n"
        "thread.start(); thread.join()\n"
        "assert found == [1]",
        "assert __name__ != '__main__'",
    ],
)
def test_programs_pass(program: str) -> None:
    assert run_program(program) == PASSED


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("def f(:", "failed: SyntaxError: invalid syntax"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("def f(x: undefined): ...", "failed: NameError: name 'undefined' is not defined"),
        ("input()", "failed: EOFError: EOF when reading a line"),
        ("x = '\ud800'", "failed: UnicodeEncodeError"),
        ("raise ValueError('x' * 10**6)", "failed: ValueError: xxx"),
        ("class E(Exception):\n  def __str__(self): 1 / 0\nraise E", "failed: "),
        ("def f(): f()\nf()", "failed: RecursionError"),
    ],
)
def test_programs_fail_for_what_is_wrong_with_them(program: str, expected: str) -> None:
    said = reason(program)
    assert said.startswith(expected)
    assert len(said) <= 500


def test_the_order_of_a_set_is_the_same_each_time() -> None:
    shown = "raise ValueError(str({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}))"
    assert reason(shown) == reason(shown)


# --- files --------------------------------------------------------------------------------------


def test_files_outside_cannot_be_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in ("/etc/passwd", str(secret), str(ROOT / "pyproject.toml"), sys.executable):
        assert Path(path).is_file()
        assert reason(f"open({path!r}).read()").startswith("failed: FileNotFoundError")
    assert run_program("import os\nassert 'def ' in open(os.__file__).read()") == PASSED
    assert run_program("assert open('/dev/null').read() == ''") == PASSED


def test_the_root_holds_only_what_python_needs() -> None:
    found = "import os\nraise ValueError(sorted(os.listdir(PLACE)))"
    listed = {place: reason(f"PLACE = {place!r}\n{found}") for place in ("/etc", "/dev", "/tmp")}
    assert "['ld.so.cache']" in listed["/etc"] or "FileNotFoundError" in listed["/etc"]
    assert "['null', 'urandom', 'zero']" in listed["/dev"]
    assert "[]" in listed["/tmp"]
    assert reason("open('/proc/self/status')").startswith("failed: FileNotFoundError")
    assert reason("import os\nos.listdir('/.old')").startswith("failed: FileNotFoundError")


def test_nothing_outside_the_scratch_can_be_written(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for path in (str(kept), "/new", str(tmp_path / "new"), "/dev/new"):
        said = reason(f"open({path!r}, 'w').write('x')")
        assert "Read-only file system" in said or "No such file" in said
    said = reason("import os\nopen(os.__file__, 'a').write('x')")
    assert "Read-only file system" in said or "Permission denied" in said
    assert kept.read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == [kept]
    scratch = "open('a', 'w').write('x')\nassert open('/tmp/a').read() == 'x'"
    assert run_program(scratch) == PASSED
    assert run_program(scratch.replace("'w'", "'x'")) == PASSED  # nothing is left of the first


def test_files_cannot_grow_without_end() -> None:
    assert reason("open('big', 'wb').write(b'x' * 2**25)") == "killed: SIGXFSZ"
    many = "for i in range(64): open(str(i), 'wb').write(b'x' * 2**20)"
    assert "No space left on device" in reason(many)
    assert "Too many open files" in reason("held = [open('/dev/null') for _ in range(100)]")
    assert run_program("open('small', 'wb').write(b'x' * 2**20)") == PASSED


def test_open_files_of_the_caller_are_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    held = os.open(tmp_path / "secret", os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        # Standard input, output and error lead nowhere; one more says how the program ended.
        counted = (
            "import os, stat\n"
            "kinds = []\n"
            "for number in range(64):\n"
            "    try: kinds.append(stat.S_IFMT(os.fstat(number).st_mode))\n"
            "    except OSError: pass\n"
            "assert kinds == [stat.S_IFCHR] * 3 + [stat.S_IFIFO], kinds"
        )
        assert run_program(counted) == PASSED
    finally:
        os.close(held)


def test_packages_are_found_where_the_path_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real" / "site-packages").mkdir(parents=True)
    (tmp_path / "real" / "site-packages" / "of_this_test.py").write_text("x = 7")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    monkeypatch.syspath_prepend(tmp_path / "linked" / "site-packages")
    program = "import of_this_test\nassert of_this_test.x == 7"
    assert "ModuleNotFoundError" in reason(program)  # the path is asked for once
    sandbox._root.cache_clear()
    try:
        assert run_program(program) == PASSED
        tmp_path.joinpath("real", "site-packages").chmod(0o000)
        with pytest.raises(ConfigError, match=r"the program's user may not read .*linked"):
            run_program(program)
    finally:
        sandbox._root.cache_clear()
        tmp_path.joinpath("real", "site-packages").chmod(0o755)


# --- network, environment, other processes ------------------------------------------------------


def test_no_listener_can_be_reached(tmp_path: Path) -> None:
    local = str(tmp_path / "s")
    listeners = [
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_UNIX, local),
        (socket.AF_UNIX, f"\0quantbench-{os.getpid()}"),
    ]
    for family, address in listeners:
        with socket.socket(family) as listener:
            listener.bind(address)
            listener.listen()
            listener.settimeout(0.2)
            reached = listener.getsockname()
            connect = f"import socket\nsocket.socket({int(family)}).connect({reached!r})"
            assert reason(connect).startswith(
                ("failed: OSError: [Errno 101]", "failed: FileNotFound", "failed: ConnectionRefus")
            )
            with pytest.raises(TimeoutError):
                listener.accept()
            with socket.socket(family) as control:
                control.connect(reached)
                listener.accept()[0].close()
    pair = "import socket\na, b = socket.socketpair()\na.send(b'x')\nassert b.recv(1) == b'x'"
    assert run_program(pair) == PASSED
    assert "gaierror" in reason("import socket\nsocket.create_connection(('localhost', 80))")


def test_the_environment_is_not_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTBENCH_SECRET", "secret")
    assert reason("import os\nos.environ['QUANTBENCH_SECRET']").startswith("failed: KeyError")
    expected = dict(sandbox.ENVIRONMENT)
    assert run_program(f"import os\nassert dict(os.environ) == {expected!r}, os.environ") == PASSED
    named = "import socket\nassert socket.gethostname() == 'sandbox'"
    assert run_program(named) == PASSED


def test_other_processes_are_out_of_sight() -> None:
    seen = f"import os\nos.kill({os.getpid()}, 0)"
    assert reason(seen).startswith("failed: ProcessLookupError")
    assert reason("import os\nos.listdir('/proc')").startswith("failed: FileNotFoundError")
    assert run_program("import os\nassert (os.getpid(), os.getppid()) == (2, 1)") == PASSED


@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT", "SIGTERM", "SIGSTOP", "SIGPIPE"])
def test_the_supervisor_takes_no_signal(number: str) -> None:
    # Under root the worker is another user, which may not even send one.
    sent = f"import os, signal\ntry: os.kill(1, signal.{number})\nexcept PermissionError: pass"
    assert run_program(sent, QUICK) == PASSED
    killed = reason(f"import os, signal\nos.kill(os.getpid(), signal.{number})")
    assert killed == ("timed out" if number == "SIGSTOP" else f"killed: {number}")


def test_killing_everything_kills_nothing_else() -> None:
    said = run_program("import os, signal\nos.kill(-1, signal.SIGKILL)", QUICK)
    assert said == PASSED or said.reason.startswith("failed: ProcessLookupError")
    assert psutil.pid_exists(os.getpid())


SYSTEM_CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""


@pytest.mark.parametrize(
    "attempt",
    [
        "call('ptrace', 16, 1, 0, 0)",
        "call('syscall', 438, os.pidfd_open(1), 1, 0)",  # pidfd_getfd
        "buffer = ctypes.create_string_buffer(16)\n"
        "place = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 16)\n"
        "call('process_vm_readv', 1, place, 1, place, 1, 0)",
        "call('unshare', 0x10000000)",
        "call('unshare', 0x40000000)",
        "call('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
        "call('umount2', b'/tmp', 2)",
        "call('chroot', b'/tmp')",
        "call('memfd_create', b'x', 0)",
        "call('shmget', 0, 4096, 0o1600)",
        "call('syscall', 425, 1, 0)",  # io_uring_setup
        "call('sethostname', b'x', 1)",
        "os.setuid(0 if os.getuid() else 1)",
        "os.setgroups([0])",
        "os.mknod('null', 0o20666, os.makedev(1, 3))",
        "os.nice(-1)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_power_cannot_be_had(attempt: str) -> None:
    said = reason(SYSTEM_CALL + attempt)
    # Not permitted, no access, or no such user in this namespace.
    assert any(f"[Errno {number}]" in said for number in (1, 13, 22)) or "not allowed" in said
    assert run_program(SYSTEM_CALL + "call('getpid')") == PASSED


# --- time, memory, processes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "import time\ntime.sleep(1000)",
        "while True: pass",
        "while True: print('x' * 1000)",
        "import signal\nfor n in (1, 2, 14, 15, 24): signal.signal(n, lambda *_: None)\n"
        "while True: pass",
        "import os\nos.fork()\nwhile True: pass",
        "import time\ntry: time.sleep(1000)\nfinally: time.sleep(1000)",
    ],
)
def test_what_does_not_end_is_ended(program: str, child: Path) -> None:
    assert reason(program, Limits(seconds=1, cpu_seconds=1)) == "timed out"
    assert run_program("import time\ntime.sleep(0.1)\nprint('x' * 10**6)", QUICK) == PASSED


def test_processor_time_is_limited_apart_from_the_deadline(child: Path) -> None:
    assert reason("while True: pass", Limits(seconds=60, cpu_seconds=1)) == "timed out"
    assert run_program("import time\ntime.sleep(1.5)", Limits(cpu_seconds=1)) == PASSED


@pytest.mark.parametrize(
    "program",
    ["held = []\nwhile True: held.append(bytearray(2**20))", "x = bytearray(2**40)"],
)
def test_memory_is_limited(program: str) -> None:
    assert reason(program).startswith("failed: MemoryError")
    assert run_program("x = bytearray(2**26)", QUICK) == PASSED


def test_a_fork_bomb_is_stopped(child: Path) -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert reason(bomb, Limits(seconds=1)) == "timed out"
    counted = "import os, time\nfor count in range(100):\n    if os.fork() == 0: time.sleep(1000)\n"
    assert reason(counted).startswith("failed: BlockingIOError")
    one = "import os\nif os.fork() == 0: os._exit(3)\nassert os.wait()[1] == 3 << 8"
    assert run_program(one, QUICK) == PASSED


@pytest.mark.parametrize(
    "program",
    [
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)",
        "import os, time\nif os.fork() == 0:\n    if os.fork() == 0: time.sleep(1000)\n"
        "    os._exit(0)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    ],
)
def test_nothing_outlives_the_program(program: str, child: Path) -> None:
    # That none remains is seen at the fixture's end.
    assert run_program(program, QUICK) == PASSED


def test_the_processes_are_seen_while_they_run(child: Path) -> None:
    """The control of every claim above that none remains."""
    code = (
        "import sys; from pathlib import Path; from harness import sandbox\n"
        "sandbox.CHILD = Path(sys.argv[1])\n"
        "sandbox.run_program('import time; time.sleep(1000)', sandbox.Limits(seconds=1000))"
    )
    caller = subprocess.Popen([sys.executable, "-c", code, str(child)], cwd=ROOT)
    try:
        # The caller itself, the script, its supervisor and the worker.
        while len(processes_of(child)) < 4:
            assert caller.poll() is None
    finally:
        caller.kill()
        caller.wait()
    # With its caller the sandbox ends too, soon after.
    deadline = time.monotonic() + 30
    while processes_of(child) and time.monotonic() < deadline:
        time.sleep(0.05)


# --- the verdict --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import os\nos._exit(0)", "exited with status 0 before its end"),
        ("import os\nos._exit(7)", "exited with status 7 before its end"),
        ("import sys\nsys.exit(0)", "failed: SystemExit: 0"),
        ("raise SystemExit", "failed: SystemExit"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("print('passed')\nassert False", "failed: AssertionError"),
        (
            "import os\n"
            "for number in range(64):\n"
            "    try: os.write(number, b'{\"passed\": true, \"reason\": \"passed\"}')\n"
            "    except OSError: pass\n"
            "assert False",
            "exited with status 1 before its end",
        ),
        (
            "import os\n"
            "for number in range(64):\n"
            "    try: os.write(number, b'refused: no reason')\n"
            "    except OSError: pass",
            "exited with status 0 before its end",
        ),
        ("import os\nos.kill(os.getpid(), 40)", "killed: signal 40"),
        ("import atexit, os\natexit.register(os._exit, 0)\nassert False", "failed: Assertion"),
        ("import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\n"
         "while True: pass", "exited with status 0 before its end"),
        ("import os\nif os.fork():\n    os.wait()\n    os._exit(0)", "exited with status 0"),
        ("import os\nif os.fork() == 0: os._exit(0)\nassert False", "failed: AssertionError"),
        ("import os, signal\nsignal.signal(14, lambda *_: os._exit(0))\nsignal.alarm(1)\n"
         "while True: pass", "exited with status 0 before its end"),
        ("import os\nos._exit = lambda status: None\nassert False", "failed: AssertionError"),
        ("import builtins\nbuiltins.BaseException = int\nassert False", "exited with status 1"),
        ("import os\nos.closerange(0, 64)\nassert False", "exited with status 1 before its end"),
    ],
)  # fmt: skip
def test_leaving_early_is_no_pass(program: str, expected: str) -> None:
    limits = Limits(seconds=5, cpu_seconds=3)
    assert reason(program, limits).startswith(expected)


# --- where it cannot be had ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ('print(\'{"refused": "no mounts"}\')', r"\(no mounts\), so it is not run"),
        ("import sys; sys.exit('broken')", "ended with 1 and said: broken"),
        ("", "ended with 0 and said: no word"),
    ],
)
def test_without_isolation_nothing_runs(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child.py").write_text(code)
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
    with pytest.raises(ConfigError, match=said):
        run_program("x = 1")


def test_a_step_that_fails_is_named() -> None:
    step = "\n_call('entering new namespaces (unshare)', 'unshare', NEW_NAMESPACES)"
    said = reason(sandbox.CHILD.read_text() + step)
    assert said.endswith("entering new namespaces (unshare) failed: Operation not permitted")


def test_an_unknown_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "call_filter", lambda machine: None)
    with pytest.raises(ConfigError, match="the processor is "):
        run_program("x = 1")


@pytest.mark.parametrize("name", ["seconds", "cpu_seconds", "memory_mib", "processes"])
def test_limits_are_above_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=f"the sandbox's {name} is 0; it must be above 0"):
        Limits(**{name: 0})


AS_NOBODY = """
import json, sys
sys.path.insert(0, sys.argv[1])
from harness.sandbox import Limits, run_program
limits = Limits(seconds=3.0, cpu_seconds=1, memory_mib=256)
print(json.dumps([run_program(one, limits).reason for one in json.load(sys.stdin)]))
"""


def test_an_ordinary_user_has_it_too() -> None:
    """The rest of this file shows it of whoever runs the tests; here root becomes nobody."""
    if os.geteuid() != 0:
        pytest.skip("the tests are run by an ordinary user already")
    programs = {
        "import os\nassert os.getuid() == 65534": "passed",
        "open('a', 'w').write('x')": "passed",
        "import os\nif os.fork() == 0: os._exit(3)\nassert os.wait()[1] == 3 << 8": "passed",
        "import os, signal\nos.kill(1, signal.SIGKILL)": "passed",
        "open('/etc/passwd')": "failed: FileNotFoundError",
        "import os\nopen(os.__file__, 'a')": "failed: ",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))": "failed: OSError",
        SYSTEM_CALL + "call('ptrace', 16, 1, 0, 0)": "failed: PermissionError",
        SYSTEM_CALL + "call('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, None)": "failed: Perm",
        "import os\nos.setuid(0)": "failed: OSError",
        "import os\nwhile True: os.fork()": "failed: BlockingIOError",
        "import time\ntime.sleep(1000)": "timed out",
        "x = bytearray(2**40)": "failed: MemoryError",
        "import os\nos._exit(0)": "exited with status 0 before its end",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("harness/sandbox.py", "harness/sandbox_child.py", "harness/sandbox_filter.py",
                     "kernels/errors.py"):  # fmt: skip
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        python = python_of_nobody()
        finished = subprocess.run(
            [python, "-B", "-c", AS_NOBODY, name],
            input=json.dumps(list(programs)),
            capture_output=True,
            text=True,
            cwd="/",
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            check=False,
        )
    if "cannot be isolated on this machine" in finished.stderr:
        pytest.skip(finished.stderr.splitlines()[-1])
    ended = json.loads(finished.stdout)
    for said, expected in zip(ended, programs.values(), strict=True):
        assert said.startswith(expected)


def python_of_nobody() -> str:
    """Return an interpreter that nobody may start; the one of a venv in root's home is none."""
    for python in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        try:
            asked = subprocess.run(
                [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                cwd="/",
                capture_output=True,
                check=False,
            )
        except OSError:
            continue
        if asked.returncode == 0:
            return python
    pytest.skip("no Python 3.11 that an ordinary user may start")
