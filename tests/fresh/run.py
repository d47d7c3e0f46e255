"""`make fresh`: the README's two commands on something like a fresh machine.

A clean clone of what is committed, in an empty folder, with an empty home, an environment of a few
variables, and a user who is not root. As root on Linux everything but clone, home and temporary
folder is read-only and the home folders are hidden (`inside.py`), so that nothing can have come
from there or gone there; else a scratch home has to do, and what appeared in the own home or in the
temporary folders is told. pip's settings (PIP_*, its configuration file) are taken along. One
interpreter after the other; standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).with_name("inside.py")
VERSIONS = ("3.11", "3.12", "3.13")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TAKEN_ALONG = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PIP_FILES = (".config/pip/pip.conf", ".pip/pip.conf")
FACTS = "import json, sys; print(json.dumps([sys.version.split()[0], sys.base_prefix]))"
QUICK_TESTS = ("tests/harness/test_record.py", "tests/kernels/test_pack.py", "tests/test_sweep.py")
PIP = ("-m", "pip", "install", "--quiet")
SHOWN = 12


@dataclass(frozen=True)
class Interpreter:
    """A Python: its program, its version and the folder that it is installed in."""

    program: str
    version: str
    prefix: str


@dataclass(frozen=True)
class Place:
    """The folders of one trial and who works in them."""

    scratch: Path
    user: str
    uid: int
    gid: int
    mounts: bool

    @property
    def clone(self) -> Path:
        """The repository."""
        return self.scratch / "clone"

    @property
    def home(self) -> Path:
        """The user's empty home."""
        return self.scratch / "home"

    @property
    def temporary(self) -> Path:
        """What TMPDIR names."""
        return self.scratch / "tmp"

    @property
    def own(self) -> tuple[Path, Path, Path]:
        """All that may be written."""
        return self.clone, self.home, self.temporary


def main(arguments: Sequence[str] | None = None) -> int:
    """Try every interpreter; return 0 where all did what they were asked."""
    options = read_options(arguments)
    found = [interpreter(program) for program in options.python or VERSIONS]
    interpreters = [one for one in found if one is not None]
    if not interpreters:
        print("fresh: no interpreter found; name one with --python PATH")
        return 2
    changed = git("status", "--porcelain").splitlines()
    if changed:
        print(f"note: {len(changed)} files differ from what is committed, which is what is tried")
    return max([try_one(one, options) for one in interpreters])


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fresh.run", description=__doc__)
    parser.add_argument(
        "--python", nargs="+", help="programs; default: those of 3.11, 3.12, 3.13 on the PATH"
    )
    parser.add_argument(
        "--goal",
        nargs="+",
        choices=("bench", "test", "quick"),
        default=["bench", "test"],
        help="make bench, make test, or quick: the set-up of bench, two methods and a few tests",
    )
    parser.add_argument(
        "--pytest-args", nargs="+", default=[*QUICK_TESTS], help="what quick tests instead"
    )
    parser.add_argument(
        "--user", default="nobody", help="as whom, where root runs this: a name or a free number"
    )
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made")
    parser.add_argument("--minutes", type=float, default=120, help="longest for one command")
    parser.add_argument("--plain", action="store_true", help="no mounts, also where they can be")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder")
    return parser.parse_args(arguments)


def interpreter(name: str) -> Interpreter | None:
    """Return the Python that a version or a path names; None, said aloud, where there is none."""
    program = shutil.which(f"python{name}" if name in VERSIONS else name)
    done = program and subprocess.run(
        [program, "-c", FACTS], capture_output=True, text=True, check=False, cwd="/"
    )
    if not program or not done or done.returncode:
        print(f"fresh: skipped, there is no Python {name} here")
        return None
    version, prefix = json.loads(done.stdout)
    # Not the link or the script on the PATH: those may lead through a home folder.
    inner = Path(prefix) / "bin" / f"python{version.rpartition('.')[0]}"
    return Interpreter(str(inner) if inner.exists() else program, version, prefix)


def try_one(python: Interpreter, options: argparse.Namespace) -> int:
    """Make the folders, run the goals, tell what came of them; return 0 where all is well."""
    place = prepare(options)
    print(
        f"\nPython {python.version}, commit {git('rev-parse', '--short', 'HEAD').strip()}, "
        f"user {place.user} (uid {place.uid}), "
        + ("all else read-only" if place.mounts else "scratch home, no mounts of its own"),
        flush=True,
    )
    start = time.time()
    try:
        status = 0
        for goal in options.goal:
            for command in commands(goal, python, options.pytest_args):
                status = status or run(command, python, place, options.minutes)
        tell_records(place)
        tell_left(place, start)
        return status
    finally:
        if not options.keep:
            shutil.rmtree(place.scratch, ignore_errors=True)


