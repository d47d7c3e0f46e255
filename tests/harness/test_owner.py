"""Whether a process still lives is told from its boot, its number and its start."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from harness.family import Family
from harness.owner import Owner, parse_owner, this_process


def owner_of(process: subprocess.Popen[str]) -> Owner:
    assert process.stdout is not None
    owner = parse_owner(process.stdout.readline())
    assert owner is not None
    return owner


SAY = "from harness.owner import this_process; print(this_process().token, flush=True); input()"


def start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_process_lives_until_it_ends() -> None:
    with start() as process:
        owner = owner_of(process)
        assert owner.pid == process.pid
        assert not owner.ended()
        process.kill()
        # Its end is known before its parent has asked for it.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert owner.ended()
    assert owner.ended()


def test_a_number_that_was_given_again_is_another_process() -> None:
    assert replace(this_process(), start=this_process().start + 1).ended()


def test_of_another_machine_nothing_is_known() -> None:
    assert not Owner("0" * 12, 1, 1).ended()


def test_a_number_beyond_all_numbers_is_no_process() -> None:
    assert Owner(this_process().machine, 2**22 + 1, 1).ended()


def test_a_token_says_who() -> None:
    mine = this_process()
    assert parse_owner(f".record.json.{mine.token}.0a1b2c3d.tmp") == mine
    assert parse_owner(f"{mine.token} host") == mine


@pytest.mark.parametrize("text", ["", "record.json", "abc-1-2", "0" * 12 + "-1", "G" * 12 + "-1-2"])
def test_other_names_name_nobody(text: str) -> None:
    assert parse_owner(text) is None


MARK = "a mark of test_owner"
NO_SESSION = -1
"""Leads nobody: where the tests lead a session themselves, what they have started is in it."""
NAMED = """
import ctypes
ctypes.CDLL(None).prctl(15, b"\\xff) Z 1 (")
from harness.owner import this_process
print(this_process().token, flush=True)
input()
"""


def test_a_process_may_have_any_bytes_as_its_name() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", NAMED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "QUANTBENCH_TEST_MARK": MARK},
    )  # fmt: skip
    with process:
        owner = owner_of(process)
        assert not owner.ended()
        # Whoever looks for its own among all processes of the machine meets this one, too.
        assert Family(MARK, None).members(NO_SESSION) == {process.pid}
        process.kill()
