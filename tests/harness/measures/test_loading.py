"""Loading again, in each way a method has, with the first logits."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.measures.loading import Loading
from kernels.errors import ConfigError
from tests.harness.measures.surroundings import (
    BigramEngine,
    drawn_ids,
    drawn_table,
    make_context,
)


def test_every_way_is_timed_and_every_engine_closed(tmp_path: Path) -> None:
    made: list[BigramEngine] = []

    def load() -> BigramEngine:
        made.append(BigramEngine(drawn_table(8)))
        return made[-1]

    context = make_context(tmp_path, drawn_ids(1, 8))
    context.loaders = {"mmap": load, "no_mmap": load}
    values = Loading(repeats=2).run(BigramEngine(drawn_table(8)), context)
    assert [(value.metric, value.protocol) for value in values] == [
        ("load_seconds", "again_mmap"),
        ("first_logits_seconds", "again_mmap"),
        ("load_seconds", "again_no_mmap"),
        ("first_logits_seconds", "again_no_mmap"),
    ]
    assert len(made) == 4
    assert all(engine.closed and len(engine.read) == 1 for engine in made)
    loaded, first = values[0].samples, values[1].samples
    assert len(loaded) == 2
    # The first logits come after loading, in every repeat.
    assert all(0 < a < b for a, b in zip(loaded, first, strict=True))


def test_nothing_is_timed_for_weights_stored_as_floats(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    context.loaders = {"": lambda: pytest.fail("loaded")}
    assert Loading().run(BigramEngine(drawn_table(8), execution="simulated"), context) == []


def test_repeats_must_be_one_or_more() -> None:
    with pytest.raises(ConfigError, match="repeats is 0"):
        Loading(repeats=0)
