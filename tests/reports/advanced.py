"""Synthetic records of what issue-7 methods and jobs leave: sensitivities, mixes, training, jobs.

Made up like `tests.reports.synthetic`; nothing here was measured.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from harness.record import Record, Value
from tests.reports.synthetic import Synthetic, changed, environment

BLOCKS = 4
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def matrices() -> list[tuple[str, int, str]]:
    """Return (name, block, module) of every matrix."""
    return [(f"model.layers.{b}.{kind}", b, kind) for b in range(BLOCKS) for kind in KINDS]


def sensitivity(scheme: str = "rtn 4 bits g128", **changes: Any) -> dict[str, Any]:
    """Return `details["sensitivity"]` of one scheme; the down projections matter most."""
    made = random.Random(scheme)
    modules = [
        {
            "name": name,
            "block": block,
            "module": kind,
            "weights": 65_536,
            "bits_per_weight": 4.25,
            "kl": 1e-4 * (1 + 30 * kind.endswith("down_proj")) * made.uniform(0.5, 2),
            "kl_stderr": 1e-5,
            "loss": made.uniform(-1e-4, 1e-3),
        }
        for name, block, kind in matrices()
    ]
    modules[0]["kl"] = 1e-7
    return {
        "scheme": scheme,
        "modules": modules,
        "noise_floor_kl": 2e-7,
        "all_kl": 0.0141,
        "sum_kl": sum(module["kl"] for module in modules),
        "tokens": 4096,
        "text": "made-up text",
        "cost": {
            "candidates": 16,
            "block_forwards": 44,
            "block_forwards_without_prefixes": 68,
            "seconds": 3.5,
        },
        "prediction": {
            "mixes": 20,
            "rank_correlation": 0.93,
            "predicted": [0.1, 0.2],
            "measured": [0.1, 0.3],
        },
        **changes,
    }


def job_record(job: str, details: dict[str, Any], **config: Any) -> Record:
    """Return a record of a job that is no row."""
    return Record(
        cell=f"{job}-embedded-cpu",
        status="ok",
        config={
            "job": job,
            "model": "embedded",
            "method": "rtn",
            "bits": 4,
            "group_size": 128,
            "hardware": "cpu",
            "suite": "smoke",
            "data": "embedded",
            "baseline": "fp32",
            "command": f"python run.py job={job} method=rtn bits=4",
            **config,
        },
        environment=environment(),
        details=details,
        started="2026-01-02T03:04:05+00:00",
        seconds=9.5,
    )


def sensitivity_record(*schemes: dict[str, Any]) -> Record:
    """Return a record of job sensitivity over `schemes`, by default one."""
    found = [*schemes] or [sensitivity()]
    return job_record("sensitivity", {"sensitivity": found if len(found) > 1 else found[0]})


def deploy_record(passed: bool = True) -> Record:
    """Return a record of job deploy with a check of each outcome."""
    checks = [
        check("functional check", None, None, "", True, "finite logits on 3 prompts"),
        check(
            "perplexity increase", 0.03, 0.012 if passed else 0.31, "share", passed, "16 windows"
        ),
        check("size", 1e7, 1.9e6, "bytes", True, "on disk"),
        check("time per token", None, 0.0042, "seconds", None, "no limit was given"),
    ]
    details = {"deploy": {"profile": "cpu_server", "cell": "c", "checks": checks, "passed": passed}}
    return job_record("deploy", details)


def check(
    name: str, wanted: float | None, found: float | None, unit: str, passed: bool | None, why: str
) -> dict[str, Any]:
    """Return one check of a deployment."""
    return {
        "name": name,
        "wanted": wanted,
        "found": found,
        "unit": unit,
        "passed": passed,
        "why": why,
    }


def search_record(chosen: str | None = "cell-b") -> Record:
    """Return a record of job search over three candidates, one of them dropped early."""
    rows = [
        candidate("cell-a", "rtn 4 bits g64", 2.0e6, 0.081, "dropped"),
        candidate("cell-b", "rtn 8 bits g128", 3.1e6, 0.004, "within the limit"),
        candidate("cell-c", "rtn 8 bits g64", 3.2e6, None, "larger than the chosen one"),
    ]
    rungs = [
        {
            "windows": 8,
            "tried": ["cell-a", "cell-b", "cell-c"],
            "dropped": [{"cell": "cell-a", "why": "its interval lies above the limit"}],
        },
        {"windows": 16, "tried": ["cell-b"], "dropped": []},
    ]
    found = {
        "criterion": "the smallest artefact whose loss is at most 0.03 above",
        "rungs": rungs,
        "chosen": chosen,
        "evaluations": {"made": 40, "exhaustive": 48, "saved": 8, "unit": "windows"},
        "rows": rows,
    }
    return job_record("search", {"search": found})


def candidate(
    cell: str, label: str, size: float, increase: float | None, verdict: str
) -> dict[str, Any]:
    """Return one row of a search."""
    low = None if increase is None else increase - 0.01
    high = None if increase is None else increase + 0.01
    return {
        "cell": cell,
        "label": label,
        "bytes": size,
        "increase": increase,
        "low": low,
        "high": high,
        "verdict": verdict,
    }


def made_by(
    method: str, bits: float | None, size: int | None, facts: dict[str, Any], **node: Any
) -> Record:
    """Return a measured row of `method` whose record says `facts` of the method."""
    made = Synthetic(seed=len(method)).cell(method, bits or 4.0, size, "packed", f"{method} kernel")
    resolved = {**made.config["resolved"], "method": {"name": method, **node}}
    config = {**made.config, "bits": bits, "resolved": resolved}
    return replace(made, config=config, details={**made.details, "method": facts})


def mixed(size: float, kl: float, bits: float = 5.2) -> Record:
    """Return a row of mixed bits with `size` bytes on disk and a mean KL of `kl`."""
    nodes = {f"rtn{b}": {"name": "rtn", "bits": b, "group_size": 128} for b in (8, 4)}
    modules = [
        {
            "name": name,
            "block": block,
            "module": kind,
            "kl": 1e-3,
            "weights": 65_536,
            "candidate": f"rtn{b}",
            "bits": b + 0.25,
            "group_size": 128,
        }
        for name, block, kind in matrices()
        for b in [8 if kind.endswith("down_proj") else 4]
    ]
    facts = {
        "allocation": {
            "budget": {"kind": "average_bits", "wanted": 5.5, "reached": bits, "unit": "bits"},
            "candidates": ["rtn8", "rtn4", "unquantized"],
            "modules": modules,
            "predicted_kl": 0.004,
            "solver": {},
            "cost": {},
        }
    }
    return with_kl(made_by("mixed", bits, None, facts, candidates=nodes), size, kl)


def with_kl(record: Record, size: float, kl: float, spread: float = 0.05) -> Record:
    """Return `record` with `size` bytes on disk and a mean KL of `kl` over eight windows."""
    drawn = [spread * (-1) ** place for place in range(8)]
    samples = tuple(kl * (1 + x) for x in drawn)
    return changed(
        changed(record, "artefact_bytes", value=size), "kl_mean", value=kl, samples=samples
    )


def trained(kind: str = "qat", bits: float = 3, perplexity: float = 7.0) -> Record:
    """Return a trained row of that perplexity."""
    facts = {
        "training": {
            "kind": kind,
            "engine": "own",
            "steps": 200,
            "batch": 8,
            "seq_len": 128,
            "tokens_seen": 204_800,
            "learning_rate": 1e-3,
            "seconds": 61.5,
            "resumed_at": [100],
            "curve": [[step, 3.0 / (1 + step / 50)] for step in range(0, 201, 5)],
            "equality": {"difference": 1e-6, "tolerance": 1e-5},
        }
    }
    return changed(made_by(kind, bits, 128, facts), "perplexity", value=perplexity, samples=())


def pruned(stored: str = "bitmap") -> Record:
    """Return a pruned row of 8 bits."""
    kept = 6.85 if stored == "bitmap" else 8.25
    facts = {
        "pruning": {
            "pattern": "unstructured",
            "amount": 0.3,
            "zeros": 0.3001,
            "stored": stored,
            "bits_per_weight_dense": 8.25,
            "bits_per_weight": kept,
        }
    }
    then = {"name": "rtn", "bits": 8, "group_size": 128}
    return made_by("prune_quant", 8, 128, facts, amount=None, store=stored, then=then)


def distilled() -> Record:
    """Return a student of half the layers, quantized to 8 bits."""
    facts = {
        "distillation": {
            "teacher_parameters": 3_000_000,
            "student_parameters": 1_900_000,
            "layers": [0, 3],
            "loss_before": 4.1,
            "loss_after": 2.2,
        }
    }
    return made_by(
        "distill_quant", 8, 128, facts, then={"name": "rtn", "bits": 8, "group_size": 128}
    )


def calibrated(observer: str, samples: int, text: str) -> Record:
    """Return a row of int8_static calibrated in that way."""
    calibration = {"samples": samples, "seq_len": 128, "seed": 0}
    made = made_by("int8_static", 8, None, {}, observer=observer, calibration=calibration)
    shown = {**calibration, "text": text, "digest": f"digest of {text}"}
    return replace(
        made,
        cell=f"int8_static-{observer}-{samples}-{text}",
        details={**made.details, "calibration": shown},
    )


def encoder(method: str, bits: float | None, size: float, cosine: float) -> Record:
    """Return a row of an encoder: no perplexity, embeddings and a latency."""
    values = (
        Value("size", "artefact_bytes", "stored", size, "B", False),
        Value("embedding", "embedding_cosine", "sentences_64", cosine, "cosine", True),
        Value("embedding", "similarity_rank_agreement", "sentences_64", cosine**2, "rank", True),
        Value("latency", "latency_seconds", "batch1_length64", 0.004, "s", False),
    )
    made = made_by(method, bits, None, {})
    config = {**made.config, "model": "minilm"}
    return replace(made, cell=f"minilm-{method}", config=config, values=values)


def every_kind() -> list[Record]:
    """Return a sweep with everything in it."""
    return [
        *Synthetic().grid(),
        *(mixed(2.9e6, 0.002), trained(), trained("lsq", 3, 6.6), trained("bitnet", 2, 9.0)),
        *(pruned(), replace(pruned("dense"), cell="pruned-dense"), distilled()),
        *(
            calibrated(observer, samples, text)
            for observer in ("minmax", "mse")
            for samples in (128, 512)
            for text in ("world", "source code")
        ),
        *(encoder("fp32", 32, 9e7, 1.0), encoder("int8_dynamic", 8, 4.6e7, 0.993)),
        *(encoder("rtn", 4, 3.4e7, 0.96),),
        sensitivity_record(sensitivity(), sensitivity("rtn 3 bits g128", all_kl=0.2)),
        *(deploy_record(), replace(deploy_record(False), cell="deploy-2"), search_record()),
    ]
