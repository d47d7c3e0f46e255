"""Runs every code listing of the documents and writes down what happened.

    python -m harness.listings DOCUMENTS_FOLDER [--only ID] [--python legacy/bin/python]

What a listing wants, what is put beside it and the command of ours stand in
`harness/listings.yaml`; what happened is seen by running it here and goes to
`reports/listings.yaml`. The listings themselves belong to the documents and are not kept.
Torch-free: the listings run in children without network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from harness.listing_data import CODE, Attempt, Data, Entry, read_data
from harness.listing_run import Job, check_offline, make_surroundings, run_job
from harness.listing_text import Listing, read_listings
from harness.record import write_atomically
from kernels.errors import ConfigError

OUTCOMES = Path(__file__).parents[1] / "reports" / "listings.yaml"
TIME_LIMIT_SECONDS = 120.0
RESTATED = "its calls and its arithmetic in lines of our own"
HEADER = """\
# What happened when the documents' listings were run. Written by `python -m harness.listings`, not
# by hand; texts come from harness/listings.yaml.
"""


@dataclass(frozen=True)
class Bench:
    """What every listing of a run shares.

    Attributes:
        data: what is written by hand.
        listings: by id.
        folder: where what is put beside listings was made.
        seconds: time limit of one process.
    """

    data: Data
    listings: Mapping[str, Listing]
    folder: Path
    seconds: float

    def runs(self, entry: Entry, python: Path, legacy: bool) -> dict[str, Any]:
        """Return what happened to a listing as printed and with its surroundings."""
        listing = self.listings[entry.id]
        printed = None
        if listing.language == "python" and entry.not_run is None:
            printed = self._ended(Job(listing.text), python)
        attempts = [one for one in entry.attempts if (one.legacy if legacy else one.today)]
        return {
            "as_printed": printed,
            "with_surroundings": [self._attempt(entry, one, python) for one in attempts],
        }

    def _attempt(self, entry: Entry, attempt: Attempt, python: Path) -> dict[str, Any]:
        beside = {self.data.beside[name].path: self.folder / name for name in attempt.beside}
        says = [self.data.beside[name].says for name in attempt.beside]
        if attempt.alone or entry.first is not None:
            job, says = Job("", attempt.probe, beside), [RESTATED, *says]
            return {"beside": says, "changes": [], **self._ended(job, python)}
        text = "\n".join(self.listings[name].text for name in (*attempt.after, entry.id))
        for name in attempt.changes:
            change = self.data.changes[name]
            if change.find not in text:
                raise ConfigError(f"listing {entry.id} has no words '{change.find}' to change")
            text = text.replace(change.find, change.put)
        says += [f"listing {name} before it" for name in attempt.after]
        changes = [self.data.changes[name].says for name in attempt.changes]
        ended = self._ended(Job(text, attempt.probe, beside), python)
        return {"beside": says, "changes": changes, **ended}

    def _ended(self, job: Job, python: Path) -> dict[str, Any]:
        ended = run_job(job, python, self.seconds)
        ended.pop("versions", None)
        return ended


def verdict(entry: Entry, seen: Mapping[str, Any]) -> str:
    """Return what today's libraries make of a listing, from what was seen."""
    if entry.what not in CODE:
        return "no code"
    tried = [one for one in (seen["as_printed"], *seen["with_surroundings"]) if one is not None]
    if not tried:
        return "not run"
    found = tried[-1].get("found", {})
    if tried[-1]["exit"] != 0 or found.get("raised", "nothing") != "nothing":
        return "does not run"
    if not found.get("as_wanted", True):
        return "runs, wrong result"
    whole = not tried[-1].get("changes") and entry.first is None
    return "runs" if whole else "runs changed"


def outcome(entry: Entry, listing: Listing, seen: Mapping[str, Any]) -> dict[str, Any]:
    """Return one entry of the outcomes; the reasons are filled with the facts that were found.

    Raises:
        ConfigError: the reasons name a fact that was not found.
    """
    facts: dict[str, Any] = {}
    older = (seen.get("legacy") or {}).get("with_surroundings", ())
    for one in (*older, *seen["with_surroundings"]):
        facts |= one.get("found", {})
    try:
        why = entry.why.format_map(facts)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"listings.yaml: why of {entry.id} names {error}, which its probes did not find"
        ) from None
    return {
        "id": entry.id,
        "document": entry.document,
        "number": entry.number,
        "section": entry.section,
        "language": listing.language,
        "what": entry.what,
        "digest": listing.digest,
        "wants": entry.wants,
        "not_run": entry.not_run,
        "as_printed": seen["as_printed"],
        "with_surroundings": seen["with_surroundings"],
        "legacy": seen.get("legacy"),
        "verdict": verdict(entry, seen),
        "why": why,
        "instead": entry.instead,
    }


