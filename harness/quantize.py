"""First child of a cell: load the model, quantize it, and publish the artefact."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from torch import Tensor

from harness.artefacts import Manifest, file_facts, publish, training_state
from harness.cache import Cache
from harness.device import device_of
from harness.encoder_text import frame
from harness.hardware import Hardware
from harness.launch import Stage
from harness.load import load_model, load_tokenizer, meta_model, model_facts
from harness.memory import peak_bytes
from harness.models import ModelSource, unquantized
from harness.temporary import remove, temporary_beside
from kernels.errors import ConfigError
from methods.base import AdoptingMethod, Method, QuantizeReport, TrainingMethod
from methods.encoders import is_encoder

NOT_TIMED = "quantize_seconds not measured: other cells ran on the device meanwhile"


def main(job: dict[str, Any], stage: Stage) -> None:
    """Make the artefact of `job["method"]` in folder `job["artefact"]`."""
    method: Method = instantiate(job["method"])
    hardware: Hardware = instantiate(job["config"]["hardware"])
    method.check(hardware)
    artefact = Path(job["artefact"])
    temporary = temporary_beside(artefact)
    temporary.mkdir(parents=True)
    try:
        with device_of(hardware.device).shared(stage) as alone:
            if isinstance(method, AdoptingMethod):
                made = _adopted(method, job, temporary, stage)
            else:
                made = _quantized(method, job, temporary, stage)
            timed = made.seconds is not None and alone()
        if made.tokenizer is not None:
            made.tokenizer.save_pretrained(temporary)
        report = made.report
        manifest = Manifest(
            files=file_facts(temporary),
            method=method.name,
            bits=method.bits if report.bits is None else report.bits,
            group_size=method.group_size if report.group_size is None else report.group_size,
            matrices=[asdict(matrix) for matrix in report.quantized],
            stored_bits=report.stored_bits,
            left_out=[list(entry) for entry in report.left_out],
            notes=[*report.notes, *([] if timed or made.seconds is None else [NOT_TIMED])],
            quantize_seconds=made.seconds if timed else None,
            quantize_peak_bytes=(
                None if made.seconds is None else peak_bytes() - job["resident_at_start"]
            ),
            model=made.facts,
            calibration=made.shown,
            unquantized=report.unquantized,
            details=dict(report.details),
        )
        publish(temporary, artefact, manifest)
        shutil.rmtree(training_state(artefact), ignore_errors=True)
    finally:
        remove(temporary)


@dataclass(frozen=True)
class Made:
    """What a manifest says of the written files: see `harness.artefacts.Manifest`."""

    report: QuantizeReport
    tokenizer: Any
    facts: dict[str, Any]
    shown: dict[str, Any] | None
    seconds: float | None


def _quantized(method: Method, job: dict[str, Any], into: Path, stage: Stage) -> Made:
    """Quantize the unquantized model into the folder `into`."""
    config = job["config"]
    stage("loading the model")
    model, tokenizer = load_model(unquantized(instantiate(config["model"])))
    facts = model_facts(model)
    cache = Path(job["cache"])
    calibration, shown = _calibration(method, config, tokenizer, cache, is_encoder(model))
    if calibration is not None and calibration.shape[1] > facts["context_length"]:
        raise ConfigError(
            f"method.calibration.seq_len is {calibration.shape[1]}, but model "
            f"{config['model']['name']} reads at most {facts['context_length']} tokens"
        )
    stage("quantizing")
    start = time.perf_counter()
    if isinstance(method, TrainingMethod) and calibration is not None:
        state = training_state(Path(job["artefact"]))
        state.mkdir(exist_ok=True)
        report = method.train(model, tokenizer, calibration, into, state, stage)
    else:
        report = method.quantize(model, tokenizer, calibration, into)
    return Made(report, tokenizer, facts, shown, time.perf_counter() - start)


def _adopted(method: AdoptingMethod, job: dict[str, Any], into: Path, stage: Stage) -> Made:
    """Take the checkpoint as it is into the folder `into`; nothing is quantized, nothing timed."""
    stage("taking the checkpoint")
    source: ModelSource = instantiate(job["config"]["model"])
    checkpoint = source.checkpoint() if method.takes_weights else source.tokenizer_folder()
    if checkpoint is None:
        raise ConfigError(f"model {source.name} is a bare shape; this method needs files")
    model = meta_model(source.architecture())
    report = method.adopt(checkpoint, model, into)
    return Made(report, _tokenizer(source, into), model_facts(model), None, None)


def _tokenizer(source: ModelSource, into: Path) -> Any:
    """Return the tokenizer of a checkpoint: beside it, its original's, or what adopting made."""
    tokenizer = load_tokenizer(source.tokenizer_folder() or into)
    if tokenizer is None:
        raise ConfigError(
            f"model {source.name} has no tokenizer that can be read; name the model it was made "
            "from with model.reference=FOLDER or OWNER/NAME"
        )
    return tokenizer


def _calibration(
    method: Method, config: dict[str, Any], tokenizer: Any, cache: Path, encoder: bool
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Return int64 [samples, seq_len] and what the record says; None for both if not needed.

    An `encoder` is shown crops between its tokenizer's special tokens.
    """
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
    tokens = frame(tokens, tokenizer) if encoder else tokens
    shown = {
        **asdict(settings),
        "digest": source.calibration_digest(),
        "text": source.calibration_name,
    }
    return tokens, shown
