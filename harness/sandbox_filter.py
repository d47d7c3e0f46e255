"""The system calls that a program in the sandbox may not make, as a filter for the kernel.

seccomp(2) with classic BPF (linux/seccomp.h, linux/filter.h). It takes away the way into further
namespaces, kernel machinery that no such program has a use for, and memory that no limit counts.
All else is left alone: namespaces, a read-only root and limits are the walls.
"""

from __future__ import annotations

import errno
import struct

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
# Refused as if the kernel had no such call, so that the C library takes the older one.
UNKNOWN = 0x00050000 | errno.ENOSYS
# struct seccomp_data
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16
# Every CLONE_NEW... of linux/sched.h that clone(2) takes.
ANY_NAMESPACE = 0x7E020000
X32_BIT = 0x40000000

# linux/audit.h, and the number of clone.
ARCHITECTURES = {"x86_64": (0xC000003E, 56), "aarch64": (0xC00000B7, 220)}
REFUSED = {
    "unshare": {"x86_64": 272, "aarch64": 97},
    "setns": {"x86_64": 308, "aarch64": 268},
    "ptrace": {"x86_64": 101, "aarch64": 117},
    "keyctl": {"x86_64": 250, "aarch64": 219},
    "add_key": {"x86_64": 248, "aarch64": 217},
    "request_key": {"x86_64": 249, "aarch64": 218},
    "bpf": {"x86_64": 321, "aarch64": 280},
    "perf_event_open": {"x86_64": 298, "aarch64": 241},
    "userfaultfd": {"x86_64": 323, "aarch64": 282},
    "io_uring_setup": {"x86_64": 425, "aarch64": 425},
    "memfd_create": {"x86_64": 319, "aarch64": 279},
    "memfd_secret": {"x86_64": 447, "aarch64": 447},
    "shmget": {"x86_64": 29, "aarch64": 194},
    "semget": {"x86_64": 64, "aarch64": 190},
    "msgget": {"x86_64": 68, "aarch64": 186},
}
CLONE3 = 435  # its flags lie in memory, where a filter cannot look


def call_filter(machine: str) -> bytes | None:
    """Return the filter for `machine` (`os.uname().machine`), 8 bytes a step; None: unknown."""
    if machine not in ARCHITECTURES:
        return None
    architecture, clone = ARCHITECTURES[machine]
    steps = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    if machine == "x86_64":
        # The same calls by other numbers.
        steps += [(JUMP_AT_LEAST, 0, 1, X32_BIT), (RETURN, 0, 0, REFUSE)]
    for numbers in REFUSED.values():
        steps += [(JUMP_EQUAL, 0, 1, numbers[machine]), (RETURN, 0, 0, REFUSE)]
    steps += [
        (JUMP_EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, UNKNOWN),
        (JUMP_EQUAL, 0, 3, clone),
        (LOAD, 0, 0, FIRST_ARGUMENT_AT),
        (JUMP_ANY_BIT, 0, 1, ANY_NAMESPACE),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    # struct sock_filter: what to do, steps to skip if true, if false, operand
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
