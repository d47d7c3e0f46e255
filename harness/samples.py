"""What stands behind the values of quality, one row a sample: `samples.parquet` beside the record.

A sample is the score of a question, the loss of a window, the divergence of a token: what two
methods are compared by, pair by pair. For tasks the question's hash and the model's answer stand
beside it. Equal values give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.record import Value, write_atomically

FILE_NAME = "samples.parquet"


@dataclass(frozen=True)
class Answers:
    """Of each sample of a value: lm-eval's hash of the question, and the answer as JSON."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


def write_samples(
    values: Sequence[Value],
    answers: Mapping[tuple[str, str], Answers],
    folder: Path,
    last_look: Callable[[], None] = lambda: None,
) -> None:
    """Write the samples of `values` into `folder`, whole or not at all; none are no file.

    `answers` has (metric, protocol) of a task's value -> what was asked and answered; `last_look`
    is that of `write_atomically`.

    Columns: measure, metric, protocol (string), sample (int32, from 0 in each value), value
    (float64), question and answer (string or null).
    """
    import pyarrow as pa
    from pyarrow import parquet

    sampled = [value for value in values if value.samples]
    path = folder / FILE_NAME
    if not sampled:
        last_look()
        path.unlink(missing_ok=True)
        return
    tables = []
    for value in sampled:
        count = len(value.samples)
        known = answers.get((value.metric, value.protocol)) if value.measure == "tasks" else None
        nothing = (None,) * count
        tables.append(
            pa.table(
                {
                    "measure": pa.repeat(value.measure, count),
                    "metric": pa.repeat(value.metric, count),
                    "protocol": pa.repeat(value.protocol, count),
                    "sample": pa.array(range(count), pa.int32()),
                    "value": pa.array(value.samples, pa.float64()),
                    "question": pa.array(known.questions if known else nothing, pa.string()),
                    "answer": pa.array(known.answers if known else nothing, pa.string()),
                }
            )
        )
    written = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables), written, compression="zstd")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, written.getvalue(), last_look)
