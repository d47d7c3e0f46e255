"""The page of worked questions: what it links to is there, and its commands are ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reports.__main__ import COMMANDS

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "questions.md").read_text()
LONGEST = 30
"""Lines of an answer, its command and table included."""


def anchors(page: str) -> set[str]:
    """Return the anchors that a forge makes of the headings of a page."""
    heads = re.findall(r"^#+ (.*)", page, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 20
    for link in links:
        file, _, anchor = link.partition("#")
        page = DOCS / file if file else DOCS / "questions.md"
        assert page.is_file(), link
        assert not anchor or anchor in anchors(page.read_text()), link


def test_answers_are_short_and_begin_with_what_is_asked() -> None:
    parts = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    assert len(parts) >= 12
    for part in parts:
        assert len(part.splitlines()) <= LONGEST, part.splitlines()[0]
        assert "```\npython " in part, part.splitlines()[0]


@pytest.mark.parametrize("command", re.findall(r"^python -m reports .*", TEXT, re.MULTILINE))
def test_commands_of_the_report_have_a_folder_or_a_known_first_word(command: str) -> None:
    words = command.split()[3:]
    assert words[0] in COMMANDS or words[0].startswith("runs"), command
