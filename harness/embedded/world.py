"""The invented world that the embedded demonstration model knows.

Source: this project. The world is a constant: names are listed here and every fact is drawn once
from a fixed seed, so that training text, evaluation text and tasks speak of the same people and
places. Nothing in it is real. Standard library only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WORLD_SEED = 20240607
PEOPLE_COUNT = 200


def words(text: str) -> tuple[str, ...]:
    """Split a list of words that is written as one text."""
    return tuple(text.split())


_WOMEN = words("Ada Bela Cora Dina Edda Fina Gerda Hela Ilka Jora Kira Lena Mira Nora Olla Petra")
_MEN = words("Arno Boris Carl Dario Egon Falk Gero Hugo Ivar Jonas Karl Lars Milo Nils Otto Pavel")
_LAST = words(
    "Holt Reed Stone Wood Hill Marsh Field Brook Lane Ford Wells Moor Cliff Shore Vale Ridge "
    "Glen Heath Banks Croft Dale Frost Grove Hale"
)

TOWNS = words(
    "Varda Senna Korin Melba Tarn Ostra Pell Quill Rova Sulin Torva Ubar "
    "Velm Wessa Yarrow Zell Arkin Brant Corda Dorn Elva Fenn Galt Hesk"
)
COUNTRIES = words("Norland Sudland Estmark Westmark Highmoor Lowmoor Sunreach Farreach")
RIVERS = words("Isk Tamm Lorn Nesse Oder Rill Ushk Wend")
GOODS = words("salt wool glass paper honey rope silk tin")
JOBS = words(
    "baker smith tailor miller potter weaver farmer doctor teacher painter fisher hunter "
    "barber banker clerk cook guard judge nurse pilot porter priest sailor singer"
)
PETS = words(
    "cat dog goat hen horse duck frog snake mouse rabbit parrot turtle sheep donkey crow fox"
)
FOODS = words(
    "bread cheese soup fish rice beans plums pears apples grapes nuts cake "
    "eggs corn ham stew pie figs dates olives carrots onions lemons mushrooms"
)
INSTRUMENTS = words("flute drum harp horn fiddle bell lute pipe organ piano guitar trumpet")
COLOURS = words("red blue green yellow black white brown grey purple silver pink golden")


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: its values, its question, and the ways to state it."""

    name: str
    values: tuple[str, ...]
    question: str
    statements: tuple[str, ...]


PERSON_ATTRIBUTES = (
    Attribute("home", TOWNS, "Where does {s} live?", ("{s} lives in {v}.",)),
    Attribute("job", JOBS, "What is the job of {s}?", ("{s} works as a {v}.",)),
    Attribute("pet", PETS, "Which animal does {s} keep?", ("{s} keeps a {v}.",)),
    Attribute("food", FOODS, "What does {s} like to eat?", ("{s} likes to eat {v}.",)),
    Attribute("music", INSTRUMENTS, "What does {s} play?", ("{s} plays the {v}.",)),
    Attribute("coat", COLOURS, "Which colour is the coat of {s}?", ("{s} has a {v} coat.",)),
)
TOWN_ATTRIBUTES = (
    Attribute(
        "country",
        COUNTRIES,
        "In which country is {s}?",
        ("{s} is a town in {v}.", "The town of {s} is in {v}."),
    ),
    Attribute(
        "river",
        RIVERS,
        "Which river runs through {s}?",
        ("The river {v} runs through {s}.", "{s} lies on the river {v}."),
    ),
    Attribute(
        "goods",
        GOODS,
        "What is made in {s}?",
        ("The people of {s} make {v}.", "{s} is known for its {v}."),
    ),
)


@dataclass(frozen=True)
class Person:
    """One inhabitant; `facts` maps the name of a person attribute to its value."""

    first: str
    last: str
    woman: bool
    facts: dict[str, str]

    @property
    def name(self) -> str:
        """First and last name."""
        return f"{self.first} {self.last}"

    @property
    def pronoun(self) -> str:
        """Pronoun at the start of a sentence."""
        return "She" if self.woman else "He"


def _draw_people(rng: random.Random) -> tuple[Person, ...]:
    pairs = [(first, last) for first in _WOMEN + _MEN for last in _LAST]
    return tuple(
        Person(
            first,
            last,
            first in _WOMEN,
            {attribute.name: rng.choice(attribute.values) for attribute in PERSON_ATTRIBUTES},
        )
        for first, last in sorted(rng.sample(pairs, PEOPLE_COUNT))
    )


def _draw_towns(rng: random.Random) -> dict[str, dict[str, str]]:
    return {
        town: {attribute.name: rng.choice(attribute.values) for attribute in TOWN_ATTRIBUTES}
        for town in TOWNS
    }


_RNG = random.Random(WORLD_SEED)
PEOPLE = _draw_people(_RNG)
TOWN_FACTS = _draw_towns(_RNG)


@dataclass(frozen=True)
class Fact:
    """One true sentence of the world: an attribute of a subject and its value."""

    subject: str
    attribute: Attribute
    value: str


def all_facts() -> tuple[Fact, ...]:
    """Return every fact of the world, people first, in a fixed order."""
    of_people = [
        Fact(person.name, attribute, person.facts[attribute.name])
        for person in PEOPLE
        for attribute in PERSON_ATTRIBUTES
    ]
    of_towns = [
        Fact(town, attribute, TOWN_FACTS[town][attribute.name])
        for town in TOWNS
        for attribute in TOWN_ATTRIBUTES
    ]
    return tuple(of_people + of_towns)
