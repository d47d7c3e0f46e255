"""The script behind `make fresh`: its walls stand, and it says what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.fresh import run

TRIES = """
import os, pathlib, sys
for name in sys.argv[1:]:
    try:
        pathlib.Path(name, "left").write_text("x")
        print("written")
    except OSError as error:
        print(error.strerror)
print(os.getuid(), sorted(os.listdir(os.environ["HOME"])), os.path.exists(sys.argv[0]))
"""


def may_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="mounts of its own need root and their permission")
def test_a_trial_writes_to_its_own_folders_alone() -> None:
    # Not pytest's folder, which is closed to others.
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        holds(Path(scratch))


def holds(scratch: Path) -> None:
    place = run.Place(scratch, "somebody", 54321, 54321, True)
    for folder in (*place.own, scratch / "mounts"):
        folder.mkdir()
        os.chown(folder, 54321, 54321)
    closed = scratch / "open to everybody"
    closed.mkdir()
    closed.chmod(0o777)
    spec = {
        "mounts": True,
        "uid": place.uid,
        "gid": place.gid,
        "folder": str(place.clone),
        "environment": {"HOME": str(place.home), "PATH": run.SYSTEM_PATH},
        "writable": [str(path) for path in place.own],
        "shown": [sys.base_prefix],
        "private": str(scratch / "mounts"),
    }
    (scratch / "spec.json").write_text(json.dumps(spec))
    python = run.interpreter(sys.executable)
    assert python is not None
    wanted = [place.clone, place.home, place.temporary, "/tmp", "/dev/shm", closed, run.ROOT, "/"]
    inside = [sys.executable, str(run.INSIDE), str(scratch / "spec.json")]
    done = subprocess.run(
        [*inside, python.program, "-c", TRIES, *map(str, wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused = "Read-only file system"
    lines = done.stdout.splitlines()
    assert lines[:5] == ["written"] * 5, done.stdout
    # The folder of the test lies in /tmp, which is another one inside.
    assert lines[5] in (refused, "No such file or directory")
    assert lines[6:8] == [refused, refused]
    assert lines[8].startswith("54321 ['left']")
    assert sorted(path.parent.name for path in scratch.glob("*/left")) == ["clone", "home", "tmp"]
    assert not Path("/tmp/left").exists()
    assert not Path("/dev/shm/left").exists()


def test_a_python_that_is_not_there_is_skipped_visibly(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.interpreter("/nowhere/python") is None
    assert run.main(["--python", "/nowhere/python"]) == 2
    assert "skipped, there is no Python /nowhere/python here" in capsys.readouterr().out


def test_the_goals_are_the_commands_of_the_readme() -> None:
    python = run.Interpreter("/usr/bin/python3.11", "3.11.2", "/usr")
    typed = [
        " ".join(command)
        for goal in ("bench", "test")
        for command in run.commands(goal, python, [])
    ]
    assert typed == [
        "make bench PYTHON=/usr/bin/python3.11",
        "make test PYTHON=/usr/bin/python3.11",
    ]
    readme = (run.ROOT / "README.md").read_text()
    assert "make bench" in readme
    assert "make test" in readme


def test_a_run_as_oneself_tells_how_it_ended_and_what_it_wrote(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    python = run.interpreter(sys.executable)
    assert python is not None
    place = run.Place(tmp_path, "me", os.geteuid(), os.getegid(), False)
    for folder in place.own:
        folder.mkdir()
    start = tmp_path.stat().st_mtime - 1
    script = (
        "import os; open(os.path.expanduser('~/seen'), 'w'); print(sorted(os.environ)); exit(3)"
    )
    assert run.run([python.program, "-c", script], python, place, 1) == 3
    run.tell_records(place)
    out = capfd.readouterr().out
    assert "'HOME', 'LANG'" in out
    assert "exit status 3" in out
    assert "records: none" in out
    assert run.written_since(place.home, place, start) == [place.home / "seen"]
