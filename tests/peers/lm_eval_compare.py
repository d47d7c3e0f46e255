"""The tasks measure beside lm-eval's own command line: equal answers, and how fast they come.

`python -m tests.peers.lm_eval_compare equality MODEL DATA` compares sample by sample;
`python -m tests.peers.lm_eval_compare throughput TOKENIZER DATA` times both on a model of the shape
`model=shape` with random weights (float32), in turns; both print Markdown. DATA is a folder with
the data sets as the hub names them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

from harness.measures.tasks import Tasks
from methods.engine import TorchEngine
from tests.harness.measures.surroundings import drawn_ids, make_context
from tests.peers.lm_eval_cli import ANSWERING, Clock, PeerRun, run

TOLERANCE = 1e-4
"""Largest difference of two log-likelihoods, nats; choices closer than that are one."""

EQUALITY: tuple[tuple[str, int, int | None], ...] = (
    ("hellaswag", 500, None),
    ("mmlu", 9, 5),
    ("gsm8k", 50, None),
)
"""Task, limit of each of its parts (57 subjects: 513 questions), examples in the prompt."""

SUBJECTS = (
    *("abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge"),
    *("college_biology", "college_chemistry", "college_computer_science", "college_mathematics"),
    *("college_medicine", "college_physics", "computer_security", "conceptual_physics"),
    *("econometrics", "electrical_engineering", "elementary_mathematics", "formal_logic"),
    *("global_facts", "high_school_biology", "high_school_chemistry"),
    *("high_school_computer_science", "high_school_european_history", "high_school_geography"),
    *("high_school_government_and_politics", "high_school_macroeconomics"),
    *("high_school_mathematics", "high_school_microeconomics", "high_school_physics"),
    *("high_school_psychology", "high_school_statistics", "high_school_us_history"),
    *("high_school_world_history", "human_aging", "human_sexuality", "international_law"),
    *("jurisprudence", "logical_fallacies", "machine_learning", "management", "marketing"),
    *("medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition"),
    *("philosophy", "prehistory", "professional_accounting", "professional_law"),
    *("professional_medicine", "professional_psychology", "public_relations"),
    *("security_studies", "sociology", "us_foreign_policy", "virology", "world_religions"),
)
"""MMLU's 57."""

OF_SUBJECT = 9
"""Questions of each subject that are timed: 2052 requests for all 57."""

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 4096,
}
"""`conf/model/shape.yaml`: 0.55 B parameters, a context that 5-shot prompts fit into."""


@dataclass(frozen=True)
class OurRun:
    """What the measure gave: (task, filter's metric) -> question -> (score, answer)."""

    answers: Mapping[tuple[str, str], Mapping[str, tuple[float, Any]]]
    seconds: float
    answering_seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Difference:
    """Two runs of one task's questions under one metric.

    Attributes:
        compared: questions.
        differing: questions whose scores differ.
        unexplained: those of them whose answers are further apart than TOLERANCE.
        largest: largest difference of two log-likelihoods in nats; None for texts.
        texts: answers given as texts that differ.
    """

    compared: int
    differing: int
    unexplained: int
    largest: float | None
    texts: int


def ours(
    model: Path, data: Path, folder: Path, tasks: str, limit: int, shots: int | None, batch: int
) -> OurRun:
    """Evaluate the checkpoint `model` in float32 on the CPU through the tasks measure."""
    from harness.measures.lm_eval_model import EngineModel

    start = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    context = make_context(folder, drawn_ids(1, 8), tokenizer=tokenizer)
    context.task_folder, context.artefact = data, model
    measure = Tasks(tasks.split(","), limit=limit, num_fewshot=shots, batch_size=batch)
    clock = Clock()
    with _timed(EngineModel, clock):
        values = measure.run(TorchEngine(loaded, "cpu", []), context)
    seconds = time.perf_counter() - start
    if context.problems or not values:
        raise RuntimeError(f"{context.problems} {context.details['notes']}")
    answers: dict[tuple[str, str], dict[str, tuple[float, Any]]] = {}
    for value in values:
        known = context.answers[value.metric, value.protocol]
        task = value.protocol.partition(f"_{0 if shots is None else shots}shot")[0]
        answers[task.rpartition("_5shot")[0] or task, value.metric] = {
            question: (score, json.loads(answer))
            for question, score, answer in zip(
                known.questions, value.samples, known.answers, strict=True
            )
        }
    return OurRun(answers, seconds, clock.seconds, clock.processor_seconds)


@contextmanager
def _timed(model: type, clock: Clock) -> Iterator[None]:
    """Time a model's answers while the block runs."""
    own = {name: getattr(model, name) for name in ANSWERING}
    for name, answer in own.items():
        setattr(model, name, clock.timing(answer))
    try:
        yield
    finally:
        for name, answer in own.items():
            setattr(model, name, answer)


METRICS = {"none": "", "strict-match": "_strict", "flexible-extract": "_flexible"}


