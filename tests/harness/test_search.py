"""Racing finds what an exhaustive search finds, reads less, and says what it dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from harness.record import Failure, Record, Value
from harness.search import Race, Search
from kernels.errors import ConfigError
from reports.outcomes import outcome_text, succeeded

WINDOWS = 60


class Candidates:
    """Candidates with known increases and sizes, measured window by window."""

    def __init__(self, increases: Sequence[float], seed: int, broken: Sequence[int] = ()) -> None:
        generator = np.random.default_rng(seed)
        self.baseline = generator.normal(2.0, 0.3, WINDOWS)
        self.losses = [
            (1 + increase) * self.baseline + generator.normal(0, 0.02, WINDOWS)
            for increase in increases
        ]
        self.broken = broken
        self.windows = 0

    def __call__(self, numbers: Sequence[int], windows: int | None) -> list[Record]:
        return [self.record(number, windows or WINDOWS) for number in numbers]

    def record(self, number: int, windows: int) -> Record:
        self.windows += windows
        if number in self.broken:
            return Record(f"cell{number}", "failed", {}, errors=(Failure("x", "x", "it broke"),))
        losses = tuple(self.losses[number][:windows].tolist())
        mean = math.exp(sum(losses) / windows)
        return Record(
            f"cell{number}",
            "ok",
            {},
            (
                # The smaller number is the larger artefact.
                Value("size", "artefact_bytes", "stored", 1e6 - number, "B", False),
                Value("perplexity", "perplexity", "t_gptq_8", mean, "", False, None, losses),
            ),
        )

    def exhaustive(self, limit: float) -> str | None:
        """The smallest within the limit on all windows, as the documents' loop finds it."""
        within = [
            number
            for number, losses in enumerate(self.losses)
            if losses.mean() / self.baseline.mean() - 1 <= limit and number not in self.broken
        ]
        return f"cell{max(within)}" if within else None


def race(candidates: Candidates, search: Search) -> Race:
    labels = [f"candidate {number}" for number in range(len(candidates.losses))]
    return Race(search, labels, candidates.baseline.tolist(), candidates)


def searched(**options: object) -> Search:
    return Search("test", {}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_exhaustive_ones(seed: int) -> None:
    increases = np.random.default_rng(100 + seed).uniform(0.0, 0.1, 8).tolist()
    candidates = Candidates(increases, seed)
    found = race(candidates, searched()).run()
    assert found["chosen"] == candidates.exhaustive(0.03)
    spent = found["evaluations"]
    assert spent["made"] == candidates.windows + WINDOWS
    assert spent["saved"] == spent["exhaustive"] - spent["made"]
    assert spent["exhaustive"] == 9 * WINDOWS


def test_clearly_worse_ones_are_dropped_early_and_larger_ones_are_left() -> None:
    candidates = Candidates([0.0, 0.0, 0.5, 0.6], 0)
    found = race(candidates, searched()).run()
    first = found["rungs"][0]
    assert first["windows"] == 8
    assert [one["cell"] for one in first["dropped"]] == ["cell2", "cell3"]
    assert "clearly above the limit after 8 windows" in first["dropped"][0]["why"]
    # cell1 is within after the first rung: cell0 is larger, and nothing smaller is left.
    assert [rung["tried"] for rung in found["rungs"][1:]] == [["cell1"]]
    assert found["evaluations"]["made"] == WINDOWS + 4 * 8 + WINDOWS
    verdicts = {row["cell"]: row["verdict"] for row in found["rows"]}
    assert verdicts["cell0"] == "larger than the chosen one"
    assert verdicts["cell1"] == "chosen"
    assert [row["cell"] for row in found["rows"]] == ["cell3", "cell2", "cell1", "cell0"]


def test_none_within_names_the_closest() -> None:
    found = race(Candidates([0.2, 0.3], 1), searched()).run()
    record = Record("search", "ok", {}, details={"search": found})
    assert found["chosen"] is None
    assert not succeeded(record)
    assert "none is within the limit; the closest is candidate 0" in outcome_text(record)


def test_what_was_set_aside_comes_back_where_the_smaller_one_fails_on_all_windows() -> None:
    candidates = Candidates([0.0, 0.0], 2)
    # The smaller one is fine at the start of the text and bad behind it.
    candidates.losses[1][24:] *= 1.5
    found = race(candidates, searched()).run()
    assert found["chosen"] == "cell0" == candidates.exhaustive(0.03)
    assert found["rows"][0]["verdict"] == "above the limit"


def test_a_failed_candidate_is_left_out_with_its_reason() -> None:
    candidates = Candidates([0.0, 0.0], 3, broken=[1])
    found = race(candidates, searched()).run()
    assert found["chosen"] == "cell0"
    assert "not measured: it broke" in {row["verdict"] for row in found["rows"]}


def test_without_rungs_every_cell_is_read_from_the_smallest_on() -> None:
    candidates = Candidates([0.0, 0.01, 0.2], 4)
    found = race(candidates, searched(rungs=[], metric="perplexity", max_increase=0.05)).run()
    assert found["chosen"] is not None
    assert all(rung["windows"] == WINDOWS for rung in found["rungs"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metric": "accuracy"}, "search.metric is 'accuracy'; it must be one of loss, perplexity"),
        ({"rungs": [24, 8]}, r"search.rungs is \[24, 8\]; it must be growing numbers"),
        ({"rungs": [2]}, "of 3 or more windows"),
        ({"confidence": 1.0}, "search.confidence is 1.0; it must be at least 0.5 and below 1"),
        ({"max_increase": "3"}, "search.max_increase is '3', a share of 300 %; write 3%"),
        ({"max_increase": "3 percent"}, "search.max_increase is '3 percent'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        searched(**options)
