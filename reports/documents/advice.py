"""What the five documents advise for a case: their decision trees and tables, as data.

`advice.yaml` holds every tree: who says it, for which case, which methods (as `run.py` takes them)
and the words as printed. A branch holds for a case where the case states all of its conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from reports import entries, words
from reports.blocks import Block, Field, Grid, Head
from reports.rows import Row

VOCABULARY = {
    "device": ("cpu", "nvidia", "apple", "mobile", "edge", "mixed"),
    "priority": (
        *("accuracy", "speed", "size", "ease", "throughput", "balance"),
        *("quantizing", "compatibility", "training"),
    ),
    "memory": ("extreme", "low", "ample"),
    "purpose": ("research", "production"),
}
"""What each condition of a branch may be."""

DOCUMENTS = ("guide", "notes", "intro", "chapter", "article")
"""Names of the documents, as in `documents.yaml`, which takes long to read."""

BOUNDS = ("min_parameters", "max_parameters")
AXES = ("bits", "group_size")
GGUF = "gguf"

_TREE = ("id", "document", "section", "title", "entries")
_ENTRY = ("when", "advice", "original", "note", "command")
_NEEDED = ("when", "advice", "original")
_OF_TREE: dict[str, entries.Kind] = {
    **dict.fromkeys(("id", "document", "section", "title"), entries.text),
    "entries": entries.several(entries.mapping),
}
_OF_ENTRY: dict[str, entries.Kind] = {
    **dict.fromkeys(("original", "note", "command"), entries.text),
    "when": entries.mapping,
    "advice": entries.several(entries.text),
}


@dataclass(frozen=True)
class Case:
    """What is known of the case that advice is asked for; None and empty: not said.

    `parameters` are the model's; `priorities` may be several.
    """

    device: str | None = None
    parameters: float | None = None
    priorities: frozenset[str] = frozenset()
    memory: str | None = None
    purpose: str | None = None


@dataclass(frozen=True)
class Pick:
    """One advised method: the words of `run.py` that choose it, by their names."""

    words: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The method in a few words: `gptq bits=4`, `gguf_Q4_K_M`."""
        found = dict(self.words)
        name = found.pop("method", "")
        if name == GGUF and "gguf_type" in found:
            name = f"{GGUF}_{found.pop('gguf_type')}"
        rest = [f"{key}={value}" for key, value in found.items()]
        return " ".join(filter(None, [name, *rest]))

    def names(self, row: Row) -> bool:
        """Whether `row` is of this method, bits and group size; other options are not looked at."""
        found = dict(self.words)
        method = found.get("method")
        if method == GGUF:
            method = f"{GGUF}_{found['gguf_type']}"
        figures = {"bits": row.bits, "group_size": row.group_size}
        return method in (None, row.plain_method) and all(
            figures[axis] == float(found[axis]) for axis in AXES if axis in found
        )


@dataclass(frozen=True)
class Advice:
    """One branch of a tree, or one line of a table.

    Attributes:
        name: the tree's id and the branch's number.
        document, section: where it stands.
        tree: what the tree asks.
        when: its conditions, as in `advice.yaml`; empty: every case.
        picks: the advised methods, any of them.
        original: the words as printed.
        note: how they were read, empty where that needs no saying.
        command: what runs it here.
    """

    name: str
    document: str
    section: str
    tree: str
    when: Mapping[str, Any]
    picks: tuple[Pick, ...]
    original: str
    note: str
    command: str

    @property
    def place(self) -> tuple[str, str]:
        """Document and section."""
        return self.document, self.section

    @property
    def case(self) -> str:
        """The conditions in words."""
        said = []
        for key, value in self.when.items():
            if key in BOUNDS:
                said.append(f"{'above' if key == BOUNDS[0] else 'below'} {value / 1e9:g} B")
            else:
                said.append(f"{key} {' or '.join(_several(value))}")
        return ", ".join(said) or "every case"

    @property
    def text(self) -> str:
        """The advised methods in words."""
        return " or ".join(pick.text for pick in self.picks)

    def holds(self, case: Case) -> bool:
        """Whether `case` states every condition of the branch."""
        return all(_meets(case, key, value) for key, value in self.when.items())

    def names(self, row: Row) -> bool:
        """Whether `row` is what is advised."""
        return any(pick.names(row) for pick in self.picks)


