"""What `harness.decode_bench` writes: a row an engine, targets beside what was reached.

Rates are tokens over seconds of a burst, choosing the token included. Ratios are of bursts of one
round: the engines take turns, so both saw the same machine. The share of the read bandwidth is the
stored weights that a token reads, a second, over the best read of the same run: scales are counted,
keys and values and the lookup of the embedding are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from harness.decode_contenders import Facts
from harness.measures.bandwidth import Bandwidth
from harness.measures.timing import Burst, Point
from kernels import bench_targets
from kernels.bench_report import replace_text
from kernels.bench_targets import WHOLE, Line, WholeTarget

QUALITY = "none: random weights"
MEBIBYTE = 1 << 20


@dataclass
class Row:
    """One engine: what is known of it, and its bursts, one a round."""

    engine: str
    facts: Facts
    bursts: list[Burst] = field(default_factory=list)

    def decode(self) -> list[float]:
        """Return tokens per second of each burst's decoding."""
        return [len(burst.tokens) / sum(burst.tokens) for burst in self.bursts]

    def prefill(self, prompt: int) -> list[float]:
        """Return tokens per second of each burst's prompt of `prompt` tokens."""
        return [prompt / burst.first for burst in self.bursts]


@dataclass(frozen=True)
class Outcome:
    """Everything that one run found.

    Attributes:
        model: name of the shape.
        rows: the baseline first.
        absent: engine -> why it was not measured.
        environment: machine, versions, threads.
    """

    model: str
    device: str
    point: Point
    tokens: int
    bandwidth: Bandwidth
    rows: Sequence[Row]
    absent: Mapping[str, str]
    environment: Mapping[str, Any]

    def rates(self, row: Row, quantity: str) -> list[float]:
        """Return tokens per second of each burst: `decode` or `prefill`."""
        return row.decode() if quantity == "decode" else row.prefill(self.point.prompt)

    def ratios(self, row: Row, other: Row, quantity: str) -> list[float]:
        """Return how many times faster `row` is than `other`, round by round."""
        pairs = zip(self.rates(row, quantity), self.rates(other, quantity), strict=False)
        return [own / theirs for own, theirs in pairs]

    def faster(self, row: Row, quantity: str) -> float:
        """Return the median ratio to the baseline."""
        return median(self.ratios(row, self.rows[0], quantity))

    def share(self, row: Row) -> float:
        """Return the weights read a second, by the median rate, over the read bandwidth."""
        return row.facts.read_bytes * median(row.decode()) / self.bandwidth.ceiling

    def targets(self) -> list[Line]:
        """Return the targets of the device beside what was reached."""
        return [self._line(target) for target in WHOLE[self.device]]

    def _line(self, target: WholeTarget) -> Line:
        rows = {row.engine: row for row in self.rows}
        own, other = rows.get(target.engine), rows.get(target.over or target.engine)
        values = []
        if own is not None and other is not None and self.model in target.models:
            found = self.rates(own, target.quantity)
            if target.over is not None:
                found = self.ratios(own, other, target.quantity)
            values = [median(found)]
        return bench_targets.line(target.text, target.wanted, values)


COLUMNS: tuple[tuple[str, Callable[[Outcome, Row], str]], ...] = (
    ("engine", lambda o, r: r.engine),
    ("weights held, MiB", lambda o, r: f"{r.facts.held_bytes / MEBIBYTE:,.0f}"),
    ("prefill, tokens/s (best)", lambda o, r: _rate(o.rates(r, "prefill"))),
    ("decode, tokens/s (best)", lambda o, r: _rate(o.rates(r, "decode"))),
    ("prefill, x baseline", lambda o, r: f"{o.faster(r, 'prefill'):.2f}"),
    ("decode, x baseline", lambda o, r: f"{o.faster(r, 'decode'):.2f}"),
    ("read a token, MiB", lambda o, r: f"{r.facts.read_bytes / MEBIBYTE:,.0f}"),
    ("of read bandwidth", lambda o, r: f"{o.share(r):.0%}"),
    ("decode path", lambda o, r: r.facts.path),
    ("kernels", lambda o, r: r.facts.kernels),
    ("quality", lambda o, r: QUALITY),
)
LEFT_ALIGNED = ("engine", "decode path", "kernels", "quality")
PRINTED = 8
"""Columns of the table on the terminal."""


def _rate(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({max(values):.1f})"


def table(outcome: Outcome, columns: int = len(COLUMNS)) -> str:
    """Return the rows as Markdown, `columns` of them."""
    shown = COLUMNS[:columns]
    names = [name for name, _ in shown]
    rules = ["---" if name in LEFT_ALIGNED else "---:" for name in names]
    lines = [f"| {' | '.join(names)} |", f"|{'|'.join(rules)}|"]
    for row in outcome.rows:
        lines.append(f"| {' | '.join(cell(outcome, row) for _, cell in shown)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, outcome: Outcome) -> None:
    """Write `results.json` and `README.md` into a folder, each whole or as it was."""
    facts = {
        "model": outcome.model,
        "weights": QUALITY,
        "environment": dict(outcome.environment),
        "point": asdict(outcome.point),
        "decoded_tokens": outcome.tokens,
        "copy_bytes_per_second": outcome.bandwidth.copy,
        "read_bytes_per_second": outcome.bandwidth.read,
        "missing": dict(outcome.absent),
        "targets": [asdict(line) for line in outcome.targets()],
        "rows": [asdict(row) for row in outcome.rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "results.json", json.dumps(facts, indent=1) + "\n")
    replace_text(folder / "README.md", page(outcome))


def page(outcome: Outcome) -> str:
    """Return the page of a run as Markdown."""
    environment, point = outcome.environment, outcome.point
    bursts = len(outcome.rows[0].bursts) if outcome.rows else 0
    missing = "".join(f"- {name}: {why}\n" for name, why in outcome.absent.items())
    return (
        f"# Whole models on {environment['machine']}\n\n"
        f"`{outcome.model}` with random weights: speed and memory do not depend on the values, and "
        f"there is no quality figure. A prompt of {point.prompt} tokens, then {outcome.tokens} "
        f"tokens one by one, {bursts} bursts of each engine in turns, after one that is not "
        f"counted; {environment['threads']} threads. Median of the bursts, in brackets the best; "
        f"ratios are medians over rounds, to the first row. Read bandwidth of the run "
        f"{outcome.bandwidth.ceiling / 1e9:.1f} GB/s, measured before and after: a share above 100 "
        "% says that the memory was busier then. Written by `python -m harness.decode_bench`; "
        "every token's time is in `results.json`.\n\n"
        f"{table(outcome)}\n## Targets\n\n{bench_targets.table(outcome.targets())}\n"
        f"## Not measured\n\n{missing or 'Nothing is missing.' + chr(10)}"
    )
