"""The block of the documents' listings: whole, without places, with commands that compose."""

from __future__ import annotations

import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from harness.listing_data import read_data
from reports.documents import listings
from reports.documents.listings import VERDICTS, listings_blocks

PROJECT = Path(__file__).parents[3]
AXES = ("bits", "group_size", "gguf_type")
OUTCOMES = PROJECT / "reports" / "listings.yaml"


@cache
def outcomes() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(OUTCOMES.read_text(encoding="utf-8"))
    return found


def test_every_listing_has_an_outcome_with_todays_texts() -> None:
    data = read_data()
    found = outcomes()["listings"]
    assert [one["id"] for one in found] == [entry.id for entry in data.entries]
    for one, entry in zip(found, data.entries, strict=True):
        for name in ("digest", "wants", "instead", "not_run", "section", "what"):
            assert one[name] == getattr(entry, name), (one["id"], name)
        # The reason is the one written by hand, with facts in the place of their names.
        parts = re.split(r"\{\w+(?::[^}]*)?\}", entry.why)
        assert re.fullmatch(".*".join(re.escape(part) for part in parts), one["why"]), one["id"]
        assert one["verdict"] in VERDICTS
        today = [attempt for attempt in entry.attempts if attempt.today]
        assert len(one["with_surroundings"]) == len(today), one["id"]
        for seen, attempt in zip(one["with_surroundings"], today, strict=True):
            assert seen["changes"] == [data.changes[name].says for name in attempt.changes]
        older = [attempt for attempt in entry.attempts if attempt.legacy]
        assert len((one["legacy"] or {"with_surroundings": []})["with_surroundings"]) == len(older)
        assert one["language"] != "python" or one["as_printed"] is not None


def test_outcomes_hold_no_place_of_a_machine() -> None:
    text = OUTCOMES.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w:/.<])/(?:home|root|tmp|usr|work|opt|var|Users)/", text)
    assert outcomes()["versions"]["torch"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", outcomes()["seen"])


def test_a_verdict_agrees_with_what_was_seen() -> None:
    for one in outcomes()["listings"]:
        tried = [ended for ended in (one["as_printed"], *one["with_surroundings"]) if ended]
        raised = tried[-1].get("found", {}).get("raised", "nothing") if tried else "nothing"
        if one["verdict"].startswith("runs"):
            assert (tried[-1]["exit"], raised) == (0, "nothing"), one["id"]
        if one["verdict"] == "does not run":
            assert tried[-1]["exit"] != 0 or raised != "nothing", one["id"]
        for ended in tried:
            assert ended["exit"] == 0 or "message" in ended, one["id"]


def test_the_block_shows_every_listing_once() -> None:
    (block,) = listings_blocks()
    code, runs, rest = block.grids
    shown = [line[0].text.partition(",")[0] for grid in (code, rest) for line in grid.lines]
    assert sorted(shown) == sorted(one["id"] for one in outcomes()["listings"])
    assert len(runs.lines) > len(code.lines)
    for grid in block.grids:
        assert {len(line) for line in grid.lines} == {len(grid.heads)}
    assert rest.folded
    assert not code.folded
    assert block.sentences[0].startswith("Of 67 blocks in the documents ")
    assert sum(map(int, re.findall(r"(\d+) (?:runs|does|not|no )", block.sentences[0]))) == 67


def test_a_line_tells_the_printed_listing_its_attempts_and_the_archived_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = {"exit": 1, "exception": "NameError", "message": "name 'x'", "line": 2, "quote": "x()"}
    one = {
        "id": "A-1",
        "section": "1",
        "language": "python",
        "what": "code",
        "wants": "Run.",
        "not_run": None,
        "as_printed": failed,
        "with_surroundings": [
            {"beside": ["a model"], "changes": ["x"], "exit": None, "message": "ended"}
        ],
        "legacy": {
            "as_printed": {"exit": 0},
            "with_surroundings": [{"beside": [], "changes": ["y"], "exit": 0}],
        },
        "verdict": "does not run",
        "why": "Because.",
        "instead": None,
    }
    found = {"seen": "2026-01-01", "versions": {"torch": "1"}, "legacy_versions": {"torch": "0"}}
    monkeypatch.setattr(listings, "_outcomes", lambda: {**found, "listings": [one]})
    (block,) = listings_blocks()
    assert [field.text for field in block.grids[0].lines[0]] == [
        "A-1, 1",
        "Run.",
        "NameError: name 'x'",
        "ended; archived libraries: ends without an error",
        "does not run",
        "Because.",
        "–",
    ]
    assert [[field.text for field in line[1:]] for line in block.grids[1].lines] == [
        ["today's", "–", "–", "NameError: name 'x' (line 2: x())"],
        ["today's", "a model", "x", "ended"],
        ["archived", "–", "–", "ends without an error"],
        ["archived", "–", "y", "ends without an error"],
    ]
    assert block.sentences[1].endswith("The archived libraries: torch 0.")


def commands() -> list[str]:
    return sorted({one["instead"] for one in outcomes()["listings"] if one["instead"]})


def test_every_command_of_ours_is_one_that_exists() -> None:
    composed = [command for command in commands() if command.startswith("python run.py ")]
    assert len(composed) > 20
    for command in set(commands()) - set(composed):
        first, *rest = shlex.split(command)
        assert first in ("make", "python"), command
        if first == "make":
            assert re.search(rf"^{rest[0]}:", (PROJECT / "Makefile").read_text(), re.MULTILINE)
        else:
            assert rest[0] == "-m", command
            assert find_spec(rest[1]) is not None
    words = [
        [_one_value(word, last) for word in shlex.split(command)[2:] if word != "-m"]
        for command in composed
        for last in (False, True)
    ]
    for word in {word for one in words for word in one if "." not in word and word[0] != "+"}:
        group, _, choice = word.partition("=")
        assert group in AXES or (PROJECT / "conf" / group / f"{choice}.yaml").is_file(), word
    # A composition takes a tenth of a second: only what sets an option is composed.
    alike = {tuple(word for word in one if word.split("=")[0] not in AXES): one for one in words}
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        for known, one in alike.items():
            if any("." in word.split("=")[0] or word[0] == "+" for word in known):
                compose("config", one)


def _one_value(word: str, last: bool) -> str:
    """Return an override with the first or the last of its values, where it is a sweep."""
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    values = list(override.sweep_string_iterator())
    return f"{override.get_key_element()}={values[-1 if last else 0]}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"not_run": None, "as_printed": None},
            r"listings\.yaml: \S+ was neither run nor says why not",
        ),
        (
            {"legacy": {"as_printed": None, "with_surroundings": []}},
            r"listings\.yaml: \S+ was not run beside what it expects with archived libraries",
        ),
    ],
)
def test_an_outcome_that_says_nothing_is_refused(change: dict[str, Any], said: str) -> None:
    one = next(one for one in outcomes()["listings"] if one["legacy"])
    with pytest.raises(ValueError, match=said):
        listings.read_outcomes({**outcomes(), "listings": [{**one, **change}]})
