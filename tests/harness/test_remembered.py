"""What is remembered comes back as it was, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.remembered import recall, remember


def test_what_is_remembered_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "file.json"
    assert recall(path) is None
    remember(path, {"a": [1, "ü"], "b": None})
    assert recall(path) == {"a": [1, "ü"], "b": None}


def test_no_flipped_bit_gives_another_answer(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    remember(path, {"num_fewshot": 5})
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert recall(path) in (None, {"num_fewshot": 5})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"content": 5}', '{"digest": "x"}'])
def test_what_does_not_verify_was_never_there(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    assert recall(path) is None


def test_what_cannot_be_written_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    remember(tmp_path / "file" / "x.json", {})
    assert recall(tmp_path / "file" / "x.json") is None