@dataclass(frozen=True)
class Contradiction:
    """A case for which documents do not agree; each side's branches advise the same."""

    case: str
    sides: tuple[tuple[Advice, ...], ...]


@cache
def advice() -> tuple[Advice, ...]:
    """Return every branch of `advice.yaml`, in its order.

    Raises:
        ValueError: as `read_tree`.
    """
    return read_trees(entries.read_yaml(Path(__file__).parents[1] / "advice.yaml"))


def read_trees(found: Any) -> tuple[Advice, ...]:
    """Return what the content of `advice.yaml` says.

    Raises:
        ValueError: as `read_tree`.
    """
    if not entries.several(entries.mapping)(found):
        raise ValueError("advice.yaml is no list of trees")
    return tuple(one for tree in found for one in read_tree(tree))


def read_tree(tree: Mapping[str, Any]) -> list[Advice]:
    """Return the branches of one tree of the file.

    Raises:
        ValueError: a field is missing or unknown, or a condition is none of `VOCABULARY`; the
            sentence names the entry.
    """
    name = f"advice.yaml: {tree.get('id', 'a tree')}"
    if wrong := sorted(set(tree) ^ set(_TREE)):
        raise ValueError(f"{name} lacks, or has beside the known fields: {', '.join(wrong)}")
    entries.check_entry(tree, name, _OF_TREE)
    if tree["document"] not in DOCUMENTS:
        raise ValueError(f"{name} names no document: {tree['document']}")
    return [_branch(tree, entry, number) for number, entry in enumerate(tree["entries"], 1)]


def advice_for(case: Case) -> list[Advice]:
    """Return the branches that hold for `case`, in the order of the file."""
    return [one for one in advice() if one.holds(case)]


def contradictions(found: Sequence[Advice]) -> list[Contradiction]:
    """Return the cases of `found` for which two sections advise nothing in common.

    Of a case, every branch counts that holds for it: its own and those that ask for less. Branches
    for every case contradict nobody.
    """
    known = [one for one in found if one.when]
    made = []
    for case in dict.fromkeys(one.case for one in known):
        asked = next(one.when for one in known if one.case == case)
        sides: dict[str, list[Advice]] = {}
        for one in known:
            if _within(asked, one.when):
                sides.setdefault(one.text, []).append(one)
        pairs = combinations([one for side in sides.values() for one in side], 2)
        if any(one.place != other.place and not _agree(one, other) for one, other in pairs):
            made.append(Contradiction(case, tuple(tuple(side) for side in sides.values())))
    return made


def places(branches: Iterable[Advice]) -> str:
    """Return where the branches stand, in short: `guide part 4, part 6; chapter 27.4.5`."""
    found: dict[str, list[str]] = {}
    for branch in branches:
        found.setdefault(branch.document, []).append(branch.section.split(",")[0])
    return "; ".join(f"{name} {', '.join(dict.fromkeys(of))}" for name, of in found.items())


def advice_blocks() -> list[Block]:
    """Return the block of all trees, and of where they contradict each other."""
    found = advice()
    trees = len({one.place for one in found})
    return [
        Block(
            "The documents' decision trees",
            sentences=(
                f"{words.count(len(found), 'branch', 'branches')} of {trees} trees and tables; "
                "python -m reports recommend lists those that hold for a case beside the choice "
                "from measured rows.",
            ),
            grids=(_trees(found), _contradicting(contradictions(found))),
            legend=LEGEND,
        )
    ]


LEGEND = (
    "Case: what a branch asks; B are billions of parameters. Advised: as run.py calls it; of GGUF "
    "without a type, Q4_K_M, which the same chapter recommends. For a case, every branch counts "
    "that asks for nothing else; it stands among the contradictions where two sections advise "
    "nothing in common. Which of them is right for a model is for its rows to say."
)


