"""What `python -m reports diff` says: sentences and tables for the terminal and for pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from reports import words
from reports.blocks import Block, Field, Grid, Head
from reports.diff.facts import Fact, key_sentences, load_sentence, one_sided, other_machine
from reports.diff.figures import MEMORY_NOISE, Change, Figures
from reports.diff.match import Matching, Pair
from reports.rows import Row

SHOWN, OTHERS = "Main figures, and what changed", "All other figures"
MOST_LINES = 40
"""Lines of one kind above which those that say nothing are only counted."""

MOST_NAMED = 6
"""Figures that a sentence names."""

ORDER = (
    *("identical", "same answers", "same", "equivalent", "not distinguishable"),
    *("better", "smaller", "differs", "larger", "worse"),
)

MAIN = frozenset(
    {
        *("kl_mean", "top1_agreement", "equal_tokens", "acc_norm", "exact_match_strict"),
        *("embedding_cosine", "masked_perplexity", "latency_seconds", "sequences_per_second"),
        *("decode_tokens_per_second", "prefill_tokens_per_second"),
        *("decode_speedup", "prefill_speedup"),
    }
)
"""Metrics that are shown wherever they changed, beside those without an underscore."""

SIZE_LEGEND = (
    "Sizes on disk are counted, so every byte is a change. Peaks of memory move from run to run: "
    f"only more than {100 * MEMORY_NOISE:g} % on one machine counts as worse."
)
QUALITY_LEGEND = (
    "B minus A on the same windows, prompts or questions, with its 95 % interval: relative for a "
    "perplexity, in points for a share. p: that nothing changed, corrected over the cells of one "
    "figure (Holm). Worse, better: p below 5 %. Equivalent: the change is below 3 %, tested. Not "
    "distinguishable: these samples cannot tell, which is no proof of equality. Identical: every "
    "sample is the same number. Same answers: no question was answered otherwise. Differs: a "
    "divergence or an agreement that was perfect in A moved. Divergences and agreements are each "
    "against the unquantized model of their own set."
)
SPEED_LEGEND = (
    "Spread: the interquartile range of each record's timings over their median. Within noise: the "
    "ratio is no further from 1 than both spreads together. Spreads are those inside one run: two "
    "runs at different hours may differ by more, so repeat what is beyond noise before it is "
    "called a change. A speed-up is against the baseline timed in turns in the same process, which "
    "load disturbs less."
)


@dataclass(frozen=True)
class Side:
    """One set of records: its folder as given, how many, and those that cannot be read."""

    name: str
    records: int
    others: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """Everything that was found between two sets of records.

    `tolerance` is the relative loss up to which nothing counts as worse; `speed` has a speed that
    is worse beyond noise count.
    """

    first: Side
    second: Side
    matching: Matching
    facts: tuple[Fact, ...]
    figures: Figures
    tolerance: float
    speed: bool

    @property
    def worse(self) -> list[Change]:
        """The figures that count as worse."""
        return [
            change
            for change in self.figures.changes
            if change.worse
            and (change.kind != "timed" or self.speed)
            and (change.kind == "timed" or change.loss is None or change.loss > self.tolerance)
        ]

    @property
    def broken(self) -> list[Pair]:
        """The cells that were measured in A and failed, or failed in part, in B."""
        rank = ("ok", "partial", "failed")
        return [
            pair
            for pair in self.matching.pairs
            if rank.index(pair.second.status) > rank.index(pair.first.status)
        ]


def blocks(found: Difference) -> list[Block]:
    """Return everything there is to say, the answer first."""
    made = [_answer(found), _around(found), _quality(found), _sizes(found), _speed(found)]
    made.append(_plain(found))
    return [*(one for one in made if one is not None), *_rest(found)]


def _answer(found: Difference) -> Block:
    matching = found.matching
    sentences = [
        f"A: {_side(found.first)}. B: {_side(found.second)}.",
        f"{words.count(len(matching.pairs), 'cell')} matched, {len(matching.only_first)} in A "
        f"alone, {len(matching.only_second)} in B alone, {len(matching.ambiguous)} ambiguous.",
    ]
    for pair in found.broken:
        why = "; ".join(f"{e.stage}: {e.message}" for e in pair.second.errors)
        sentences.append(
            f"Worse: {pair.name} is {pair.first.status} in A and {pair.second.status} in B ({why})."
        )
    for kind, title in (("tested", "Quality"), ("counted", "Sizes and memory")):
        changes = [change for change in found.figures.changes if change.kind == kind]
        if changes:
            sentences.append(f"{title}: {words.count(len(changes), 'figure')}, {_counts(changes)}.")
    sentences += _speed_answer(found)
    worse = [change for change in found.worse if change.kind != "timed" or found.speed]
    if worse:
        names = [_named(change) for change in worse[:MOST_NAMED]]
        more = f" and {len(worse) - MOST_NAMED} more" if len(worse) > MOST_NAMED else ""
        sentences.append(f"Worse in B: {'; '.join(names)}{more}.")
        if not found.tolerance:
            sentences.append("However small: --tolerance 1% lets losses of up to 1 % pass.")
    elif not found.broken:
        beyond = "" if not found.tolerance else f" by more than {100 * found.tolerance:g} %"
        slower = any(change.worse and change.kind == "timed" for change in found.figures.changes)
        speed = "; speed does not count without --speed" if slower else ""
        sentences.append(f"Nothing is worse in B{beyond}, of what could be compared{speed}.")
    return Block("What changed from A to B", tuple(sentences))


def _speed_answer(found: Difference) -> list[str]:
    timed = [change for change in found.figures.changes if change.kind == "timed"]
    if not timed:
        return []
    differing = [text for pair in found.matching.pairs for text in other_machine(pair).values()]
    machines = list(dict.fromkeys(differing))
    said = []
    if machines:
        said.append(
            f"Speed: the machines differ ({'; '.join(machines)}), so no difference of speed or "
            "memory below is the software's alone."
        )
    judged = [one for one in timed if one.verdict.endswith(("noise", "busy machine"))]
    if judged:
        said.append(f"Speed on one machine: {_counts(judged)}.")
    return said


def _counts(changes: Iterable[Change]) -> str:
    counted = Counter(change.verdict for change in changes)
    names = [*(name for name in ORDER if counted[name]), *sorted(counted.keys() - {*ORDER})]
    return ", ".join(f"{counted[name]} {name}" for name in names)


def _named(change: Change) -> str:
    beside = change.beside if change.kind == "counted" else ""
    difference = f"{change.difference} ({beside})" if beside else change.difference
    return f"{change.pair.name}, {change.metric} ({change.protocol}) {difference}"


def _side(side: Side) -> str:
    others = f", {words.count(side.others, 'record')} of other jobs not compared" * bool(
        side.others
    )
    unreadable = f", {len(side.problems)} unreadable" * bool(side.problems)
    return f"{side.name}, {words.count(side.records, 'cell')}{others}{unreadable}"


def _around(found: Difference) -> Block | None:
    pairs = found.matching.pairs
    if not pairs:
        return None
    lines = tuple(
        (
            Field(f"{fact.kind}: {fact.name}"),
            Field(fact.first),
            Field(fact.second),
            Field(str(fact.pairs), float(fact.pairs)),
        )
        for fact in found.facts
    )
    heads = (Head("what"), Head("A"), Head("B"), Head("cells", numeric=True))
    sentences = [*key_sentences(pairs), *one_sided(pairs), *filter(None, [load_sentence(pairs)])]
    if not lines:
        sentences.insert(0, "Machine, library versions, model, texts and options are the same.")
    return Block(
        "What differs around the figures",
        tuple(sentences),
        grids=(Grid("Facts that differ", heads, lines),) if lines else (),
    )


def _quality(found: Difference) -> Block | None:
    changes = [change for change in found.figures.changes if change.kind == "tested"]
    heads = (
        *(Head("figure"), Head("cell"), Head("samples"), Head("A", numeric=True)),
        *(Head("B", numeric=True), Head("B minus A", numeric=True), Head("95 % interval")),
        *(Head("p"), Head("lost, gained"), Head("verdict")),
    )

    def shown(change: Change) -> bool:
        moved = change.verdict in ("better", "worse")
        return not change.same and (moved or change.metric in MAIN or "_" not in change.metric)

    return _block("Quality, on the same samples", heads, changes, shown, QUALITY_LEGEND)


def _sizes(found: Difference) -> Block | None:
    changes = [change for change in found.figures.changes if change.kind == "counted"]
    heads = (
        *(Head("figure"), Head("cell"), Head("A", numeric=True), Head("B", numeric=True)),
        *(Head("B minus A", numeric=True), Head("share", numeric=True), Head("verdict")),
    )
    return _block("Sizes and memory", heads, changes, lambda one: not one.same, SIZE_LEGEND)


def _speed(found: Difference) -> Block | None:
    changes = [change for change in found.figures.changes if change.kind == "timed"]
    heads = (
        *(Head("figure"), Head("cell"), Head("A", numeric=True), Head("B", numeric=True)),
        *(Head("B over A", numeric=True), Head("spread in A and B"), Head("verdict")),
    )
    main = [one for one in changes if one.metric in MAIN]

    def shown(change: Change) -> bool:
        return change in main and (len(main) <= MOST_LINES or change.verdict != "within noise")

    return _block("Speed and times", heads, changes, shown, SPEED_LEGEND)


def _plain(found: Difference) -> Block | None:
    changes = [one for one in found.figures.changes if one.kind == "plain" and not one.same]
    heads = (
        *(Head("figure"), Head("cell"), Head("A", numeric=True), Head("B", numeric=True)),
        Head("change", numeric=True),
    )
    legend = "No samples stand behind these, so that nothing says what of a change is chance."
    return _block("Figures without samples", heads, changes, lambda _: False, legend)


def _block(
    title: str,
    heads: tuple[Head, ...],
    changes: Sequence[Change],
    shown: Callable[[Change], bool],
    legend: str,
) -> Block | None:
    """Return a table of the changes that matter most, and a folded one of all others."""
    if not changes:
        return None
    rest = [one for one in changes if not shown(one)]
    same = [one for one in rest if one.same]
    left_out = len(same) > MOST_LINES
    if left_out:
        rest = [one for one in rest if not one.same]
    parts = ([one for one in changes if shown(one)], rest)
    grids = tuple(
        Grid(name, heads, tuple(_line(one) for one in part), folded=name == OTHERS)
        for name, part in zip((SHOWN, OTHERS), parts, strict=True)
        if part
    )
    moved = sum(not one.same for one in changes)
    said = []
    if not parts[0]:
        said.append(f"{words.count(moved, 'figure')} changed." if moved else "Nothing changed.")
    if left_out:
        said.append(f"{len(same):,} figures that are the same are not listed.")
    return Block(title, tuple(said), (), grids, legend if moved else "")


def _line(change: Change) -> tuple[Field, ...]:
    format_ = words.column_format(change.metric, [change.first, change.second])
    ends = [
        Field(f"{format_.write(value)} {format_.unit}".rstrip(), value)
        for value in (change.first, change.second)
    ]
    figure = Field(f"{change.metric}, {change.protocol}")
    cell = Field(change.pair.name)
    if change.kind == "tested":
        flips = f"{change.lost}, {change.gained}" if change.lost else words.UNKNOWN
        beside = (Field(change.beside), Field(change.p), Field(flips))
        return (
            *(figure, cell, Field(change.samples), *ends, Field(change.difference), *beside),
            Field(change.verdict),
        )
    if change.kind == "plain":
        return figure, cell, *ends, Field(change.difference)
    said = Field(change.beside), Field(change.verdict)
    return figure, cell, *ends, Field(change.difference), *said


def _rest(found: Difference) -> list[Block]:
    """Return what was not compared: figures, cells, records."""
    made = []
    uncompared = found.figures.uncompared
    if uncompared:
        lines = tuple(
            (Field(one.metric), Field(one.why), Field(", ".join(one.names))) for one in uncompared
        )
        heads = (Head("figure"), Head("why"), Head("cells"))
        made.append(Block("Not compared", grids=(Grid("Not compared", heads, lines),)))
    matching = found.matching
    for name, rows in (("A", matching.only_first), ("B", matching.only_second)):
        if rows:
            heads = (Head("cell"), Head("status"), Head("command"))
            grid = Grid(f"In {name} alone", heads, tuple(_alone(row) for row in rows))
            made.append(Block(f"In {name} alone", grids=(grid,)))
    if matching.ambiguous:
        made.append(
            Block(
                "Ambiguous",
                tuple(
                    f"A: {_cells(one.first)}; B: {_cells(one.second)}" for one in matching.ambiguous
                ),
                legend="Each line names cells that were asked the same, so that none can be told "
                "to be the other's. Move all but one of each set out of its folder.",
            )
        )
    problems = [f"{side.name}: {p}" for side in (found.first, found.second) for p in side.problems]
    if problems:
        made.append(Block("Unreadable records", tuple(problems)))
    return made


def _alone(row: Row) -> tuple[Field, ...]:
    return Field(f"{row.label} ({row.group_title})"), Field(row.status), Field(row.command)


def _cells(rows: Sequence[Row]) -> str:
    return ", ".join(
        f"{row.record.cell} ({row.record.started or 'start not recorded'})" for row in rows
    )
