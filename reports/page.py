"""The content of a report, gathered from records; Markdown and HTML lay out the same content."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness.record import Failure, Record
from reports import protocols, sections, words
from reports.blocks import Block, named
from reports.documents.verdict import Audit, audit, documents_blocks
from reports.engines import EngineTable, engine_tables, engine_warnings
from reports.evidence import Evidence, evidence, legend
from reports.extra import group_blocks, job_blocks
from reports.findings import Finding, findings, warnings
from reports.gather import make_groups, make_rows
from reports.jobs import job_rows
from reports.pareto import Plane, plane
from reports.parts import Parts, parts
from reports.rows import Group, Row, family, kernels
from reports.sections import Coverage, KernelLine, Machine, Prompt, Said
from reports.summary import Table, detail_table, summary_table
from reports.tasks import hierarchy

FIGURES = ("artefact_bytes", "peak_memory_bytes", "decode_tokens_per_second")
"""What quality is drawn against."""

MOST_DETAILED = 300
"""Rows of a group above which only its summary lists them all: the other tables would make a page
of tens of megabytes, and the same figures stand on the pages of the cells and in the data files."""

LEFT_TO_SCRIPT, MANY_ROWS = frozenset({"peak_memory_bytes"}), 60
"""Figures that only the page's own chart draws in groups of many rows: each weighs by its rows."""

QUALITY_FIRST = (
    *("perplexity", "kl_mean", "kl_median", "kl_p90", "kl_p99", "kl_noise_floor"),
    *("top1_agreement", "delta_p_mean", "mean_absolute_logit_difference", "nonfinite_logits"),
    *("equal_tokens", "first_difference"),
    *("embedding_cosine", "embedding_cosine_worst", "similarity_rank_agreement"),
    *("nearest_neighbour_agreement", "masked_perplexity", "masked_kl", "masked_top1_agreement"),
)
SPEED_FIRST = (
    *("prefill_tokens_per_second", "prefill_speedup", "ttft_seconds"),
    *("decode_tokens_per_second", "decode_speedup", "tpot_seconds", "timing_spread"),
    *("achieved_bytes_per_second", "copy_bytes_per_second"),
    *("prefill_joules_per_token", "prefill_above_idle_joules_per_token"),
    *("latency_seconds", "latency_speedup", "sequences_per_second"),
    *("decode_joules_per_token", "decode_above_idle_joules_per_token", "idle_watts"),
)
COST_FIRST = (
    *("artefact_bytes", "quantized_bytes", "head_bytes", "embedding_bytes", "other_bytes"),
    *("bits_per_weight", "computed_bytes", "computed_bits_per_weight", "peak_memory_bytes"),
    *("kv_cache_bytes", "quantize_seconds", "quantize_peak_bytes", "load_seconds"),
    *("first_logits_seconds", "read_bytes_per_token"),
)

DETAILS: tuple[tuple[str, set[str], tuple[str, ...]], ...] = (
    ("Tasks", {"tasks"}, ()),
    ("Quality", {"perplexity", "divergence", "generation", "embedding", "masked"}, QUALITY_FIRST),
    ("Speed", {"speed", "energy", "latency"}, SPEED_FIRST),
    ("Serving", {"serving"}, ()),
    ("Size, memory and preparation", {"size", "memory", "quantize", "load"}, COST_FIRST),
)
"""Tables below the summary: title, families of figures, and which metrics stand first."""


@dataclass(frozen=True)
class Detail:
    """A table below the summary, with its heading."""

    title: str
    table: Table


@dataclass(frozen=True)
class FigureSpec:
    """A figure of a group: what to draw, and the name its files and ids start with."""

    plane: Plane
    name: str


@dataclass(frozen=True)
class Section:
    """Everything shown of one group; not `detailed`, it lists its rows in the summary alone."""

    group: Group
    slug: str
    table: Table
    evidence: tuple[Evidence, ...]
    evidence_legend: tuple[str, ...]
    repeated: bool
    detailed: bool
    failed: tuple[Row, ...]
    figures: tuple[FigureSpec, ...]
    findings: tuple[Finding, ...]
    rules: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    engines: tuple[EngineTable, ...]
    blocks: tuple[Block, ...]
    details: tuple[Detail, ...]
    parts: tuple[Parts, ...]
    prompts: tuple[Prompt, ...]
    kernels: tuple[KernelLine, ...]
    coverages: tuple[Coverage, ...]
    missing: tuple[Said, ...]
    notes: tuple[Said, ...]
    calibrations: tuple[Said, ...]
    models: tuple[Said, ...]


