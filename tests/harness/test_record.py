"""Records survive the way to disk and back, and damage is seen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from harness.record import (
    FILE_NAME,
    Failure,
    Record,
    RecordError,
    Value,
    read_record,
    read_records,
    write_atomically,
    write_record,
)


def example(cell: str = "m-rtn-4b") -> Record:
    value = Value(
        "perplexity", "perplexity", "wikitext2_gptq_1024", 5.68, "", False, 0.01, (1.7, 1.8)
    )
    huge = Value("perplexity", "perplexity", "wikitext2_llamacpp_512", math.inf, "", False)
    return Record(
        cell=cell,
        status="partial",
        config={"method": "rtn", "resolved": {"bits": 4}},
        values=(value, huge),
        errors=(Failure("speed", "ValueError", "timing is wrong"),),
        environment={"cpu": "x"},
        details={"notes": ["größer ‖ kleiner"]},
        started="2026-01-01T00:00:00+00:00",
        seconds=1.5,
    )


def test_a_record_read_equals_the_record_written(tmp_path: Path) -> None:
    write_record(example(), tmp_path / "cell")
    assert read_record(tmp_path / "cell") == example()


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = write_record(example(), tmp_path)
    content = path.read_bytes()
    start = content.index(b'"record"')
    digits = [i for i in range(start, len(content)) if content[i : i + 1].isdigit()]
    assert digits
    for index in digits:
        changed = b"7" if content[index : index + 1] != b"7" else b"3"
        path.write_bytes(content[:index] + changed + content[index + 1 :])
        with pytest.raises(RecordError):
            read_record(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"record": 3}'])
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(RecordError, match="is not a record"):
        read_record(tmp_path)


def test_another_schema_is_refused_by_name(tmp_path: Path) -> None:
    path = write_record(example(), tmp_path)
    document = json.loads(path.read_text())
    document["record"]["schema"] = 99
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="has schema 99"):
        read_record(tmp_path)


def test_unreadable_records_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    write_record(example("a"), tmp_path / "a")
    write_record(example("b"), tmp_path / "b")
    (tmp_path / "b" / FILE_NAME).write_text("{")
    records, problems = read_records(tmp_path)
    assert [record.cell for record in records] == ["a"]
    assert len(problems) == 1
    assert str(tmp_path / "b" / FILE_NAME) in problems[0]


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