def prepare(options: argparse.Namespace) -> Place:
    """Return the folders of a trial: a clone, an empty home, an empty temporary folder."""
    scratch = Path(tempfile.mkdtemp(prefix="quantbench-fresh-", dir=options.folder)).resolve()
    scratch.chmod(0o755)
    user, uid, gid = who(options.user)
    mounts = os.geteuid() == 0 and sys.platform == "linux" and not options.plain
    place = Place(scratch, user, uid, gid, mounts)
    git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(place.clone))
    for folder in (place.home, place.temporary):
        folder.mkdir()
    for name in PIP_FILES:
        own = Path.home() / name
        if own.is_file():
            (place.home / name).parent.mkdir(parents=True)
            shutil.copy(own, place.home / name)
            print("note: pip's configuration file is taken along")
            break
    if os.geteuid() == 0:
        for folder in place.own:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, uid, gid, follow_symlinks=False)
    return place


def who(name: str) -> tuple[str, int, int]:
    """Return name, uid and gid of the user: the caller, unless that is root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name, os.geteuid(), os.getegid()
    if name.isdigit():
        return name, int(name), int(name)
    entry = pwd.getpwnam(name)
    return name, entry.pw_uid, entry.pw_gid


def commands(goal: str, python: Interpreter, tests: Sequence[str]) -> list[list[str]]:
    """Return the commands of a goal, as they are typed in the clone."""
    if goal != "quick":
        return [["make", goal, f"PYTHON={python.program}"]]
    own = ".venv/bin/python"
    return [
        ["make", ".venv/.installed", f"PYTHON={python.program}"],
        [own, "run.py", "-m", "method=fp32,rtn", "bits=4", "suite=smoke"],
        [own, *PIP, "--constraint", "constraints.txt", "pytest", "hypothesis"],
        [own, "-m", "pytest", *tests],
    ]


def run(command: Sequence[str], python: Interpreter, place: Place, minutes: float) -> int:
    """Run one command in the clone; print how it ended; return its exit status."""
    environment = {
        "PATH": SYSTEM_PATH,
        "LANG": "C.UTF-8",
        "HOME": str(place.home),
        "TMPDIR": str(place.temporary),
        "USER": place.user,
        **{name: os.environ[name] for name in TAKEN_ALONG if name in os.environ},
        **{name: text for name, text in os.environ.items() if name.startswith("PIP_")},
        **{name: text for name, text in os.environ.items() if name.lower().endswith("_proxy")},
    }
    whole = list(command)
    if os.geteuid() == 0:
        private = Path(tempfile.mkdtemp(prefix="mounts-", dir=place.scratch))
        spec = place.scratch / "spec.json"
        said = {
            "mounts": place.mounts,
            "uid": place.uid,
            "gid": place.gid,
            "folder": str(place.clone),
            "environment": environment,
            "writable": [str(path) for path in place.own],
            "shown": [python.prefix],
            "private": str(private),
        }
        spec.write_text(json.dumps(said))
        whole = [sys.executable, str(INSIDE), str(spec), *command]
    start = time.monotonic()
    process = subprocess.Popen(whole, cwd=place.clone, env=environment, start_new_session=True)
    try:
        status = process.wait(minutes * 60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        print(f"fresh: stopped after {minutes:g} minutes")
        status = 124
    seconds = time.monotonic() - start
    print(f"fresh: {' '.join(command)}: exit status {status}, {seconds:.0f} s", flush=True)
    return status


def tell_records(place: Place) -> None:
    """Print how many cells ended how."""
    ended = Counter(
        json.loads(path.read_text())["record"]["status"]
        for path in place.clone.glob("runs/*/record.json")
    )
    said = ", ".join(f"{count} {status}" for status, count in sorted(ended.items()))
    print(f"fresh: records: {said or 'none'}")


def tell_left(place: Place, start: float) -> None:
    """Print what was left in the home and the temporary folder, and what outside of them."""
    for name, folder in (("home", place.home), ("the temporary folder", place.temporary)):
        left = sorted(path.name for path in folder.iterdir())
        print(f"fresh: left in {name}: {shortened(left)}")
    if place.mounts:
        private = [path.name for path in place.scratch.glob("mounts-*/temporary*/*")]
        print(f"fresh: left in /tmp and /var/tmp, which were private: {shortened(private)}")
        print("fresh: written elsewhere: nothing, all else was read-only")
        return
    outside = [
        str(path)
        for folder in (Path.home(), Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
        for path in written_since(folder, place, start)
    ]
    print(f"fresh: written elsewhere while it ran, by whomever: {shortened(outside)}")


def written_since(folder: Path, place: Place, start: float) -> list[Path]:
    """Return the user's files below `folder`, outside the trial, that changed after `start`."""
    found = []
    for base, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(base, name) != place.scratch]
        for name in files:
            try:
                facts = Path(base, name).lstat()
            except OSError:
                continue
            if facts.st_mtime > start and facts.st_uid == place.uid:
                found.append(Path(base, name))
    return found


def shortened(names: Sequence[str]) -> str:
    """Return names for a line, the first few of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more


def git(*arguments: str) -> str:
    """Return what git says of the repository."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout


if __name__ == "__main__":
    sys.exit(main())
