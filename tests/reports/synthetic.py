"""Synthetic records: made-up figures in the shape of the default grid, to try the report on.

Nothing here was measured. The figures follow simple formulas with seeded noise, and the cells
cover what a real sweep can leave: failed, partial and simulated rows, an infinite perplexity,
random weights, names that are markup.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from harness.record import Failure, Record, Value

PARAMETERS = 3_000_000
QUANTIZED = 2_359_296
PERPLEXITY = "embedded_gptq_1024"
SPEED = "prompt128_depth256_batch1"

METHODS: tuple[tuple[str, float, int | None, str, str], ...] = (
    ("fp32", 32, None, "packed", "torch.linear"),
    ("fp16", 16, None, "dequantized", "to(float32) + torch.linear"),
    ("bf16", 16, None, "packed", "torch.linear"),
    ("int8_dynamic", 8, None, "packed", "quantized::linear_dynamic"),
    ("int8_static", 8, None, "packed", "quantized::linear"),
    *(
        ("rtn", bits, size, "packed" if bits in (4, 8) else "dequantized", f"rtn int{bits}")
        for bits in (8, 4, 3, 2)
        for size in (32, 128)
    ),
)


class Synthetic:
    """Makes records of one model on one hardware; every figure is drawn from `seed`."""

    def __init__(self, model: str = "embedded", hardware: str = "cpu", seed: int = 0) -> None:
        self.model = model
        self.hardware = hardware
        self.random = random.Random(f"{model} {hardware} {seed}")

    def grid(self) -> list[Record]:
        """Return the 13 cells of the default grid, all of them measured."""
        return [self.cell(*method) for method in METHODS]

    def cell(
        self, method: str, bits: float, size: int | None, execution: str, kernel: str
    ) -> Record:
        """Return one measured cell."""
        scale_bits = 0.0 if size is None else 32 / size
        values = [
            *self._size(bits, scale_bits),
            *self._quality(method, bits, size),
            *self._speed(method, bits, execution),
        ]
        name = f"{self.model}-{method}-{bits:g}-{size}-{self.hardware}"
        return Record(
            cell=name,
            status="ok",
            config=self._config(method, bits, size),
            values=tuple(values),
            environment=environment(),
            details=self._details(kernel, execution),
            started="2026-01-02T03:04:05+00:00",
            seconds=9.5,
        )

    def _config(self, method: str, bits: float, size: int | None) -> dict[str, Any]:
        axes = f"method={method} bits={bits:g} group_size={size}"
        return {
            "model": self.model,
            "method": method,
            "bits": bits,
            "group_size": size,
            "hardware": self.hardware,
            "suite": "smoke",
            "data": "embedded",
            "baseline": "fp32",
            "cell_key": f"key-{method}-{bits:g}-{size}",
            "artefact_key": f"artefact-{method}-{bits:g}-{size}",
            "command": f"python run.py model={self.model} {axes} hardware={self.hardware}",
            "random_weights": False,
            "resolved": {"method": {"name": method, "symmetric": False}},
        }

    def _details(self, kernel: str, execution: str) -> dict[str, Any]:
        norms = [[f"model.layers.{i}.input_layernorm.weight", 256, "a vector"] for i in range(6)]
        return {
            "kernels": [
                {
                    "layer": "SyntheticLinear",
                    "kernel": kernel,
                    "execution": execution,
                    "matrices": 42,
                    "weights": QUANTIZED,
                    "example": "model.layers.0.self_attn.q_proj",
                }
            ],
            "execution": execution,
            "notes": ["a synthetic record: nothing was measured"],
            "coverage": {
                "quantized_weights": QUANTIZED,
                "total_weights": PARAMETERS,
                "left_out": [["model.embed_tokens.weight", 524_288, "an embedding"], *norms],
            },
            "generation": [
                {
                    "prompt": "Anna lives in",
                    "reference": " Lima and sells 12 apples a day.",
                    "text": " Lima and sells 12 pears a day.",
                }
            ],
            "model": {
                "name": self.model,
                "kind": "synthetic",
                "sha256": "0f1e2d",
                "parameters": PARAMETERS,
            },
            "calibration": None,
        }

    def _size(self, bits: float, scale_bits: float) -> list[Value]:
        stored = (bits + scale_bits) * QUANTIZED / 8
        rest = 4.0 * (PARAMETERS - QUANTIZED)
        figures: list[tuple[str, str, str, float, str]] = [
            ("size", "artefact_bytes", "stored", float(int(stored + rest)), "B"),
            ("size", "bits_per_weight", "stored", bits + scale_bits, "bits"),
            ("size", "quantized_bytes", "stored", float(int(stored)), "B"),
            ("size", "embedding_bytes", "stored", 2_097_152.0, "B"),
            ("memory", "peak_memory_bytes", "process_peak_depth128", float(int(stored + 3e7)), "B"),
            ("quantize", "quantize_peak_bytes", "process_peak", 6.5e7, "B"),
            ("quantize", "quantize_seconds", "quantize", self._noise(0.4), "s"),
            ("load", "load_seconds", "artefact", self._noise(0.03), "s"),
        ]
        return [Value(*figure, higher_is_better=False) for figure in figures]

    def _quality(self, method: str, bits: float, size: int | None) -> list[Value]:
        damage = 0.0 if bits >= 16 else 2.0 ** (6 - 2 * bits) * (1 + (size or 64) / 256)
        damage += 1e-5 * (32 - bits)
        damage *= self._noise(1.0)
        perplexity = 6.1 * math.exp(damage)
        kl = 1e-6 + damage / 3
        score = 0.25 + 0.6 * math.exp(-damage)
        values = [
            Value(
                "perplexity",
                "perplexity",
                PERPLEXITY,
                perplexity,
                "perplexity",
                False,
                stderr=0.05,
                samples=self._losses(math.log(perplexity)),
            ),
            Value(
                "divergence", "kl_mean", PERPLEXITY, kl, "nats", False, samples=self._around(kl, 8)
            ),
            Value("divergence", "kl_p99", PERPLEXITY, kl * 9, "nats", False),
            Value("divergence", "kl_noise_floor", PERPLEXITY, 2e-7, "nats", None),
            Value("divergence", "top1_agreement", PERPLEXITY, math.exp(-kl), "share", True),
            Value("divergence", "nonfinite_logits", PERPLEXITY, 0.0, "logits", False),
            Value("generation", "equal_tokens", "greedy_8x32", math.exp(-kl * 3), "share", True),
        ]
        for task, shots in (("endings", 0), ("facts", 5)):
            values.append(
                score_of(f"{task}_{shots}shot_limit100", "acc", self.answers(task, score))
            )
        return values

    def answers(self, task: str, score: float, questions: int = 100) -> tuple[float, ...]:
        """Return right and wrong answers; what is hard is so for every row."""
        hardness = random.Random(f"{self.model} {task}")
        return tuple(float(hardness.random() < self._noise(score, 0.1)) for _ in range(questions))

    def _losses(self, mean: float, windows: int = 16) -> tuple[float, ...]:
        """Return losses of the windows of one text, hard and easy for every row alike."""
        text = random.Random(f"{self.model} text")
        hardness = [text.gauss(0, 0.3) for _ in range(windows)]
        middle = sum(hardness) / windows
        own = self._around(mean, windows, 0.01)
        return tuple(h - middle + loss for h, loss in zip(hardness, own, strict=True))

    def _around(self, mean: float, count: int, spread: float = 0.05) -> tuple[float, ...]:
        """Return `count` samples whose mean is `mean`."""
        drawn = [self.random.uniform(-spread, spread) for _ in range(count)]
        middle = sum(drawn) / count
        return tuple(mean * (1 + x - middle) for x in drawn)

    def _speed(self, method: str, bits: float, execution: str) -> list[Value]:
        factor = (32 / bits) ** 0.4 * (0.45 if execution == "dequantized" else 1.0)
        decode = self._noise(180 * factor)
        figures: list[tuple[str, float, str, bool | None]] = [
            ("prefill_tokens_per_second", self._noise(5200 * factor**0.5), "tokens/s", True),
            ("ttft_seconds", self._noise(0.025 / factor**0.5), "s", False),
            ("decode_tokens_per_second", decode, "tokens/s", True),
            ("tpot_seconds", 1 / decode, "s", False),
            ("achieved_bytes_per_second", decode * bits * QUANTIZED / 8, "B/s", None),
            ("copy_bytes_per_second", 9.1e9, "B/s", None),
            ("timing_spread", 0.17 if method == "int8_static" else 0.03, "ratio", None),
        ]
        if method != "fp32":
            figures.append(("decode_speedup", self._noise(factor), "ratio", True))
        return [
            Value("speed", metric, SPEED, value, unit, better)
            for metric, value, unit, better in figures
        ]

    def _noise(self, value: float, share: float = 0.02) -> float:
        return value * self.random.uniform(1 - share, 1 + share)


def score_of(protocol: str, metric: str, samples: tuple[float, ...], unit: str = "share") -> Value:
    """Return the score that `samples` make: their mean, or exp of minus it for a perplexity."""
    mean = sum(samples) / len(samples)
    if unit == "perplexity":
        return Value("tasks", metric, protocol, math.exp(-mean), unit, False, None, samples)
    error = math.sqrt(max(0.0, mean * (1 - mean)) / len(samples))
    return Value("tasks", metric, protocol, mean, unit, True, error, samples)


def repetition(record: Record, seed: int, **calibration: str) -> Record:
    """Return `record` as the cell of another seed (and `calibration` text), its options stated."""
    resolved = {
        **record.config["resolved"],
        "seed": seed,
        "repeat": "seed",
        "data": {"name": "embedded", "calibration": calibration.get("text")},
    }
    method = {**resolved["method"], "calibration": {"samples": 32, "seed": seed}}
    cell = "-".join([record.cell, f"seed{seed}", *calibration.values()])
    config = {
        **record.config,
        "command": f"{record.config['command']} seed={seed}",
        "resolved": {**resolved, "method": method},
    }
    return replace(record, cell=cell, config=config)


def with_tasks(record: Record, quality: float = 1.0) -> Record:
    """Return `record` with scores of groups, parts, generation and lambada, as a real suite has.

    `quality` scales what is right; the answers follow the order of the questions' hardness.
    """
    made = Synthetic(record.config["model"], record.config["hardware"], seed=len(record.cell))
    subjects = {"mmlu_anatomy": "mmlu_stem", "mmlu_physics": "mmlu_stem", "mmlu_law": "mmlu_other"}
    values, facts = [], {}
    for name, group in subjects.items():
        values.append(score_of(f"{name}_5shot", "acc", made.answers(name, 0.5 * quality, 40)))
        facts[name] = task_facts(name, 40, group)
    for group in ("mmlu_stem", "mmlu_other"):
        inside = [v.samples for v in values if subjects.get(v.protocol[: -len("_5shot")]) == group]
        values.append(score_of(f"{group}_5shot", "acc", tuple(x for s in inside for x in s)))
        facts[group] = task_facts(group, len(values[-1].samples), "mmlu")
    every = tuple(x for value in values[: len(subjects)] for x in value.samples)
    values.append(score_of("mmlu_5shot", "acc", every))
    facts["mmlu"] = task_facts("mmlu", len(every))
    sums = made.answers("gsm8k", 0.4 * quality, 60)
    lenient = made.answers("gsm8k", 0.5 * quality, 60)
    values += [
        score_of("gsm8k_5shot", "exact_match_strict", sums),
        score_of("gsm8k_5shot", "exact_match_flexible", lenient),
        score_of("humaneval_0shot", "pass@1", made.answers("humaneval", 0.3 * quality, 50)),
        score_of("hellaswag_0shot", "acc", made.answers("hellaswag", 0.4 * quality, 200)),
        score_of("hellaswag_0shot", "acc_norm", made.answers("hellaswag", 0.45 * quality, 200)),
        score_of("lambada_openai_0shot", "acc", made.answers("lambada", 0.6 * quality, 80)),
        score_of(
            "lambada_openai_0shot",
            "perplexity",
            tuple(-x / quality for x in made._around(2.0, 80, 0.5)),
            "perplexity",
        ),
    ]
    for task, count in (("gsm8k", 60), ("humaneval", 50), ("hellaswag", 200)):
        facts[task] = task_facts(task, count)
    facts["lambada_openai"] = task_facts("lambada_openai", 80)
    details = {**record.details, "tasks": facts}
    return replace(record, values=(*record.values, *values), details=details)


def task_facts(task: str, count: int, group: str | None = None) -> dict[str, Any]:
    """Return what a record says of one task."""
    return {"group": group, "questions": f"digest of {task}", "count": count}


def environment(**changes: Any) -> dict[str, Any]:
    """Return a made-up machine."""
    return {
        "cpu": "Synthetic CPU",
        "cores": 2,
        "threads": 2,
        "memory_bytes": 16_000_000_000,
        "gpu": None,
        "host": "synthetic",
        "python": "3.11.9",
        "platform": "Linux",
        "packages": {"torch": "2.13.0", "quantbench": "0.1.0"},
        "load_average": 0.4,
        **changes,
    }


def failed(record: Record) -> Record:
    """Return `record` as a cell that was killed."""
    message = "the quantize process was stopped: it needed more memory than its limit of 64 MiB"
    return replace(
        record,
        status="failed",
        values=(),
        errors=(Failure("quantize", "limit", message),),
        details={"notes": []},
    )


def partial(record: Record) -> Record:
    """Return `record` as a cell one of whose measures failed."""
    values = tuple(value for value in record.values if value.measure != "tasks")
    error = Failure("tasks", "ValueError", "the tasks had <no> answers | at all")
    return replace(record, status="partial", values=values, errors=(error,))


def simulated(record: Record) -> Record:
    """Return `record` as fake quantization, its speed and size values left in."""
    kernel = {**record.details["kernels"][0], "execution": "simulated"}
    details = {**record.details, "kernels": [kernel], "execution": "simulated"}
    return replace(record, details=details)


def changed(record: Record, metric: str, /, **changes: Any) -> Record:
    """Return `record` with `changes` made to its values of `metric`."""
    values = tuple(replace(v, **changes) if v.metric == metric else v for v in record.values)
    return replace(record, values=values)


def with_random_weights(record: Record) -> Record:
    """Return `record` as one of random weights, as a careless harness would write it."""
    return replace(record, config={**record.config, "random_weights": True})


def awkward_sweep() -> list[Record]:
    """Return the default grid with every kind of cell, and three cells of random weights."""
    grid = Synthetic().grid()
    names = {record.cell: index for index, record in enumerate(grid)}
    for cell, change in (
        ("embedded-rtn-3-32-cpu", failed),
        ("embedded-rtn-3-128-cpu", partial),
        ("embedded-rtn-2-32-cpu", simulated),
    ):
        grid[names[cell]] = change(grid[names[cell]])
    last = names["embedded-rtn-2-128-cpu"]
    grid[last] = changed(grid[last], "perplexity", value=math.inf, stderr=None)
    shape = Synthetic("shape-0.5b").grid()
    return grid + [with_random_weights(record) for record in (shape[0], shape[3], shape[8])]
