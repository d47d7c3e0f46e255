"""The generator: same seed same bytes, held-out texts stay out of training, sums are right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.embedded import generate, items
from harness.embedded.world import PEOPLE, PERSON_ATTRIBUTES, TOWN_FACTS, all_facts

STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)\.")


def rows(name: str) -> list[dict[str, Any]]:
    path = generate.FOLDER / "tasks" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def training_text() -> str:
    return "\n\n".join(generate.documents(0, 20_000))


def test_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    assert list(generate.documents(3, 50)) == list(generate.documents(3, 50))
    assert list(generate.documents(3, 50)) != list(generate.documents(4, 50))
    assert generate.calibration_text(0, 20) != generate.evaluation_text(0, 20)
    assert generate.calibration_text(0, 20) != "\n\n".join(generate.documents(0, 20))


def test_committed_data_files_are_what_the_generator_writes() -> None:
    for path, content in generate.task_files().items():
        assert (generate.FOLDER / path).read_bytes() == content.encode(), path


def test_command_writes_all_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["generate", "--tasks", "--folder", str(tmp_path)])
    generate.main()
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written == set(generate.task_files())


def test_evaluation_items_do_not_occur_in_training_text(training_text: str) -> None:
    for row in rows("sums"):
        assert row["question"] not in training_text
    for row in rows("endings"):
        assert row["query"] not in training_text
    for row in rows("facts"):
        lines = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True)]
        assert "\n".join([row["question"], *lines]) not in training_text


def test_numbers_of_held_out_sums_never_come_together_in_training(training_text: str) -> None:
    def worked(text: str) -> set[str]:
        return set(re.findall(r"Answer: ([^#]+) ####", text))

    held = {row["answer"].split(" ####")[0] for row in rows("sums")}
    assert len(held) > 300
    assert not held & worked(training_text)


def test_probes_find_what_training_text_does_hold(training_text: str) -> None:
    asked = [row["question"] for row in rows("facts")]
    assert sum(question in training_text for question in asked) > len(asked) * 0.9
    assert "#### " in training_text
    assert generate.FACTS_HEADER in training_text


def test_every_sum_is_worked_rightly() -> None:
    for row in rows("sums") + rows("sums_dev"):
        steps = STEP.findall(row["answer"])
        assert items.FEWEST_STEPS <= len(steps) <= items.MOST_STEPS
        total = None
        for left, sign, right, result in steps:
            assert total is None or total == int(left)
            total = int(left) + int(right) * (1 if sign == "+" else -1)
            assert total == int(result)
            assert 0 < total <= items.LARGEST_NUMBER
        assert row["answer"].endswith(f"#### {total}")
        numbers = [int(steps[0][0]), *(int(step[2]) for step in steps)]
        spoken = [items.number_in_words(number) for number in numbers]
        heard = re.findall(r"[a-z-]+", row["question"])
        assert [word for word in heard if word in spoken] == spoken


def test_every_fact_item_has_one_true_choice() -> None:
    truth = {fact.attribute.question.format(s=fact.subject): fact.value for fact in all_facts()}
    for row in rows("facts") + rows("facts_dev"):
        choices = list(row["choices"])
        assert choices[int(row["answer"])] == truth[row["question"]]
        assert len(set(choices)) == 4


def test_endings_differ_and_the_true_one_is_spread_over_all_places() -> None:
    labels = [int(row["label"]) for row in rows("endings")]
    assert min(labels.count(place) for place in range(4)) > len(labels) // 8
    assert all(len(set(row["choices"])) == 4 for row in rows("endings"))


def test_the_world_is_a_constant() -> None:
    assert len({person.name for person in PEOPLE}) == len(PEOPLE)
    facts = all_facts()
    assert len(facts) == len(PEOPLE) * len(PERSON_ATTRIBUTES) + 3 * len(TOWN_FACTS)
    assert len({(fact.subject, fact.attribute.name) for fact in facts}) == len(facts)


@pytest.mark.parametrize(
    ("number", "words"), [(0, "zero"), (13, "thirteen"), (40, "forty"), (99, "ninety-nine")]
)
def test_number_in_words(number: int, words: str) -> None:
    assert items.number_in_words(number) == words
