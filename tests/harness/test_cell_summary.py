"""What a record says of its cell: the text that it was scored on, by digest."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir

from harness.planning import plan_cell

CONF = Path(__file__).resolve().parents[2] / "conf"


def evaluation_digest(folder: Path, *overrides: str) -> str | None:
    """Return what the record of such a cell says of its evaluation text."""
    given = [*overrides, f"runs_dir={folder}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", given)
    found: str | None = plan_cell(config, given).summary()["evaluation_digest"]
    return found


def test_the_record_names_the_evaluation_text_by_its_digest(tmp_path: Path) -> None:
    found = []
    for text in ("one text", "another text"):
        file = tmp_path / "text.txt"
        file.write_text(text)
        found.append(evaluation_digest(tmp_path, "data.source=text", f"data.path={file}"))
    assert len(set(found)) == 2
    assert all(found)


def test_sizes_by_arithmetic_read_no_text(tmp_path: Path) -> None:
    assert evaluation_digest(tmp_path, "suite=size_only", "model=shape") is None
