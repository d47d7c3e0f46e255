"""What differs around the figures of two sets of records: machine, libraries, model, text, options.

Facts are those that records hold. Code has no digest of its own in them: the keys of an artefact
and of a cell are digests that count it, so unequal keys say that something did change, and equal
ones that nothing did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from reports import words
from reports.diff.match import Pair, settings
from reports.rows import Row, kernels, mapping, number

MACHINE = ("cpu", "gpu", "cores", "threads", "device")
"""What makes a machine: where one of these differs, no speed is the software's alone."""

BUSY = 1.5
"""Load average a core from which a speed is that of a shared machine: a sweep alone makes 1."""

MOST_NAMED = 12

SHORT = 12
"""Digits of a digest that are shown."""


@dataclass(frozen=True)
class Fact:
    """One fact that differs in `pairs` of the matched cells."""

    kind: str
    name: str
    first: str
    second: str
    pairs: int


def facts(pairs: Sequence[Pair]) -> list[Fact]:
    """Return what differs around the figures of matched cells, each difference once."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    for pair in pairs:
        for kind, of_row in _KINDS:
            first, second = of_row(pair.first), of_row(pair.second)
            for name in first.keys() & second.keys():
                if first[name] != second[name]:
                    found[kind, name, first[name], second[name]] += 1
    order = [kind for kind, _ in _KINDS]
    made = [Fact(*key, count) for key, count in found.items()]
    return sorted(made, key=lambda fact: (order.index(fact.kind), words.natural(fact.name)))


def one_sided(pairs: Sequence[Pair]) -> list[str]:
    """Return what the records of one set state and those of the other do not know at all."""
    said = []
    for place, name in ((0, "A"), (1, "B")):
        names: dict[str, None] = {}
        for pair in pairs:
            ends = (pair.first, pair.second)
            for _, of_row in _KINDS:
                own, other = of_row(ends[place]), of_row(ends[1 - place])
                names |= dict.fromkeys(f"{key} {own[key]}" for key in own if key not in other)
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            said.append(f"Recorded in {name} alone: {', '.join([*names][:MOST_NAMED])}{more}.")
    return said


def other_machine(pair: Pair) -> dict[str, str]:
    """Return the facts of the machine in which a pair differs, each with both values."""
    ends = [mapping(row.record.environment) for row in (pair.first, pair.second)]
    return {
        name: f"{name} {ends[0].get(name)} in A, {ends[1].get(name)} in B"
        for name in MACHINE
        if ends[0].get(name) != ends[1].get(name)
    }


def other_model(pair: Pair) -> str:
    """Return why the two models are not one; empty where nothing says so."""
    ones = [_model(row) for row in (pair.first, pair.second)]
    for name in ones[0].keys() & ones[1].keys():
        if ones[0][name] != ones[1][name]:
            return f"another model: {name} {ones[0][name]} in A, {ones[1][name]} in B"
    return ""


def other_text(pair: Pair) -> str:
    """Return why the two evaluation texts are not one; empty where nothing says so."""
    digests = [_digest(row.record.config.get("evaluation_digest")) for row in _rows(pair)]
    if all(digests) and digests[0] != digests[1]:
        return f"another evaluation text: digest {digests[0]} in A, {digests[1]} in B"
    return ""


def key_sentences(pairs: Sequence[Pair]) -> list[str]:
    """Return what the keys of matched cells say of code, and of texts without a digest."""
    same = sum(_same(pair, "cell_key") for pair in pairs)
    made = sum(_same(pair, "artefact_key") for pair in pairs)
    total = words.count(len(pairs), "matched cell")
    if same == len(pairs):
        return [
            f"The keys of all {total} are equal: same code, libraries, model, text and machine."
        ]
    found = [
        f"Of {total}, {made} hold a model that the same code and libraries quantized (equal "
        f"artefact keys), and {same} were measured by the same code and libraries on the same "
        "machine and text (equal cell keys)."
    ]
    unknown = [p for p in pairs if not _same(p, "cell_key") and not _texts_known(p)]
    if unknown:
        found.append(
            f"The records of {words.count(len(unknown), 'pair')} hold no digest of the evaluation "
            "text: that it is the same is known by its name and its number of windows alone."
        )
    return found


def load_sentence(pairs: Sequence[Pair]) -> str:
    """Return how busy the machines were when the cells began; empty where no record says."""
    said = []
    for name, rows in (("A", [p.first for p in pairs]), ("B", [p.second for p in pairs])):
        loads = [number(mapping(row.record.environment).get("load_average")) for row in rows]
        present = [load for load in loads if load is not None]
        if present:
            said.append(f"{min(present):.2f} to {max(present):.2f} in {name}")
    if not said:
        return ""
    tail = ""
    if any(busy(row) for pair in pairs for row in (pair.first, pair.second)):
        tail = f", above {BUSY:g} a core: a speed that differs there is not judged"
    return f"Load average when the cells began: {words.listed(said)}{tail}."


def busy(row: Row) -> bool:
    """Whether others used the machine when the row's cell began, by its load average."""
    environment = mapping(row.record.environment)
    load, cores = number(environment.get("load_average")), number(environment.get("cores"))
    return load is not None and cores is not None and load > BUSY * cores