def _branch(tree: Mapping[str, Any], entry: Mapping[str, Any], number: int) -> Advice:
    name = f"{tree['id']}-{number}"
    where = f"advice.yaml: {name}"
    if wrong := sorted(set(entry) - set(_ENTRY)):
        raise ValueError(f"{where} has unknown fields: {', '.join(wrong)}")
    entries.check_entry(entry, where, _OF_ENTRY)
    if missing := [
        key for key in _NEEDED if key not in entry or (key != "when" and not entry[key])
    ]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for key, value in entry["when"].items():
        if key in BOUNDS:
            known = entries.number(value) and value > 0
        else:
            values = set(_several(value))
            known = bool(values) and values <= set(VOCABULARY.get(key, ()))
        if not known:
            said = value if isinstance(value, str) else entries.short(value)
            raise ValueError(f"{where} has no such condition: {key} {said:.60}")
    picks = tuple(_pick(words_, where) for words_ in entry["advice"])
    command = entry.get("command") or _command(picks, entry["when"])
    return Advice(
        name,
        tree["document"],
        tree["section"],
        tree["title"],
        entry["when"],
        picks,
        entry["original"],
        entry.get("note", ""),
        command,
    )


def _pick(text: str, where: str) -> Pick:
    pairs = [tuple(word.split("=", 1)) for word in text.split()]
    found = {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and pair[1]}
    if len(found) != len(pairs) or not ({"method", "bits"} & set(found)):
        raise ValueError(f"{where} advises {text!r}; it needs method= or bits=, as run.py takes it")
    if found.get("method") == GGUF and "gguf_type" not in found:
        raise ValueError(f"{where} advises {text!r} without its gguf_type")
    return Pick(tuple(found.items()))


def _command(picks: Iterable[Pick], when: Mapping[str, Any]) -> str:
    hardware = " hardware=cuda" if set(_several(when.get("device"))) & {"nvidia"} else ""
    if when.get("device") == "mixed":
        hardware = " hardware=cuda"
    calls = (" ".join(f"{key}={value}" for key, value in pick.words) for pick in picks)
    return "; ".join(f"python run.py {call}{hardware}" for call in calls)


def _several(value: Any) -> list[str]:
    """Return one condition's values: it may name several, any of which will do."""
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _meets(case: Case, key: str, value: Any) -> bool:
    if key in BOUNDS:
        if case.parameters is None:
            return False
        return bool(case.parameters > value if key == BOUNDS[0] else case.parameters < value)
    if key == "priority":
        return bool(case.priorities & set(_several(value)))
    return getattr(case, key) in _several(value)


def _within(narrow: Mapping[str, Any], wide: Mapping[str, Any]) -> bool:
    """Whether every case of `narrow` is one of `wide`."""
    for key, value in wide.items():
        if key not in narrow:
            return False
        if key == BOUNDS[0] and narrow[key] < value:
            return False
        if key == BOUNDS[1] and narrow[key] > value:
            return False
        if key not in BOUNDS and not set(_several(narrow[key])) <= set(_several(value)):
            return False
    return True


def _agree(one: Advice, other: Advice) -> bool:
    """Whether one row can be what both advise: no word of theirs that differs."""
    shared = ("method", "gguf_type", *AXES)
    pairs = [(dict(a.words), dict(b.words)) for a in one.picks for b in other.picks]
    return any(
        all(mine[k] == theirs[k] for k in shared if k in mine and k in theirs)
        for mine, theirs in pairs
    )


def _trees(found: Iterable[Advice]) -> Grid:
    heads = ("Document", "Section", "Case", "Advised", "As printed", "How it was read", "Command")
    lines = tuple(
        (
            Field(one.document),
            Field(one.section),
            Field(one.case),
            Field(one.text),
            Field(one.original, language="zh"),
            Field(one.note),
            Field(one.command),
        )
        for one in found
    )
    return Grid("Every branch", tuple(Head(text) for text in heads), lines, folded=True)


def _contradicting(found: Iterable[Contradiction]) -> Grid:
    lines = tuple(
        (
            Field(one.case),
            Field(" / ".join(f"{side[0].text} ({places(side)})" for side in one.sides)),
        )
        for one in found
    )
    heads = (Head("Case"), Head("Advised, and by whom"))
    return Grid("Where they contradict each other", heads, lines)
