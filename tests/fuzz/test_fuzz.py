"""A short run of every target of `tests.fuzz`: the long one is `python -m tests.fuzz.run`."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.guard import EscapedError, watched
from tests.fuzz.mutation import damaged
from tests.fuzz.registry import GROUPS, load
from tests.fuzz.target import Target

EXAMPLES = 20
SLOW = {"nanogpt_checkpoint": 4}


@pytest.fixture(scope="module", params=sorted(GROUPS))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Target, list[bytes], Path]:
    if request.param.startswith("gguf"):
        pytest.importorskip("gguf", reason="the package gguf is not installed")
    target = load(request.param)
    place = tmp_path_factory.mktemp(target.name).resolve()
    (place / "seeds").mkdir()
    (place / "folder").mkdir()
    if target.setup is not None:
        target.setup(place / "folder")
    return target, list(target.seeds(place / "seeds")), place / "folder"


def test_what_the_project_writes_is_read(made: tuple[Target, list[bytes], Path]) -> None:
    target, seeds, folder = made
    assert [target.execute(seed, folder) for seed in seeds] == [True] * len(seeds)


def test_what_is_changed_is_read_or_refused(made: tuple[Target, list[bytes], Path]) -> None:
    target, seeds, folder = made
    outcomes = set()

    @settings(
        max_examples=SLOW.get(target.name, EXAMPLES),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32), st.integers(0, 4))
    def run(seed: int, times: int) -> None:
        generator = random.Random(seed)
        data = generator.choice(seeds)
        for step in range(times + 1):
            data = target.changed(
                data,
                target.longest,
                seed + step,
                lambda d, most: damaged(d, most, generator),
                seeds,
            )
            outcomes.add(target.execute(data, folder))

    run()
    # A cache entry that does not verify is no error: it is absent.
    assert (False in outcomes) == bool(target.refusals)


def test_the_guard_sees_what_leaves_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("s")
    (inside / "link").symlink_to(tmp_path / "secret")
    for place in (tmp_path / "secret", inside / ".." / "secret", inside / "link"):
        with pytest.raises(EscapedError), watched(inside):
            place.read_text()
    with pytest.raises(EscapedError), watched(inside):
        (tmp_path / "made").mkdir()
    # Also where the reader keeps what it did to itself.
    with pytest.raises(EscapedError), watched(inside), suppress(BaseException):
        (tmp_path / "secret").unlink()
    assert (tmp_path / "secret").read_text() == "s"
    with watched(inside):
        (inside / "own").write_text("x")
