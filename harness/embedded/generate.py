"""Seeded text about the invented world, and the three tasks made from held-out parts of it.

Source: this project. `documents` makes the training text: short lives of people, notes on towns,
questions with open answers, questions with four choices, little stories and sums in words.
Standard library only; the same seed gives the same bytes on every machine.

What is held out. Each story, sum and question with its four choices has a key made of all that was
drawn for it, and a checksum of the key alone says whether it belongs to the training half or to the
held-out tenth. So a held-out story, a held-out combination of numbers, or a held-out question with
its choices never stands in training text, whatever the seed.

What is not held out. The facts of the world are the same everywhere: a fact has to be known to be
asked. Sentence patterns are shared too, and so are single additions and subtractions inside sums.
Lives of people, notes on towns and open questions state these facts and nothing else, so single
lines of the evaluation text stand in training text as well: its perplexity says how well the world
is known, and nothing about unseen language.

Usage: `python -m harness.embedded.generate --tasks` writes `tasks/*.jsonl` and `data/eval.txt`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness.embedded.items import (
    FACTS,
    ask,
    choice_text,
    draw,
    make_choice,
    make_story,
    make_sum,
    sum_text,
)
from harness.embedded.world import (
    PEOPLE,
    PERSON_ATTRIBUTES,
    TOWN_ATTRIBUTES,
    TOWN_FACTS,
    TOWNS,
    Fact,
)

FOLDER = Path(__file__).resolve().parent
TASK_SEED = 1
TASK_ITEMS = 400
EVALUATION_DOCUMENTS = 900
FACTS_HEADER = "The following are multiple choice questions (with answers) about the world."
READING_SHARE = 0.2

# Sums, choices, stories, lives, towns, open questions: shares of documents, not tokens.
DOCUMENT_WEIGHTS = (25, 30, 25, 34, 5, 20)


def _life(rng: random.Random) -> str:
    """State some facts of one person."""
    person = rng.choice(PEOPLE)
    attributes = rng.sample(PERSON_ATTRIBUTES, rng.randint(3, len(PERSON_ATTRIBUTES)))
    sentences = []
    for position, attribute in enumerate(attributes):
        subject = person.name if position == 0 or rng.random() < 0.5 else person.pronoun
        pattern = rng.choice(attribute.statements)
        sentences.append(pattern.format(s=subject, v=person.facts[attribute.name]))
    return " ".join(sentences)


def _town(rng: random.Random) -> str:
    """State the facts of one town."""
    town = rng.choice(TOWNS)
    attributes = rng.sample(TOWN_ATTRIBUTES, len(TOWN_ATTRIBUTES))
    return " ".join(
        rng.choice(attribute.statements).format(s=town, v=TOWN_FACTS[town][attribute.name])
        for attribute in attributes
    )


def _open_questions(rng: random.Random) -> str:
    """Ask for some facts without choices."""
    asked = rng.sample(FACTS, rng.randint(2, 6))
    return "\n\n".join(f"{ask(fact)}\nAnswer: {fact.value}" for fact in asked)


def _state(rng: random.Random, fact: Fact) -> str:
    return rng.choice(fact.attribute.statements).format(s=fact.subject, v=fact.value)


def _sums_document(rng: random.Random, held: bool) -> str:
    items = [draw(rng, make_sum, held) for _ in range(rng.randint(1, 4))]
    return "\n\n".join(f"{sum_text(item)} {item.answer}" for item in items)


def _choices_document(rng: random.Random, held: bool) -> str:
    items = [draw(rng, make_choice, held) for _ in range(rng.randint(1, 6))]
    parts = [f"{choice_text(item)} {item.fact.value}" for item in items]
    if rng.random() < READING_SHARE:
        # The fact stands above its question, as in a text that is read.
        stated = [_state(rng, item.fact) for item in items]
        return "\n\n".join(f"{text}\n{part}" for text, part in zip(stated, parts, strict=True))
    return "\n\n".join([FACTS_HEADER, *parts] if rng.random() < 0.5 else parts)


def _story_document(rng: random.Random, held: bool) -> str:
    story = draw(rng, make_story, held)
    return f"{story.beginning} {story.endings[story.answer]}"


def _document(rng: random.Random, held: bool) -> str:
    makers: Sequence[Callable[[], str]] = (
        lambda: _sums_document(rng, held),
        lambda: _choices_document(rng, held),
        lambda: _story_document(rng, held),
        lambda: _life(rng),
        lambda: _town(rng),
        lambda: _open_questions(rng),
    )
    return rng.choices(makers, weights=DOCUMENT_WEIGHTS)[0]()


def documents(seed: int, count: int) -> Iterator[str]:
    """Yield `count` documents of training text."""
    rng = random.Random(f"training {seed}")
    for _ in range(count):
        yield _document(rng, held=False)


def calibration_text(seed: int, count: int = 2000) -> str:
    """Return training-like text of a stream that no training run draws from."""
    rng = random.Random(f"calibration {seed}")
    return "\n\n".join(_document(rng, held=False) for _ in range(count))


def evaluation_text(seed: int, count: int = EVALUATION_DOCUMENTS) -> str:
    """Return held-out text for perplexity; only facts of the world are shared with training."""
    rng = random.Random(f"evaluation {seed}")
    return "\n\n".join(_document(rng, held=True) for _ in range(count))


def choose_ending(seed: int, count: int, held: bool = True) -> list[dict[str, object]]:
    """Return stories with four endings: `query`, `choices` and the index `label`."""
    rng = random.Random(f"endings {seed}")
    stories = [draw(rng, make_story, held) for _ in range(count)]
    return [{"query": s.beginning, "choices": list(s.endings), "label": s.answer} for s in stories]


def facts(seed: int, count: int, held: bool = True) -> list[dict[str, object]]:
    """Return questions with four choices: `question`, `choices` and the index `answer`."""
    rng = random.Random(f"facts {seed}")
    items = [draw(rng, make_choice, held) for _ in range(count)]
    return [
        {"question": ask(i.fact), "choices": list(i.choices), "answer": i.answer} for i in items
    ]


def sums(seed: int, count: int, held: bool = True) -> list[dict[str, object]]:
    """Return sums in words: `question`, and `answer` with its worked steps and `#### N`."""
    rng = random.Random(f"sums {seed}")
    items = [draw(rng, make_sum, held) for _ in range(count)]
    return [{"question": item.question, "answer": item.answer} for item in items]


def task_files() -> dict[str, str]:
    """Return the content of every data file, by its path below this package."""

    def lines(rows: list[dict[str, object]]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    return {
        "tasks/endings.jsonl": lines(choose_ending(TASK_SEED, TASK_ITEMS)),
        "tasks/facts.jsonl": lines(facts(TASK_SEED, TASK_ITEMS)),
        "tasks/facts_dev.jsonl": lines(facts(TASK_SEED, 5, held=False)),
        "tasks/sums.jsonl": lines(sums(TASK_SEED, TASK_ITEMS)),
        "tasks/sums_dev.jsonl": lines(sums(TASK_SEED, 3, held=False)),
        "data/eval.txt": evaluation_text(TASK_SEED) + "\n",
    }


def main() -> None:
    """Write the data files of the tasks and of perplexity."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", action="store_true", required=True, help="write all data files")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write them")
    arguments = parser.parse_args()
    for path, content in task_files().items():
        target = arguments.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
