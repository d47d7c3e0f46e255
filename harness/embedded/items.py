"""Sums in words, questions with four choices and little stories: drawn, keyed, laid out.

Source: this project. What is drawn for an item makes its key, and a checksum of the key says
whether the item is held out from training (see `harness.embedded.generate`). Standard library only.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from harness.embedded.world import (
    PEOPLE,
    PERSON_ATTRIBUTES,
    TOWNS,
    Fact,
    Person,
    all_facts,
    words,
)

HELD_OUT_SHARE = 10
LETTERS = "ABCD"
LARGEST_NUMBER = 20
FEWEST_STEPS, MOST_STEPS = 2, 3
FACTS = all_facts()

_OBJECTS = words(
    "kite lamp ring book key box drum coat hat map cup knife chair clock mirror basket "
    "ladder wagon boat shirt bottle candle hammer blanket"
)
_SHOPS = words("market shop mill inn tower school harbour garden")
_THINGS = words("figs nuts coins shells eggs stones beads plums cards pears")
_ONES = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
_GAINS = ("{} buys {} more.", "{} finds {}.", "{} gets {}.")
_LOSSES = ("{} gives away {}.", "{} loses {}.", "{} sells {}.")


def held_out(key: str) -> bool:
    """Say whether the text with this key belongs to the held-out tenth."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def draw(rng: random.Random, make: Callable[[random.Random], _Made], held: bool) -> _Made:
    """Draw until the key of what was made lies in the wanted half."""
    while True:
        made = make(rng)
        if held_out(made.key) is held:
            return made


@dataclass(frozen=True)
class Sum:
    """A sum in words with its worked steps; `answer` ends in `#### N`."""

    question: str
    answer: str
    key: str


@dataclass(frozen=True)
class Choice:
    """A fact asked with four choices; `answer` is the index of the true one."""

    fact: Fact
    choices: tuple[str, str, str, str]
    answer: int
    key: str


@dataclass(frozen=True)
class Story:
    """The beginning of a story with four endings; `answer` is the index of the true one."""

    beginning: str
    endings: tuple[str, str, str, str]
    answer: int
    key: str


_Made = TypeVar("_Made", Sum, Choice, Story)


def number_in_words(number: int) -> str:
    """Spell a number from 0 to 99."""
    if number < len(_ONES):
        return _ONES[number]
    tens = _TENS[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens}-{_ONES[number % 10]}"


def make_sum(rng: random.Random) -> Sum:
    """Draw a sum of two or three steps whose totals stay within 1 and `LARGEST_NUMBER`."""
    person = rng.choice(PEOPLE)
    thing = rng.choice(_THINGS)
    she = person.pronoun
    total = rng.randint(2, LARGEST_NUMBER)
    sentences = [f"{person.first} has {number_in_words(total)} {thing}."]
    steps, key = [], [str(total)]
    for _ in range(rng.randint(FEWEST_STEPS, MOST_STEPS)):
        room = LARGEST_NUMBER - total
        adds = rng.random() < 0.5 if room >= 1 and total >= 2 else room >= 1
        number = rng.randint(1, room if adds else total - 1)
        pattern = rng.choice(_GAINS if adds else _LOSSES)
        sentences.append(pattern.format(she, number_in_words(number)))
        result = total + number if adds else total - number
        steps.append(f"{total} {'+' if adds else '-'} {number} = {result}.")
        key.append(f"{'+' if adds else '-'}{number}")
        total = result
    sentences.append(f"How many {thing} are there now?")
    answer = " ".join([*steps, f"#### {total}"])
    return Sum(" ".join(sentences), answer, " ".join(key))


def make_choice(rng: random.Random) -> Choice:
    """Draw a fact and three false values of the same kind."""
    fact = rng.choice(FACTS)
    others = rng.sample([value for value in fact.attribute.values if value != fact.value], 3)
    answer = rng.randrange(4)
    choices = [*others[:answer], fact.value, *others[answer:]]
    key = "|".join([ask(fact), *choices])
    return Choice(fact, (choices[0], choices[1], choices[2], choices[3]), answer, key)


