"""First child of a cell: load the model, quantize it, and publish the artefact."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from torch import Tensor

from harness.artefacts import Manifest, file_facts, publish
from harness.cache import Cache
from harness.launch import Stage
from harness.load import load_model, model_facts
from harness.memory import peak_bytes
from kernels.errors import ConfigError
from methods.base import Method


def main(job: dict[str, Any], stage: Stage) -> None:
    """Make the artefact of `job["method"]` in folder `job["artefact"]`."""
    config = job["config"]
    method: Method = instantiate(job["method"])
    method.check(instantiate(config["hardware"]))
    stage("loading the model")
    model, tokenizer = load_model(instantiate(config["model"]))
    facts = model_facts(model)
    calibration, shown = _calibration(method, config, tokenizer, Path(job["cache"]))
    if calibration is not None and calibration.shape[1] > facts["context_length"]:
        raise ConfigError(
            f"method.calibration.seq_len is {calibration.shape[1]}, but model "
            f"{config['model']['name']} reads at most {facts['context_length']} tokens"
        )
    stage("quantizing")
    artefact = Path(job["artefact"])
    temporary = artefact.with_name(f".{artefact.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        start = time.perf_counter()
        report = method.quantize(model, tokenizer, calibration, temporary)
        seconds = time.perf_counter() - start
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        manifest = Manifest(
            files=file_facts(temporary),
            method=method.name,
            bits=method.bits,
            group_size=method.group_size,
            matrices=[asdict(matrix) for matrix in report.quantized],
            stored_bits=report.stored_bits,
            left_out=[list(entry) for entry in report.left_out],
            notes=list(report.notes),
            quantize_seconds=seconds,
            quantize_peak_bytes=peak_bytes() - job["resident_at_start"],
            model=facts,
            calibration=shown,
        )
        publish(temporary, artefact, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _calibration(
    method: Method, config: dict[str, Any], tokenizer: Any, cache: Path
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Return int64 [samples, seq_len] and what the record says; None for both if not needed."""
    if not method.needs_calibration:
        return None, None
    if tokenizer is None:
        raise ConfigError(
            f"method {method.name} calibrates on text, but model {config['model']['name']} has no "
            "tokenizer; give one with model.tokenizer=FOLDER"
        )
    settings = method.calibration  # type: ignore[attr-defined]  # methods that need it have it
    source = instantiate(config["data"])
    texts = source.texts(tokenizer, Cache(cache))
    tokens = texts.calibration(settings.samples, settings.seq_len, settings.seed)
    shown = {
        **asdict(settings),
        "digest": source.calibration_digest(),
        "text": source.calibration_name,
    }
    return tokens, shown
