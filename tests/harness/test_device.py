"""A device is held alone by what is timed and shared by what is not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from harness.device import VARIABLE, WAITING, Device, device_of


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))


def ignore(text: str) -> None:
    del text


def test_shared_stand_side_by_side_and_know_it() -> None:
    cpu = Device("cpu")
    with cpu.shared(ignore) as first:
        assert first()
        with cpu.shared(pytest.fail) as second:
            assert not first()
            assert not second()
        # What was disturbed stays disturbed.
        assert not first()
    with cpu.shared(pytest.fail) as third:
        assert third()


def test_another_device_is_another_matter() -> None:
    with (
        Device("cuda-0").alone(ignore),
        Device("cuda-1").alone(pytest.fail),
        Device("cpu").shared(pytest.fail) as cpu,
    ):
        assert cpu()


def test_whoever_times_has_the_device_alone() -> None:
    cpu = Device("cpu")
    now = {"shared": 0, "alone": 0}
    seen: list[tuple[int, int]] = []
    guard = threading.Lock()

    def work(kind: str) -> None:
        for _ in range(5):
            with getattr(cpu, kind)(ignore):
                with guard:
                    now[kind] += 1
                    seen.append((now["shared"], now["alone"]))
                time.sleep(0.005)
                with guard:
                    now[kind] -= 1

    threads = [threading.Thread(target=work, args=(k,)) for k in ["shared"] * 4 + ["alone"] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(alone == 0 or (shared, alone) == (0, 1) for shared, alone in seen)
    assert len(seen) == 30


def test_sharers_do_not_pass_one_who_waits_for_the_device_alone() -> None:
    cpu = Device("cpu")
    order: list[str] = []
    waits = threading.Event()

    def alone() -> None:
        with cpu.alone(lambda text: waits.set()):
            order.append("alone")

    def late() -> None:
        with cpu.shared(ignore):
            order.append("late")

    with cpu.shared(ignore):
        first = threading.Thread(target=alone)
        first.start()
        assert waits.wait(10)
        second = threading.Thread(target=late)
        second.start()
        time.sleep(0.2)
        assert order == []
    first.join()
    second.join()
    assert order == ["alone", "late"]


def test_waiting_is_said_once() -> None:
    said: list[str] = []
    cpu = Device("cpu")

    def other() -> None:
        with cpu.shared(said.append):
            pass

    with cpu.alone(ignore):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
    thread.join()
    assert said == [f"{WAITING} for cpu, on which other cells run"]


def test_a_holder_that_forked_lets_go_all_the_same() -> None:
    cpu = Device("cpu")
    read, write = os.pipe()
    with cpu.alone(ignore):
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
    with cpu.alone(pytest.fail):
        pass
    os.write(write, b".")
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)


def test_every_user_can_lock_whatever_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with Device("cpu").alone(ignore):
            pass
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666}


def test_a_link_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / "quantbench-cpu.lock").symlink_to(target)
    with pytest.raises(OSError, match=r"quantbench-cpu\.lock"), Device("cpu").alone(ignore):
        raise AssertionError("a link was followed")
    assert target.read_text() == "kept"


@pytest.mark.parametrize(
    ("visible", "name"),
    [("", "cuda-0"), ("2,3", "cuda-2"), ("GPU-ab/../c", "cuda-GPU_ab_c"), ("1", "cuda-1")],
)
def test_a_card_is_named_by_what_is_visible_first(
    visible: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_of("cuda").name == name


def test_the_processor_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert device_of("cpu").name == "cpu"


@pytest.mark.parametrize("role", ["lock", "turnstile"])
def test_a_pipe_in_the_place_of_a_lock_is_refused_and_not_waited_for(
    tmp_path: Path, role: str
) -> None:
    os.mkfifo(tmp_path / f"quantbench-cpu.{role}")
    with pytest.raises(OSError, match="not a regular file"), Device("cpu").alone(ignore):
        raise AssertionError("a pipe was taken for a lock")


def test_an_entry_makes_both_files_young_again(tmp_path: Path) -> None:
    with Device("cpu").shared(ignore):
        pass
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    with Device("cpu").shared(ignore):
        pass
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.stat().st_mtime > 1.5e9 for path in tmp_path.iterdir())
