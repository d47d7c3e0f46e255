"""What an ended process was writing is removed; what somebody writes, and all else, stays."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from harness.owner import Owner, this_process
from harness.record import write_atomically
from harness.temporary import OLD_SECONDS, remove_abandoned, remove_unfinished, temporary_beside

NOW = 2e9


def left(folder: Path, owner: Owner, age: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".record.json.{owner.token}.00000000.tmp"
    path.write_text("half")
    os.utime(path, (NOW - age, NOW - age))
    return path


def dead() -> Owner:
    return replace(this_process(), start=1)


def test_the_dead_leave_nothing_and_the_living_all(tmp_path: Path) -> None:
    gone = [left(tmp_path, dead()), left(tmp_path / "cache/reference/logits", dead())]
    kept = [
        left(tmp_path / "a", this_process()),
        left(tmp_path / "b", Owner("0" * 12, 1, 1), OLD_SECONDS - 1),
        tmp_path / "record.json",
        tmp_path / ".mine.tmp",
    ]
    for path in kept[2:]:
        path.write_text("")
    assert sorted(remove_abandoned(tmp_path, NOW)) == sorted(gone)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)


def test_what_another_machine_left_is_removed_after_a_week(tmp_path: Path) -> None:
    path = left(tmp_path, Owner("0" * 12, 1, 1), OLD_SECONDS + 1)
    assert remove_abandoned(tmp_path, NOW) == [path]


def test_who_takes_over_removes_what_anybody_was_writing(tmp_path: Path) -> None:
    gone = [
        left(tmp_path / str(number), owner) for number, owner in enumerate([dead(), this_process()])
    ]
    kept = tmp_path / "record.json"
    kept.write_text("")
    assert sorted(remove_unfinished(tmp_path)) == sorted(gone)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [kept.name]


def test_a_folder_goes_with_all_in_it_and_a_link_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    runs = tmp_path / "runs"
    folder = left(runs, dead())
    folder.unlink()
    (folder / "deep").mkdir(parents=True)
    (folder / "link").symlink_to(outside)
    link = folder.with_name(folder.name.replace("record", "linked"))
    link.symlink_to(outside)
    (runs / "cell").symlink_to(outside)
    left(outside, dead())
    remove_abandoned(runs, NOW)
    assert [path.name for path in runs.iterdir()] == ["cell"]
    assert len(list(outside.iterdir())) == 2


def test_no_two_writers_share_a_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert len({temporary_beside(path) for _ in range(100)}) == 100
    write_atomically(path, b"content")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "file", b"content")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_removed_stays_and_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left(tmp_path, dead())

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, "another user's", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert remove_abandoned(tmp_path, NOW) == []
    assert path.exists()