def run_listings(
    folder: Path, only: Sequence[str], legacy: Path | None, out: Path, seconds: float
) -> None:
    """Run the listings in `folder` that `only` names, or all, and write the outcomes to `out`.

    Raises:
        ConfigError: a document is missing or has changed, an id is unknown, or nothing can be run.
    """
    data = read_data()
    listings = read_listings(folder, data.files, [vars(entry) for entry in data.entries])
    if unknown := sorted(set(only) - {entry.id for entry in data.entries}):
        raise ConfigError(
            f"--only {unknown[0]}: there is no listing of this id; ids are as 000-7, from "
            f"{data.entries[0].id} to {data.entries[-1].id}"
        )
    chosen = [entry for entry in data.entries if not only or entry.id in only]
    if legacy is not None and not legacy.is_file():
        raise ConfigError(f"--python {legacy}: there is no such interpreter; make legacy-env")
    check_offline()
    known = yaml.safe_load(out.read_text(encoding="utf-8")) if out.is_file() else {}
    before = {one["id"]: one for one in known.get("listings", ())}
    versions = _versions(Path(sys.executable), seconds)
    older = known.get("legacy_versions") if legacy is None else _versions(legacy, seconds)
    if only and known and known["versions"] != versions:
        raise ConfigError(
            f"--only {only[0]}: the other outcomes in {out} were seen with other versions of "
            "libraries; run all"
        )
    found = dict(before) if only else {}
    with TemporaryDirectory(prefix="listings-") as name:
        beside = Path(name).resolve()
        if any(attempt.beside for entry in chosen for attempt in entry.attempts):
            print("making what listings need beside them", flush=True)
            make_surroundings(beside)
        bench = Bench(data, listings, beside, seconds)
        for entry in chosen:
            seen = _seen(bench, entry, legacy, before.get(entry.id, {}).get("legacy"))
            found[entry.id] = outcome(entry, listings[entry.id], seen)
            print(f"{entry.id}: {found[entry.id]['verdict']}", flush=True)
    written = {
        "seen": datetime.now(UTC).date().isoformat(),
        "versions": versions,
        "legacy_versions": older,
        "files": {name: about["file"] for name, about in data.files.items()},
        "listings": [found[entry.id] for entry in data.entries if entry.id in found],
    }
    _write(out, written)


def write_texts(folder: Path, out: Path) -> None:
    """Write the texts of today into the outcomes in `out`; what was seen stays.

    Raises:
        ConfigError: a document is missing or has changed, or a listing was never run.
    """
    data = read_data()
    listings = read_listings(folder, data.files, [vars(entry) for entry in data.entries])
    known = yaml.safe_load(out.read_text(encoding="utf-8")) if out.is_file() else {"listings": []}
    before = {one["id"]: one for one in known["listings"]}
    for entry in data.entries:
        if entry.id not in before:
            raise ConfigError(f"--texts: {out} has no outcome of {entry.id}; run it first")
    known["listings"] = [
        outcome(entry, listings[entry.id], before[entry.id]) for entry in data.entries
    ]
    _write(out, known)


def _write(out: Path, written: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=100)
    write_atomically(out, (HEADER + text).encode())


def _seen(bench: Bench, entry: Entry, legacy: Path | None, known: Any) -> dict[str, Any]:
    seen = bench.runs(entry, Path(sys.executable), legacy=False)
    older = any(attempt.legacy for attempt in entry.attempts)
    if older and legacy is not None:
        seen["legacy"] = bench.runs(entry, legacy, legacy=True)
    elif older:
        seen["legacy"] = known
    return seen


def _versions(python: Path, seconds: float) -> dict[str, str]:
    ended = run_job(Job("", "interpreter"), python, seconds)
    if "found" not in ended:
        raise ConfigError(f"{python} runs no program: {ended['message']}; it must be a Python")
    return {"python": ended["found"]["version"], **ended["versions"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake of the user's is one sentence and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.listings",
        description="Run every code listing of the documents in a scratch folder without network "
        "and write what happened.",
    )
    parser.add_argument("folder", metavar="DOCUMENTS_FOLDER", type=Path)
    parser.add_argument(
        "--only",
        metavar="ID",
        action="append",
        default=[],
        help="run this listing, as 000-7 (may be given again), and keep the others' outcomes",
    )
    parser.add_argument(
        "--texts",
        action="store_true",
        help="run nothing; write the texts of harness/listings.yaml anew into the outcomes",
    )
    parser.add_argument(
        "--python",
        metavar="INTERPRETER",
        type=Path,
        help="of an environment with the archived libraries, as .venv-legacy/bin/python (make "
        "legacy-env); without it their outcomes are kept",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, default=OUTCOMES)
    parser.add_argument(
        "--time-limit", metavar="SECONDS", type=float, default=TIME_LIMIT_SECONDS, dest="seconds"
    )
    given = parser.parse_args(arguments)
    try:
        if given.texts:
            write_texts(given.folder, given.out)
        else:
            run_listings(given.folder, given.only, given.python, given.out, given.seconds)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