@dataclass(frozen=True)
class Trouble:
    """A row that failed, or whose measures did in part."""

    row: Row
    errors: tuple[Failure, ...]


@dataclass(frozen=True)
class Page:
    """The whole report.

    `cells` are the rows of single records, repetitions apart; `others` stand for the records of
    other jobs, which are no rows, and `blocks` show what those hold. `claims` are the documents'
    that the report has rows about, `audit` is all that they print.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    banners: tuple[str, ...]
    sections: tuple[Section, ...]
    blocks: tuple[Block, ...]
    claims: tuple[Block, ...]
    audit: Audit
    troubles: tuple[Trouble, ...]
    problems: tuple[str, ...]
    machines: tuple[Machine, ...]
    rows: tuple[Row, ...]
    cells: tuple[Row, ...]
    others: tuple[Row, ...]
    groups: tuple[Group, ...]
    anchors: Mapping[str, str]
    protocols: tuple[tuple[str, str, str], ...]


def make_page(
    records: Sequence[Record], problems: Sequence[str] = (), repeat: str | None = None
) -> Page:
    """Return the report of `records`; `problems` name the records that could not be read.

    `repeat` says what makes repetitions, as in `reports.gather.make_rows`.
    """
    rows = make_rows(records, repeat)
    cells = [cell for row in rows for cell in row.cells]
    groups = make_groups(rows)
    others = job_rows(records)
    taken: set[str] = set()
    machines = sections.machines([*cells, *others])
    shown = tuple(_section(group, taken) for group in groups)
    labels = {cell.record.cell: cell.label for cell in cells}
    audited = audit(groups, records)
    return Page(
        title=f"Quantization compared: {_models([*groups, *others])}",
        facts=_facts([*cells, *others], problems),
        banners=tuple(_banners(groups, machines)),
        sections=shown,
        blocks=named(job_blocks(records, labels), _slug("jobs", taken)),
        claims=tuple(documents_blocks(audited)),
        audit=audited,
        troubles=tuple(
            Trouble(cell, cell.record.errors)
            for cell in [*cells, *others]
            if cell.record.status != "ok"
        ),
        problems=tuple(problems),
        machines=tuple(machines),
        rows=tuple(rows),
        cells=tuple(cells),
        others=tuple(others),
        groups=tuple(groups),
        anchors={row.record.cell: f"row-{index}" for index, row in enumerate(rows)},
        protocols=tuple(_protocols(rows)),
    )


def _section(group: Group, taken: set[str]) -> Section:
    slug = _slug(group.title, taken)
    figures = []
    for metric in FIGURES:
        if metric in LEFT_TO_SCRIPT and len(group.rows) > MANY_ROWS:
            continue
        drawn = plane(group, metric)
        if drawn is not None:
            figures.append(
                FigureSpec(drawn, f"{drawn.quality.split('_')[0]}-{metric.split('_')[0]}-{slug}")
            )
    detailed = len(group.rows) <= MOST_DETAILED
    answers = tuple(findings(group))
    return Section(
        group=group,
        slug=slug,
        table=summary_table(group),
        evidence=tuple(evidence(group, detailed)),
        evidence_legend=legend(group),
        repeated=any(row.repetitions for row in group.measured),
        detailed=detailed,
        failed=tuple(row for row in group.rows if not row.measured),
        figures=tuple(figures),
        findings=answers,
        rules=tuple(rules(answers)),
        warnings=tuple(warnings(group)),
        engines=tuple(engine_tables(group)),
        blocks=named(group_blocks(group), slug),
        details=tuple(_details(group)) if detailed else (),
        parts=tuple(parts(group)) if detailed else (),
        prompts=tuple(sections.prompts(group)),
        kernels=tuple(sections.kernel_lines(group)),
        coverages=tuple(sections.coverages(group)),
        missing=tuple(sections.missing(group)),
        notes=tuple(sections.notes(group)),
        calibrations=tuple(sections.calibrations(group)),
        models=tuple(sections.models(group)),
    )


def _details(group: Group) -> Iterator[Detail]:
    known = {name for _, families, _ in DETAILS for name in families}
    found = {family(value) for row in group.rows for value in row.values.values()}
    for title, families, first in (*DETAILS, ("Other figures", found - known, ())):
        shown = detail_table(group, families, first)
        if shown.columns:
            yield Detail(title, shown)


def rules(found: Iterable[Finding]) -> list[tuple[str, str]]:
    """Return (questions, rule) of `found`, each rule once."""
    questions: dict[str, list[str]] = {}
    for finding in found:
        questions.setdefault(finding.rule, []).append(finding.question)
    return [("; ".join(asked), rule) for rule, asked in questions.items()]


def main_kernel(row: Row) -> str:
    """Return the kernel that runs most of the row's weights, and how many others there are.

    What stands in brackets behind a kernel's name is left to the table of kernels.
    """
    whole = dict.fromkeys(str(entry.get("kernel", "")) for entry in kernels(row))
    names = list(dict.fromkeys(name.partition(" (")[0] for name in whole))
    if not names:
        return ""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _models(found: Sequence[Group | Row]) -> str:
    names = list(dict.fromkeys(one.model for one in found))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _facts(rows: Sequence[Row], problems: Sequence[str]) -> tuple[tuple[str, str], ...]:
    states = [row.record.status for row in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("ok", "partial", "failed") if s in states)
    if problems:
        counts += f", {len(problems)} unreadable"
    started = sorted(row.record.started for row in rows if row.record.started)
    facts = [
        ("Cells", f"{len(rows) + len(problems)} ({counts})"),
        ("Models", _distinct(row.model for row in rows)),
        ("Methods", _distinct(row.method for row in rows)),
        ("Hardware", _distinct(row.hardware for row in rows)),
        ("Suite", _distinct(row.suite for row in rows)),
        ("Text", _distinct(str(row.record.config.get("data") or "") for row in rows)),
    ]
    if started:
        span = started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"
        facts.append(("Measured", span))
    return tuple((name, text) for name, text in facts if text)


def _distinct(names: Iterable[str]) -> str:
    return ", ".join(name for name in dict.fromkeys(names) if name)


def _banners(groups: Sequence[Group], machines: Sequence[Machine]) -> list[str]:
    banners = [sentence for group in groups for sentence in engine_warnings(group)]
    if any(sections.is_embedded(group) for group in groups):
        banners.append(
            "The model named embedded is the project's embedded demonstration model: a few million "
            "parameters, trained by the project itself on text that it generates. Its figures "
            "show what the tool does and say nothing of real language models."
        )
    drawn = list(dict.fromkeys(g.model for g in groups if any(r.random_weights for r in g.rows)))
    if drawn:
        banners.append(
            f"The weights of {', '.join(drawn)} are random: speed, size and memory are measured, "
            "quality is not and would mean nothing."
        )
    if len(machines) > 1:
        what = (
            "library versions or settings"
            if sections.same_machine(machines)
            else "machines: compare speed and memory only between rows of one machine"
        )
        banners.append(f"Rows come from different {what} (see Environment).")
    return banners


def _protocols(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return (protocol, its metrics, one sentence) for every protocol among the rows.

    Those of the parts of a group of tasks say what the group's own says.
    """
    tasks = hierarchy(rows)
    metrics: dict[str, dict[str, None]] = {}
    for row in rows:
        for metric, protocol in row.values:
            if protocol and not tasks.is_part(protocols.task_of(protocol)):
                metrics.setdefault(protocol, {})[metric] = None
    return [
        (protocol, ", ".join(sorted(metrics[protocol])), protocols.protocol_sentence(protocol))
        for protocol in sorted(metrics, key=words.natural)
    ]


def _slug(text: str, taken: set[str]) -> str:
    """Return `text` as a part of a file name and of an id, unlike every other."""
    plain = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60] or "group"
    slug, number = plain, 2
    while slug in taken:
        slug, number = f"{plain}-{number}", number + 1
    taken.add(slug)
    return slug