def differences(peer: PeerRun, mine: OurRun) -> dict[tuple[str, str], Difference]:
    """Return what differs, by task (the parts of MMLU together) and metric."""
    rows: dict[tuple[str, str], list[tuple[float, Any, float, Any]]] = {}
    for task, samples in peer.samples.items():
        for sample in samples:
            for metric in sample["metrics"]:
                name = metric + METRICS[sample["filter"]]
                score, answer = mine.answers[task, name][sample["doc_hash"]]
                title = "mmlu" if task.startswith("mmlu_") else task
                rows.setdefault((title, name), []).append(
                    (float(sample[metric]), sample["filtered_resps"], score, answer)
                )
    return {key: _difference(found) for key, found in rows.items()}


def _difference(rows: Sequence[tuple[float, Any, float, Any]]) -> Difference:
    differing = unexplained = texts = 0
    largest: float | None = None
    for expected, responses, score, answer in rows:
        is_text = isinstance(responses[0], str)
        if is_text:
            apart = answer != responses[0]
            texts += apart
        else:
            likelihoods = [float(response[0]) for response in responses]
            gaps = [abs(a - b) for a, b in zip(likelihoods, answer, strict=True)]
            largest = max(largest or 0.0, *gaps)
            best, second = sorted(likelihoods)[-1], sorted(likelihoods)[-2]
            apart = best - second > TOLERANCE
        differing += score != expected
        unexplained += score != expected and apart
    return Difference(len(rows), differing, unexplained, largest, texts)


def equality(model: Path, data: Path, folder: Path) -> dict[tuple[str, str], Difference]:
    """Compare on all of EQUALITY."""
    found: dict[tuple[str, str], Difference] = {}
    for task, limit, shots in EQUALITY:
        options = () if shots is None else ("--num_fewshot", str(shots))
        peer = run(model, data, folder / task, task, limit, "--batch_size", "8", *options)
        mine = ours(model, data, folder / task, task, limit, shots, 8)
        found.update(differences(peer, mine))
    return found


TIMES = ("Seconds answering", "Requests/s", "Processor seconds answering", "Seconds in all")
GAP = "Largest difference of a log-likelihood (nats)"


def _heads(*heads: str) -> None:
    print(f"| {' | '.join(heads)} |\n|---|---|{'---:|' * (len(heads) - 2)}")


def print_equality(model: Path, data: Path) -> None:
    """Print the table of `equality`."""
    with tempfile.TemporaryDirectory() as folder:
        found = equality(model, data, Path(folder))
    _heads("Task", "Metric", "Questions", "Scores that differ", "Texts that differ", GAP)
    for (task, metric), one in sorted(found.items()):
        largest = "–" if one.largest is None else f"{one.largest:.1e}"
        texts = "–" if one.largest is not None else f"{one.texts}"
        print(f"| {task} | {metric} | {one.compared} | {one.differing} | {texts} | {largest} |")


def print_throughput(
    tokenizer: Path, data: Path, questions: int = 500, subjects: int = len(SUBJECTS)
) -> None:
    """Print requests a second of both: HellaSwag, and MMLU with 5 examples on some subjects."""
    print(f"{torch.get_num_threads()} threads\n")
    _heads("Task", "Run", "Requests", *TIMES, GAP)
    chosen = SUBJECTS[:: -(-len(SUBJECTS) // subjects)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "model"
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(checkpoint)
        LlamaTokenizer.from_pretrained(tokenizer).save_pretrained(checkpoint)
        mmlu = ",".join(f"mmlu_{subject}" for subject in chosen)
        for title, task, limit, shots, count in (
            ("hellaswag", "hellaswag", questions, 0, questions),
            (f"mmlu, {len(chosen)} subjects", mmlu, OF_SUBJECT, 5, OF_SUBJECT * len(chosen)),
        ):
            place = folder / title
            for batch in (1, 8):
                options = ("--num_fewshot", str(shots), "--batch_size", str(batch))
                peer = run(checkpoint, data, place / str(batch), task, limit, *options)
                mine = ours(checkpoint, data, place / f"ours{batch}", task, limit, shots, 16)
                gap = max(one.largest or 0.0 for one in differences(peer, mine).values())
                _print_run(title, f"lm_eval, batch size {batch}", 4 * count, peer, "")
                _print_run(title, "quantbench, batch size 16", 4 * count, mine, f"{gap:.1e}")


def _print_run(task: str, name: str, count: int, done: PeerRun | OurRun, gap: str) -> None:
    spent = done.answering_seconds
    print(
        f"| {task} | {name} | {count} | {spent:.1f} | {count / spent:.2f} | "
        f"{done.processor_seconds:.1f} | {done.seconds:.1f} | {gap} |",
        flush=True,
    )


if __name__ == "__main__":
    {"equality": print_equality, "throughput": print_throughput}[sys.argv[1]](
        Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:])
    )
