"""A claim is held by one, waited for by others, let go by the dead, taken over from the still."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness import claim as claim_module
from harness.claim import Held, Pace, TakenOverError, claim, still_held
from harness.owner import Owner, this_process
from harness.record import write_atomically
from harness.temporary import remove_unfinished

QUICK = Pace(beat=0.05, abandoned=0.5, poll=0.01, longest_poll=0.05)
ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = "0" * 12
"""A machine that is not this one."""


def ignore(holder: str) -> None:
    del holder


def _hold(path: Path, held: Any, release: Any) -> None:
    with claim(path, ignore):
        held.set()
        release.wait(30)


def _append(path: Path, log: Path) -> None:
    with claim(path, ignore):
        before = log.read_text() if log.exists() else ""
        time.sleep(0.01)
        log.write_text(before + "x")


def held_elsewhere(path: Path) -> Path:
    """Leave the claim of a process on another machine."""
    file = path.with_name(f"{path.name}.1")
    file.write_text(f"{Owner(ELSEWHERE, 7, 7).token} far-away\n")
    return file


def test_one_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_append, args=(tmp_path / "claim", log)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert log.read_text() == "x" * 6
    assert sorted(path.name for path in tmp_path.glob("claim.*")) == [
        f"claim.{number}" for number in range(1, 7)
    ]


def test_the_holder_is_named_and_a_killed_holder_lets_go_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "claim", held, release))
    holder.start()
    assert held.wait(30)
    seen: list[str] = []

    def waiting(name: str) -> None:
        seen.append(name)
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)

    # Not joined before: what has ended and nobody has asked for yet counts as ended.
    with claim(tmp_path / "claim", waiting) as mine:
        assert mine is not None
        assert mine.waited
    holder.join()
    assert len(seen) == 1
    assert f"process {holder.pid} on " in seen[0]
    with claim(tmp_path / "claim", seen.append) as mine:
        assert mine is not None
        assert not mine.waited


def test_a_holder_on_another_machine_is_waited_for_while_its_heart_beats(tmp_path: Path) -> None:
    file = held_elsewhere(tmp_path / "claim")
    beating = threading.Event()

    def beat() -> None:
        # A clock that jumps back and forth: that the time changes counts, not what it says.
        for number in range(20):
            os.utime(file, (1e9 - 7 * number, 1e9 + (-1) ** number * 1e8 * number))
            time.sleep(0.05)
        beating.set()

    thread = threading.Thread(target=beat)
    thread.start()
    seen: list[str] = []
    with claim(tmp_path / "claim", seen.append, pace=QUICK) as mine:
        assert mine is not None
        assert mine.path.name == "claim.2"
        assert beating.is_set()
    thread.join()
    assert seen == ["process 7 on far-away"]


def test_a_released_claim_is_free_whoever_held_it(tmp_path: Path) -> None:
    os.utime(held_elsewhere(tmp_path / "claim"), (0, 0))
    with claim(tmp_path / "claim", ignore) as mine:
        assert mine is not None
        assert not mine.waited


@pytest.mark.parametrize("content", ["", "nonsense", "\x00\xff" * 100])
def test_a_claim_that_names_nobody_is_abandoned_after_a_while(tmp_path: Path, content: str) -> None:
    (tmp_path / "claim.1").write_text(content)
    seen: list[str] = []
    with claim(tmp_path / "claim", seen.append, pace=QUICK) as mine:
        assert mine is not None
        assert mine.waited
    assert seen == ["another process"]


def test_of_many_that_take_over_one_does(tmp_path: Path) -> None:
    held_elsewhere(tmp_path / "claim")
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with claim(tmp_path / "claim", ignore, pace=QUICK):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_one_that_stood_still_learns_that_it_lost_and_disturbs_nobody(tmp_path: Path) -> None:
    still = Pace(beat=60.0)
    with claim(tmp_path / "claim", ignore, pace=still) as first:
        assert first is not None
        assert not first.lost()
        with claim(tmp_path / "claim", ignore, pace=QUICK) as second:
            assert second is not None
            assert first.lost()
            assert not second.lost()
            first.release()
            with pytest.raises(InterruptedError), claim(tmp_path / "claim", _refuse):
                raise AssertionError("two hold one claim")


def _refuse(holder: str) -> None:
    raise InterruptedError(holder)


def test_waiting_ends_with_what_was_waited_for(tmp_path: Path) -> None:
    held_elsewhere(tmp_path / "claim")
    done = iter([False, False, True])
    with claim(tmp_path / "claim", ignore, until=lambda: next(done), pace=QUICK) as mine:
        assert mine is None
    assert not (tmp_path / "claim.2").exists()


def test_a_claim_cannot_be_released_by_a_beat_on_its_way(tmp_path: Path) -> None:
    for _ in range(50):
        with claim(tmp_path / "claim", ignore, pace=Pace(beat=1e-6)):
            pass
    assert all(path.stat().st_mtime_ns == 0 for path in tmp_path.glob("claim.*"))


def test_names_that_only_look_alike_are_others(tmp_path: Path) -> None:
    for name in ("claim.01", "claim.0", "claim.x", "claims.3", "a.claim.4", "claim.5.tmp"):
        (tmp_path / name).write_text("")
    with claim(tmp_path / "claim", _refuse) as mine:
        assert isinstance(mine, Held)
        assert mine.path.name == "claim.1"
        assert mine.path.read_text().startswith(this_process().token)


def test_a_watcher_that_stands_still_after_its_look_does_not_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = held_elsewhere(tmp_path / "claim")
    original, now = claim_module._look, 0.0

    def look(path: Path) -> Any:
        nonlocal now
        found = original(path)
        now += 200.0  # this process stands still here, while the owner's heart beats
        os.utime(file)
        return found

    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = claim_module._Watch(abandoned_seconds=150.0)
    assert not watch.free(file)
    monkeypatch.setattr(claim_module, "_look", look)
    assert not any(watch.free(file) for _ in range(5))


def test_a_first_look_that_took_long_is_no_patience_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = held_elsewhere(tmp_path / "claim")
    original, now = claim_module._look, 0.0

    def look(path: Path) -> Any:
        nonlocal now
        now += 100.0
        return original(path)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(claim_module, "_look", look)
    watch = claim_module._Watch(abandoned_seconds=150.0)
    assert [watch.free(file) for _ in range(4)] == [False, False, False, True]


def test_who_stood_still_behind_its_last_look_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "claim.1").touch()

    def taken_over(last_look: Callable[[], None]) -> None:
        last_look()
        (tmp_path / "claim.2").touch()
        remove_unfinished(tmp_path)
        write_atomically(tmp_path / "record", b"the successor's")

    with pytest.raises(TakenOverError), still_held(tmp_path / "claim.1") as look:
        write_atomically(tmp_path / "record", b"mine", partial(taken_over, look))
    assert (tmp_path / "record").read_bytes() == b"the successor's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claim.1", "claim.2", "record"]


def test_a_last_look_that_finds_a_successor_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "record").write_bytes(b"old")
    (tmp_path / "claim.2").touch()
    with pytest.raises(TakenOverError), still_held(tmp_path / "claim.1") as last_look:
        write_atomically(tmp_path / "record", b"mine", last_look)
    assert (tmp_path / "record").read_bytes() == b"old"


def test_a_folder_that_is_missing_is_no_successor(tmp_path: Path) -> None:
    (tmp_path / "claim.1").touch()
    with pytest.raises(FileNotFoundError), still_held(tmp_path / "claim.1") as last_look:
        write_atomically(tmp_path / "nowhere" / "record", b"mine", last_look)


def test_a_removed_folder_is_a_claim_lost_and_can_be_taken_anew(tmp_path: Path) -> None:
    folder = tmp_path / "cell"
    with claim(folder / "claim", ignore) as first:
        assert first is not None
        shutil.rmtree(folder)
        assert first.lost()
        with claim(folder / "claim", _refuse) as second:
            assert second is not None
            assert not second.lost()


def test_a_listing_that_names_what_is_not_there_is_watched(tmp_path: Path) -> None:
    # A dangling link stands for the stale cache of a network file system.
    (tmp_path / "claim.3").symlink_to(tmp_path / "nowhere")
    seen: list[str] = []
    with claim(tmp_path / "claim", seen.append, pace=QUICK) as mine:
        assert mine is not None
        assert mine.path.name == "claim.4"
    assert seen == ["another process"]


def test_a_listing_that_is_old_leads_to_the_last_claim_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        with claim(tmp_path / "claim", ignore):
            pass
    monkeypatch.setattr(claim_module, "_last", lambda path: 1)
    with claim(tmp_path / "claim", _refuse) as mine:
        assert mine is not None
        assert mine.path.name == "claim.4"


def test_half_a_token_names_nobody(tmp_path: Path) -> None:
    mine = this_process()
    # The digits that are missing would name a process that never was.
    (tmp_path / "claim.1").write_text(mine.token[:-1])
    with pytest.raises(InterruptedError), claim(tmp_path / "claim", _refuse):
        raise AssertionError("a living owner was taken for an ended one")


def test_a_pipe_or_bytes_that_are_no_text_do_not_hold_anybody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "claim.1")
    with claim(tmp_path / "claim", ignore, pace=QUICK) as mine:
        assert mine is not None
    (tmp_path / "claim.3").write_bytes(b"\xff\xfe\x1b[2J\n")
    seen: list[str] = []
    with claim(tmp_path / "claim", seen.append, pace=QUICK) as mine:
        assert mine is not None
    assert seen == ["another process"]


def test_a_disk_that_is_full_leaves_the_work_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"), claim(tmp_path / "claim", ignore):
            raise AssertionError("held without a claim on the disk")
    with claim(tmp_path / "claim", _refuse) as mine:
        assert mine is not None


def test_thousands_of_claims_before_are_no_matter(tmp_path: Path) -> None:
    for number in range(1, 3001):
        (tmp_path / f"claim.{number}").touch()
        os.utime(tmp_path / f"claim.{number}", (0, 0))
    with claim(tmp_path / "claim", _refuse) as mine:
        assert mine is not None
        assert mine.path.name == "claim.3001"


def test_a_simulation_loses_nothing_and_does_nothing_twice() -> None:
    command = "tests.claim_simulation --workers 8 --cells 60 --killed 2 --stopped 2"
    quick = "--beat 0.1 --abandoned 1 --json"
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), *quick.split()],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["lost"], found["twice"], found["together"]) == (0, 0, 0)
    assert 1 <= found["struck"] <= 4
    assert found["killed_inside"] <= 2
