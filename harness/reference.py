"""Between the two children, once per model, text and suite: the unquantized model's own outputs.

Runs what the suite's measures want to compare with (`Comparing.prepare`) on the model as loaded, in
the reference's floating type, and leaves it in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from harness.cache import Cache
from harness.context import Comparing, Context, Measure, reference_model_key
from harness.device import device_of
from harness.hardware import Hardware
from harness.launch import Stage
from harness.load import load_model
from harness.models import unquantized
from harness.record import write_atomically
from methods.encoder_engine import engine_of
from methods.unquantized import DTYPES


def main(job: dict[str, Any], stage: Stage) -> None:
    """Prepare every measure of the suite, then leave the marker `job["marker"]`."""
    config = job["config"]
    hardware: Hardware = instantiate(config["hardware"])
    measures: dict[str, Measure] = {
        name: instantiate(node) for name, node in config["suite"]["measures"].items()
    }
    comparing = {
        name: measure
        for name, measure in measures.items()
        if isinstance(measure, Comparing) and not (job["random_weights"] and measure.quality)
    }
    if comparing:
        with device_of(hardware.device).shared(stage):
            _prepare(comparing, job, hardware, stage)
    marker = Path(job["marker"])
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(marker, b"done\n")


def _prepare(
    comparing: Mapping[str, Comparing], job: dict[str, Any], hardware: Hardware, stage: Stage
) -> None:
    """Load the unquantized model and let each measure keep what it compares with."""
    config = job["config"]
    stage("loading the reference")
    model, tokenizer = load_model(unquantized(instantiate(config["model"])))
    model = model.to(hardware.device, DTYPES[config["reference_dtype"]])
    engine = engine_of(model, hardware.device, [])
    cache = Cache(Path(job["cache"]))
    context = Context(
        tokenizer=tokenizer,
        texts=instantiate(config["data"]).texts(tokenizer, cache),
        hardware=hardware,
        artefact=Path(job["artefact"]),
        cache=cache,
        model_key=reference_model_key(job),
        random_weights=job["random_weights"],
        seed=config["seed"],
    )
    able = {name: one for name, one in comparing.items() if one.needs <= engine.capabilities}
    for name, measure in able.items():
        stage(f"reference: {name}")
        measure.prepare(engine, context)