def _rows(pair: Pair) -> tuple[Row, Row]:
    return pair.first, pair.second


def _same(pair: Pair, key: str) -> bool:
    ends = [row.record.config.get(key) for row in _rows(pair)]
    return bool(ends[0]) and ends[0] == ends[1]


def _texts_known(pair: Pair) -> bool:
    return all(row.record.config.get("evaluation_digest") for row in _rows(pair))


def _digest(found: object) -> str:
    return str(found or "")[:SHORT]


def _machine(row: Row) -> dict[str, str]:
    names = (*MACHINE, "memory_bytes", "host", "gpu_memory_bytes", "cuda", "platform")
    found = _present(row.record.environment, names)
    return {"gpu": "none", **found} if row.record.environment else {}


def _software(row: Row) -> dict[str, str]:
    environment = mapping(row.record.environment)
    packages = mapping(environment.get("packages"))
    return _present(environment, ("python",)) | _present(packages, packages)


def _model(row: Row) -> dict[str, str]:
    own = _digest(row.model_identity)
    reference = mapping(mapping(row.record.details.get("model")).get("reference"))
    other = _digest(reference.get("commit") or reference.get("sha256") or reference.get("digest"))
    return {
        name: value for name, value in (("weights", own), ("reference's weights", other)) if value
    }


def _texts(row: Row) -> dict[str, str]:
    calibration = mapping(row.record.details.get("calibration"))
    found = {
        "evaluation text": _digest(row.record.config.get("evaluation_digest")),
        "calibration": " ".join(
            part
            for part in (str(calibration.get("text") or ""), _digest(calibration.get("digest")))
        ).strip(),
    }
    for task, entry in mapping(row.record.details.get("tasks")).items():
        found[f"questions of {task}"] = _digest(mapping(entry).get("questions"))
    return {name: value for name, value in found.items() if value}


def _options(row: Row) -> dict[str, str]:
    found = {"suite": row.suite, **settings(row.record)}
    found.pop("suite.name", None)
    return {name: value for name, value in found.items() if name.partition(".")[0] != "model"}


def _execution(row: Row) -> dict[str, str]:
    names = dict.fromkeys(str(entry.get("kernel") or "") for entry in kernels(row))
    found = {
        "kernels": "; ".join(names),
        "execution": row.execution,
        **{key: str(row.record.details.get(key) or "") for key in ("runtime", "decoding")},
    }
    return {name: value for name, value in found.items() if value}


def _present(found: Mapping[str, object], names: Iterable[str]) -> dict[str, str]:
    return {
        name.removesuffix("_bytes").replace("_", " "): (
            words.figure(name, float(value))
            if name.endswith("_bytes") and isinstance(value, int)
            else words.one_line(value)
        )
        for name in names
        if (value := found.get(name)) is not None
    }


_KINDS: tuple[tuple[str, Callable[[Row], dict[str, str]]], ...] = (
    ("machine", _machine),
    ("software", _software),
    ("model", _model),
    ("text", _texts),
    ("option", _options),
    ("run by", _execution),
)
