"""Finds the code listings of the documents and tells whether a document has changed.

Two shapes are known. `fenced`: blocks between lines of three backticks, by their number in the
document. `flattened`: the line breaks of the article's listings were lost, so each is a stretch of
one long line that is found by its first and its last words. A listing is held against a digest of
its text: what is said of it was seen with that text and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import ConfigError

FENCE = "```"
DIGEST_LENGTH = 12


@dataclass(frozen=True)
class Listing:
    """A listing as it stands in its document; `number` counts the listings of the document."""

    number: int
    language: str
    text: str

    @property
    def digest(self) -> str:
        """The first digits of SHA-256 of its text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:DIGEST_LENGTH]


def fenced(text: str) -> list[Listing]:
    """Return the blocks of `text` between fences, the first is number 1; one left open counts."""
    found: list[Listing] = []
    language: str | None = None
    lines: list[str] = []
    for line in [*text.splitlines(), FENCE]:
        if not line.startswith(FENCE):
            lines.append(line)
        elif language is None:
            language, lines = line[len(FENCE) :].strip(), []
        else:
            found.append(Listing(len(found) + 1, language, "\n".join(lines)))
            language = None
    return found


def flattened(text: str, words: Iterable[tuple[str, str]]) -> list[Listing]:
    """Return the stretches of `text` from each pair's first words to its last, in that order.

    Raises:
        ConfigError: a stretch is not there.
    """
    found: list[Listing] = []
    end = 0
    for first, last in words:
        start = text.find(first, end)
        closing = text.find(last, start)
        if start < 0 or closing < 0:
            raise ConfigError(
                f"there is no listing from '{first}' to '{last}'; the document differs from the "
                "one that the data of listings were written for"
            )
        end = closing + len(last)
        found.append(Listing(len(found) + 1, "python", text[start:end]))
    return found


def read_listings(
    folder: Path, files: Mapping[str, Mapping[str, Any]], entries: Iterable[Mapping[str, Any]]
) -> dict[str, Listing]:
    """Return the listing of every entry by the entry's `id`.

    Args:
        folder: holds the documents.
        files: by the document's name: its `file`, and its `form`, `fenced` or `flattened`.
        entries: each with `id`, `document`, `number`, `digest`; of a flattened document also with
            `first` and `last`, words of the text.

    Raises:
        ConfigError: the folder or a document is missing, or a document is another one.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; it must be the one with the documents")
    entries = list(entries)
    found: dict[str, Listing] = {}
    for name, about in files.items():
        own = [entry for entry in entries if entry["document"] == name]
        path = folder / str(about["file"])
        if not path.is_file():
            raise ConfigError(f"the folder {folder} has no document {about['file']}")
        text = path.read_text(encoding="utf-8")
        if about["form"] == "fenced":
            listings = fenced(text)
        else:
            listings = flattened(text, [(entry["first"], entry["last"]) for entry in own])
        found |= _matched(str(about["file"]), own, listings)
    return found


def _matched(
    file: str, entries: list[Mapping[str, Any]], listings: list[Listing]
) -> dict[str, Listing]:
    if len(entries) != len(listings):
        raise ConfigError(
            f"the document {file} has {len(listings)} listings, and {len(entries)} are known; it "
            "differs from the one that the data of listings were written for"
        )
    found = {}
    for entry in entries:
        listing = listings[entry["number"] - 1]
        if listing.digest != entry["digest"]:
            raise ConfigError(
                f"listing {entry['number']} of the document {file} ({entry['id']}) has changed: "
                f"its digest is {listing.digest}, not {entry['digest']}; what is said of it in "
                "harness/listings.yaml must be looked at again"
            )
        found[entry["id"]] = listing
    return found
