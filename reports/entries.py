"""Reads the YAML files that this package shows, and holds each entry against what it has to be.

They come with the project, and people change them by hand: a slip is one sentence that names the
entry, never an error of YAML's own making or a page with nonsense on it.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

MOST_DEPTH = 20
"""Nested lists and mappings; the deepest file has seven."""

Kind = Callable[[Any], bool]


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as plain data.

    Raises:
        ValueError: it is none, is nested deeper than `MOST_DEPTH`, or uses an anchor.
    """
    return parse_yaml(path.read_text(encoding="utf-8"), path.name)


def parse_yaml(text: str, name: str) -> Any:
    """Return what a YAML text says as plain data: numbers, texts, lists and mappings by text.

    Raises:
        ValueError: as `read_yaml`; `name` stands in the sentence.
    """
    # libyaml's parser, where PyYAML was built with it, takes a tenth of the seconds.
    kind = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        loader = kind(text)
        try:
            found = loader.get_single_data()
        finally:
            loader.dispose()
    # Of a tag whose text does not fit it PyYAML raises what it stumbles over.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{name} is no YAML: {' '.join(str(error).split())[:200]}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no YAML: {' '.join(str(error).split())[:200]}") from error
    _check_plain(found, name)
    return found


def _check_plain(found: Any, name: str) -> None:
    """Raise ValueError where something is too deep, stands twice (anchors), or is no plain data."""
    level, seen, depth = [found], set(), 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"{name} is nested deeper than {MOST_DEPTH}")
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict | list):
                # A few anchors can stand for more entries than there are atoms.
                if id(part) in seen:
                    raise ValueError(f"{name} uses an anchor; write the entry out")
                seen.add(id(part))
            if isinstance(part, dict):
                if not all(type(key) is str for key in part):
                    raise ValueError(f"{name} has a mapping whose keys are not all texts")
                below.extend(part.values())
            elif isinstance(part, list):
                below.extend(part)
            elif not (part is None or isinstance(part, str | bool | int | float | datetime.date)):
                raise ValueError(f"{name} has an entry of type {type(part).__name__}")
        level = below


def check_entry(found: Any, where: str, kinds: Mapping[str, Kind]) -> None:
    """Refuse an entry that is no mapping, or of which a field that is there is of another kind.

    Raises:
        ValueError: the sentence begins with `where` and names the field.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} is {short(found)}, and a mapping is needed")
    for key, kind in kinds.items():
        if key in found and not kind(found[key]):
            raise ValueError(f"{where} has {short(found[key])} as {key}")


def short(found: Any) -> str:
    """Return a value as a sentence shows it."""
    whole = isinstance(found, int) and found.bit_length() > 1024
    return "a long number" if whole else f"{found!r:.60}"


def text(found: Any) -> bool:
    """Whether it is a text."""
    return isinstance(found, str)


def number(found: Any) -> bool:
    """Whether it is a finite number."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    return found.bit_length() <= 1023 if isinstance(found, int) else math.isfinite(found)


def mapping(found: Any) -> bool:
    """Whether it is a mapping."""
    return isinstance(found, dict)


def scalar(found: Any) -> bool:
    """Whether it is null, a text, true or false, or a number."""
    return found is None or isinstance(found, str | bool) or number(found)


def optional(kind: Kind) -> Kind:
    """Return whether it is null or of `kind`."""
    return lambda found: found is None or kind(found)


def several(kind: Kind) -> Kind:
    """Return whether it is a list of `kind`."""
    return lambda found: isinstance(found, list) and all(map(kind, found))


def by_name(kind: Kind) -> Kind:
    """Return whether it is a mapping to `kind`."""
    return lambda found: isinstance(found, dict) and all(map(kind, found.values()))