def make_story(rng: random.Random) -> Story:
    """Draw a story of a wish, a place, an obstacle and its four endings."""
    hero, friend, keeper = _three_people(rng)
    thing, other, price = rng.sample(_OBJECTS, 3)
    shop, town = rng.choice(_SHOPS), rng.choice(TOWNS)
    wish = rng.choice(
        (
            f"{hero.name} wanted a {thing} for {friend.name}.",
            f"{friend.name} asked {hero.name} for a {thing}.",
            f"{hero.name} looked for a {thing} to give to {friend.name}.",
        )
    )
    if rng.random() < 0.5:
        wish = wish.replace(hero.name, "*", 1).replace(friend.name, hero.name, 1)
        wish = wish.replace("*", friend.name, 1)
        hero, friend = friend, hero
    place = f"In the {shop} of {town} {keeper.name} had a {thing} and a {other}."
    obstacle = rng.choice(
        (
            f"But {keeper.first} asked for a {price}.",
            f"But {keeper.first} would only sell it for a {price}.",
            f"{keeper.first} had to have a {price} for it.",
        )
    )
    turn = rng.choice(
        (
            f"{hero.first} went home and came back with the {price}.",
            f"So {hero.first} made a {price}.",
            f"{hero.first} had a {price} and gave it to {keeper.first}.",
        )
    )
    right, wrong = _endings(rng, hero, friend, keeper, (thing, other, price))
    answer = rng.randrange(4)
    rng.shuffle(wrong)
    endings = [*wrong[:answer], right, *wrong[answer:]]
    beginning = " ".join([wish, place, obstacle, turn])
    key = "|".join([beginning, right])
    return Story(beginning, (endings[0], endings[1], endings[2], endings[3]), answer, key)


def _three_people(rng: random.Random) -> tuple[Person, Person, Person]:
    while True:
        one, two, three = rng.sample(PEOPLE, 3)
        if len({one.first, two.first, three.first}) == 3:
            return one, two, three


def _endings(
    rng: random.Random, hero: Person, friend: Person, keeper: Person, things: tuple[str, str, str]
) -> tuple[str, list[str]]:
    """Return the true ending and three that the story or the world contradicts."""
    thing, other, price = things
    kind = rng.randrange(4)
    if kind == 0:
        home = hero.facts["home"]
        far = rng.choice([town for town in TOWNS if town != home])
        pattern = "At last {} took the {} home to {}."
        return pattern.format(hero.first, thing, home), [
            pattern.format(hero.first, other, home),
            pattern.format(hero.first, thing, far),
            pattern.format(keeper.first, thing, keeper.facts["home"]),
        ]
    if kind == 1:
        pattern = "At last {} gave the {} to {}."
        return pattern.format(hero.first, thing, friend.first), [
            pattern.format(friend.first, thing, hero.first),
            pattern.format(hero.first, other, friend.first),
            pattern.format(hero.first, price, friend.first),
        ]
    if kind == 2:
        pattern = "At last {} had the {} and {} had the {}."
        return pattern.format(keeper.first, price, friend.first, thing), [
            pattern.format(keeper.first, thing, friend.first, price),
            pattern.format(keeper.first, price, friend.first, other),
            pattern.format(friend.first, price, keeper.first, thing),
        ]
    job = friend.facts["job"]
    wrong_job = rng.choice([value for value in PERSON_ATTRIBUTES[1].values if value != job])
    pattern = "At last {}, the {}, was glad of the {}."
    return pattern.format(friend.first, job, thing), [
        pattern.format(friend.first, wrong_job, thing),
        pattern.format(friend.first, job, other),
        pattern.format(friend.first, job, price),
    ]


def ask(fact: Fact) -> str:
    """Return the question of a fact."""
    return fact.attribute.question.format(s=fact.subject)


def choice_text(choice: Choice) -> str:
    """Lay a question out as MMLU does, up to and with `Answer:`."""
    lines = [ask(choice.fact)]
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, choice.choices, strict=True)]
    return "\n".join([*lines, "Answer:"])


def sum_text(item: Sum) -> str:
    """Lay a sum out as GSM8K does, up to and with `Answer:`."""
    return f"Question: {item.question}\nAnswer:"
