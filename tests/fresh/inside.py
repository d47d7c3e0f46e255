"""Runs a command as another user where all but a few folders is read-only (Linux, as root).

`inside.py SPEC.json COMMAND...`: in mounts of its own, the home folders are hidden by empty ones
(the folders that SPEC names as `shown` stay visible), the system's temporary folders are private,
and everything else is read-only except `writable`. Then the rights of root are given up for good
and COMMAND takes this process's place. Standard library only, since the interpreter is any.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

CLONE_NEWNS = 0x20000  # linux/sched.h
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18  # linux/mount.h
MOUNT_ATTR_RDONLY, AT_FDCWD, AT_RECURSIVE = 1, -100, 0x8000
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
HOMES = ("/home", "/root")
TEMPORARY = ("/tmp", "/var/tmp")

libc = ctypes.CDLL(None, use_errno=True)


class Attributes(ctypes.Structure):
    """`struct mount_attr`."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def main() -> None:
    """Confine this process as the file says and become the command."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["mounts"]:
        confine(spec["writable"], spec["shown"], Path(spec["private"]))
    os.setgroups([])
    os.setgid(spec["gid"])
    os.setuid(spec["uid"])
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new rights")
    os.chdir(spec["folder"])
    os.execvpe(sys.argv[2], sys.argv[2:], spec["environment"])


def confine(writable: list[str], shown: list[str], private: Path) -> None:
    """Make mounts of this process's own; `private` is an empty folder for temporary ones."""
    checked(libc.unshare(CLONE_NEWNS), "mounts of its own")
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    # What has to stay visible is held before it is hidden.
    held = {path: hold(Path(path)) for path in (*shown, *writable)}
    own = {folder: private / f"temporary{number}" for number, folder in enumerate(TEMPORARY)}
    for place in own.values():
        place.mkdir()
        place.chmod(0o1777)
    temporary = {folder: hold(place) for folder, place in own.items()}
    for home in HOMES:
        if Path(home).is_dir():
            mount("tmpfs", home, "tmpfs", data="mode=755")
    for path, source in {**temporary, **held}.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        mount(source, path, flags=MS_BIND | MS_REC)
    mount("tmpfs", "/dev/shm", "tmpfs", data="mode=1777")
    attributes("/", set_=MOUNT_ATTR_RDONLY, flags=AT_RECURSIVE)
    for path in (*TEMPORARY, "/dev/shm", "/proc", *writable):
        attributes(path, clear=MOUNT_ATTR_RDONLY)


def hold(folder: Path) -> str:
    """Return a name for `folder` that stays valid when something is mounted over it."""
    return f"/proc/self/fd/{os.open(folder, os.O_PATH)}"


def mount(
    source: str, target: str, kind: str | None = None, flags: int = 0, data: str = ""
) -> None:
    """Call mount(2)."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    checked(libc.mount(*encoded, ctypes.c_ulong(flags), data.encode()), f"mount on {target}")


def attributes(path: str, set_: int = 0, clear: int = 0, flags: int = 0) -> None:
    """Call mount_setattr(2)."""
    wanted = Attributes(set_, clear, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    done = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), size
    )
    checked(done, f"rights of the mount {path}")


def checked(done: int, what: str) -> None:
    """Raise OSError where a call of the C library has failed."""
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
