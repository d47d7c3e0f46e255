"""What pruning and distillation removed, and what of that the stored bytes show.

From `details["method"]["pruning"]` and `["distillation"]` of rows. A zero is free only where the
storage leaves it out: a bitmap costs one bit a weight, whether it is zero or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.record import Value
from reports import words
from reports.blocks import Block, Field, Grid, Head, plain, share
from reports.rows import Group, Row, mapping, sequence
from reports.rows import number as figure


def pruning_of(row: Row) -> Mapping[str, Any]:
    """Return what `row` says of its pruning, empty where nothing was pruned."""
    return mapping(mapping(row.record.details.get("method")).get("pruning"))


def distillation_of(row: Row) -> Mapping[str, Any]:
    """Return what `row` says of its distillation, empty where it is no student."""
    return mapping(mapping(row.record.details.get("method")).get("distillation"))


def compression_blocks(group: Group) -> list[Block]:
    """Return the blocks of the group's pruned and distilled rows."""
    pruned = [row for row in group.measured if pruning_of(row)]
    students = [row for row in group.measured if distillation_of(row)]
    found = []
    if pruned:
        found.append(
            Block(
                "Pruned, then quantized",
                tuple(_said(row) for row in pruned),
                (),
                (_pruned(group, pruned),),
                "Zeros: of the weights of the pruned matrices. Stored with a bitmap: one bit for "
                "each weight says whether it is zero, and only the others are kept. × FP32: 32 "
                "bits over the bits a weight, in these matrices alone.",
            )
        )
    if students:
        found.append(
            Block(
                "Distilled, then quantized",
                (),
                (),
                (_distilled(group, students),),
                "Loss: of the student against the teacher's predictions, before and after "
                "training. KL is from the unquantized teacher, as everywhere.",
            )
        )
    return found


def _said(row: Row) -> str:
    facts = pruning_of(row)
    dense, kept = figure(facts.get("bits_per_weight_dense")), figure(facts.get("bits_per_weight"))
    zeros = figure(facts.get("zeros"))
    if dense is None or kept is None or zeros is None:
        return f"{row.label}: the record does not say what its zeros cost."
    start = f"{row.label}: {100 * zeros:.1f} % zeros"
    if facts.get("stored") == "bitmap":
        change = "saves" if kept < dense else "costs"
        return (
            f"{start}; the bitmap takes {kept:.2f} bits a weight where dense storage takes "
            f"{dense:.2f}: it {change} {100 * abs(1 - kept / dense):.1f} %."
        )
    return f"{start}, stored like any other value ({kept:.2f} bits a weight): they save nothing."


def _pruned(group: Group, rows: Sequence[Row]) -> Grid:
    heads = (
        *(Head("Row"), Head("Pattern"), Head("Amount", numeric=True), Head("Zeros", numeric=True)),
        *(Head("Stored"), Head("Bits a weight, dense", numeric=True)),
        *(Head("Bits a weight, as stored", numeric=True), Head("× FP32", numeric=True)),
        *_quality_heads(),
    )
    lines = []
    for row in rows:
        facts = pruning_of(row)
        bits = figure(facts.get("bits_per_weight"))
        lines.append(
            (
                Field(row.label),
                Field(str(facts.get("pattern") or words.UNKNOWN)),
                share(figure(facts.get("amount"))),
                share(figure(facts.get("zeros"))),
                Field(str(facts.get("stored") or words.UNKNOWN)),
                plain(figure(facts.get("bits_per_weight_dense"))),
                plain(bits),
                Field(f"{32 / bits:.2f}", 32 / bits) if bits else Field(words.UNKNOWN),
                *_quality(group, row),
            )
        )
    return Grid("Zeros and bytes", heads, tuple(lines))


def _distilled(group: Group, rows: Sequence[Row]) -> Grid:
    heads = (
        *(Head("Row"), Head("Teacher", "parameters", True), Head("Student", "parameters", True)),
        *(Head("Layers kept"), Head("Loss before", "nats", True), Head("after", "nats", True)),
        *_quality_heads(),
    )
    lines = []
    for row in rows:
        facts = distillation_of(row)
        teacher, student = (
            figure(facts.get(f"{name}_parameters")) for name in ("teacher", "student")
        )
        shown = plain(student)
        if teacher and student:
            shown = Field(f"{shown.text} ({100 * student / teacher:.0f} %)", student)
        lines.append(
            (
                Field(row.label),
                plain(teacher),
                shown,
                Field(", ".join(str(layer) for layer in sequence(facts.get("layers")))),
                plain(figure(facts.get("loss_before"))),
                plain(figure(facts.get("loss_after"))),
                *_quality(group, row),
            )
        )
    return Grid("Teacher and student", heads, tuple(lines))


def _quality_heads() -> tuple[Head, ...]:
    return (
        *(Head("Size on disk", numeric=True), Head("Perplexity", numeric=True)),
        *(Head("over the baseline", numeric=True), Head("KL", "nats", True)),
    )


def _quality(group: Group, row: Row) -> tuple[Field, ...]:
    found: dict[str, Value | None] = {}
    for metric in ("artefact_bytes", "perplexity", "kl_mean"):
        protocol = group.main_protocol(metric)
        found[metric] = row.get(metric, protocol) if protocol else None
    perplexity, change = found["perplexity"], Field(words.UNKNOWN)
    if perplexity is not None:
        base = group.baseline_value(row, "perplexity", perplexity.protocol)
        if base is not None and base.value > 0:
            ratio = perplexity.value / base.value
            change = Field(words.increase(ratio), ratio)
    size, kl = found["artefact_bytes"], found["kl_mean"]
    return (
        Field(words.NOT_MEASURED)
        if size is None
        else Field(words.figure("artefact_bytes", size.value), size.value),
        plain(None if perplexity is None else perplexity.value, words.NOT_MEASURED),
        change,
        plain(None if kl is None else kl.value, words.NOT_MEASURED),
    )
