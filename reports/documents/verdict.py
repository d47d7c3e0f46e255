"""What the documents claim, each with a verdict: `documents.yaml` against arithmetic and rows.

Arithmetic goes first, since no run can save a figure that cannot add up; then what the report's
rows say; a fact that neither settles stands as not measured, with what it needs and the command.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.record import Record
from reports.blocks import Block, Field, Grid, Head
from reports.documents.audit import ABOUT, subjects
from reports.documents.claims import ARITHMETIC
from reports.documents.evidence import (
    FAILS,
    HOLDS,
    OF_DEMONSTRATION,
    PARTLY,
    UNDECIDED,
    Evidence,
    Verdict,
)
from reports.documents.fact_rows import COMPUTED, NOT_HERE, Answer, Figure, Rows, answer, told
from reports.documents.facts import Documents, Fact, Published, Table, documents
from reports.documents.printed import PRINTED
from reports.documents.sums import CONTRADICTED, REMARK, RULES
from reports.rows import Group


@dataclass(frozen=True)
class Checked:
    """A fact with its verdict and everything that is told beside it.

    Attributes:
        figures: of the report's rows, deciding or not.
        elsewhere: what the documents say of the same quantity in other places.
        subject_here: whether the report has rows about the fact's subject.
    """

    fact: Fact
    verdict: str
    why: str
    figures: tuple[Figure, ...]
    elsewhere: tuple[Fact, ...]
    published: tuple[Published, ...]
    subject_here: bool

    @property
    def open(self) -> bool:
        """Whether nothing was found out, so that the command is what helps."""
        return self.verdict == NOT_HERE


@dataclass(frozen=True)
class Audited:
    """A table of a document with its facts checked."""

    table: Table
    facts: tuple[Checked, ...]

    @property
    def counted(self) -> str:
        """How many facts have each verdict, the most frequent first."""
        return _counted(self.facts)


@dataclass(frozen=True)
class Audit:
    """All tables of the documents; `titles` by the document's name."""

    titles: Mapping[str, str]
    tables: tuple[Audited, ...]

    @property
    def facts(self) -> tuple[Checked, ...]:
        """Every fact, in the order of the tables."""
        return tuple(checked for table in self.tables for checked in table.facts)

    @property
    def counts(self) -> dict[str, int]:
        """How many facts have each verdict, the most frequent first."""
        return _counts(self.facts)

    @property
    def counted(self) -> str:
        """The same in words."""
        return _counted(self.facts)


def _counts(facts: Sequence[Checked]) -> dict[str, int]:
    return dict(Counter(checked.verdict for checked in facts).most_common())


def _counted(facts: Sequence[Checked]) -> str:
    return ", ".join(f"{count} {name}" for name, count in _counts(facts).items())


def audit(
    groups: Sequence[Group], records: Sequence[Record], found_in: Documents | None = None
) -> Audit:
    """Return every fact of `found_in` (None: the project's documents) with its verdict."""
    found_in = found_in or documents()
    evidence = Evidence(tuple(groups), tuple(records))
    here, measured = subjects(evidence), Rows(evidence)
    same: dict[str, list[Fact]] = defaultdict(list)
    for fact in found_in.facts:
        if fact.quantity is not None:
            same[fact.quantity].append(fact)

    def checked(fact: Fact) -> Checked:
        rows = answer(fact, measured)
        said = verdict(fact, evidence, rows)
        return Checked(
            fact=fact,
            verdict=said.verdict,
            why=said.why,
            figures=rows.figures,
            elsewhere=tuple(o for o in same.get(fact.quantity or "", ()) if o is not fact),
            published=found_in.published.get(fact.quantity or "", ()),
            subject_here=fact.subject in here,
        )

    return Audit(
        found_in.titles,
        tuple(Audited(t, tuple(checked(fact) for fact in t.facts)) for t in found_in.tables),
    )


def verdict(fact: Fact, evidence: Evidence, rows: Answer | None = None) -> Verdict:
    """Return the verdict on `fact`: by arithmetic, by the report's rows, or that there is none.

    `rows` are what `reports.fact_rows` says of it, None: that is asked here.
    """
    rows = answer(fact, Rows(evidence)) if rows is None else rows
    sums = _sums(fact)
    said = [*sums]
    if (found := _about(fact, evidence)) is not None:
        said.append(found)
    if rows.verdict is not None:
        said.append(rows.verdict)
    why = " ".join(one.why for one in said)
    decided = [one.verdict for one in said if one.verdict != REMARK]
    if not decided:
        beside = _beside(fact, rows)
        return Verdict(NOT_HERE, " ".join(part for part in (why, _needs(fact), beside) if part))
    # A contradiction or, failing that, what was measured gives the verdict; both are told.
    return Verdict(CONTRADICTED if CONTRADICTED in decided else decided[-1], why)


def _about(fact: Fact, evidence: Evidence) -> Verdict | None:
    """Return what was written for the claim says of the rows, real models going first."""
    if fact.id not in ABOUT:
        return None
    found = ABOUT[fact.id](evidence.real)
    if found is not None:
        return found
    found = ABOUT[fact.id](evidence)
    if found is None or found.verdict not in (HOLDS, PARTLY, FAILS):
        return found
    return Verdict(UNDECIDED, f"{found.why} {OF_DEMONSTRATION}")


def _sums(fact: Fact) -> list[Verdict]:
    """Return what arithmetic says: what was written for the fact, else what holds for its kind."""
    if fact.id in ARITHMETIC:
        return [ARITHMETIC[fact.id]()]
    if fact.id in PRINTED:
        return [PRINTED[fact.id](fact)]
    found = (rule(fact) for rule in RULES)
    return [first] if (first := next((one for one in found if one), None)) else []


def _needs(fact: Fact) -> str:
    """Return what would measure the fact."""
    if fact.needs:
        return f"Needs {fact.needs}."
    on = f" on {fact.hardware}" if fact.hardware not in (None, "CPU") else ""
    if fact.model or on:
        return f"Needs {fact.model or 'a model'}{on}."
    return "No row of this report is about it."


def _beside(fact: Fact, rows: Answer) -> str:
    """Return the figures that decide nothing, and why they do not."""
    if not rows.figures:
        return ""
    doubts = list(dict.fromkeys(figure.doubt for figure in rows.figures if figure.doubt))
    why = "; ".join(doubts) or "of another model"
    if fact.value is None:
        why = "the document gives no figure"
    elif fact.ours is not None and rows.figures[0].row.model != fact.ours.where.get("model"):
        why = "of another model"
    return f"Here, deciding nothing ({why}): {told(fact, rows.figures)}."


def documents_blocks(found: Audit) -> list[Block]:
    """Return the block of the claims that the report has something about, none without any."""
    shown = tuple(one for one in found.facts if one.subject_here)
    lines = tuple(
        (
            Field(one.fact.text),
            Field(f"{one.fact.document}, {one.fact.section}"),
            Field(one.fact.original, language="zh"),
            Field(one.verdict),
            Field(f"{one.why} Measured by: {one.fact.command}" if one.open else one.why),
        )
        for one in shown
    )
    if not lines:
        return []
    used = {line[1].text.partition(",")[0] for line in lines}
    heads = (Head("Claim"), Head("Where"), Head("As printed"), Head("Verdict"), Head("Why"))
    grid = Grid("Claims", heads, lines)
    named = "; ".join(f"{name}: {title}" for name, title in found.titles.items() if name in used)
    return [
        Block(
            "What the documents claim",
            (f"Of {len(lines)} claims about what this report measured: {_counted(shown)}.",),
            (),
            (grid,),
            f"Documents: {named}. Only claims that this report has rows about are listed. That a "
            "claim holds or not is said of these rows: other models may differ.",
        )
    ]


MEANINGS: Mapping[str, tuple[str, str]] = {
    "reproduced": (
        "✓",
        "the figure of a row of the same model by the same protocol is the printed one: within "
        "1 % for sizes and perplexity, within 10 % for speed, which also needs the same card; a "
        f"size may be {COMPUTED}",
    ),
    "differs": ("≠", "the same model and protocol, and another figure"),
    CONTRADICTED: ("✗", "the figure cannot be right; the sum is written out"),
    "adds up": (
        "=",
        "the figure follows from the document's own figures or from formats; nothing was run",
    ),
    "holds here": (
        "✓",
        "a claim that names no model, or a comparison, is true of every row named",
    ),
    "holds in part here": ("≈", "true of some of the rows named"),
    "does not hold here": ("✗", "untrue of the rows named; other models may differ"),
    "found here": ("✓", "the rows or records named are what the claim is about"),
    "cannot be decided here": ("?", "there are rows about it, but they do not settle it"),
    NOT_HERE: (
        "○",
        "no row of this report is of that model, protocol or card; what it needs and the command "
        "stand beside it, and figures of other models where there are any",
    ),
}
"""Verdict -> its sign, and what it means."""
