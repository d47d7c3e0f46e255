"""Between the two children, once per model, text and suite: the unquantized model's own outputs.

Runs what the suite's measures want to compare with (`Comparing.prepare`) on the model as loaded, in
the reference's floating type, and leaves it in the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from harness.cache import Cache
from harness.context import Comparing, Context, Measure, reference_model_key
from harness.hardware import Hardware
from harness.launch import Stage
from harness.load import load_model
from harness.models import unquantized
from harness.record import write_atomically
from methods.engine import TorchEngine
from methods.unquantized import DTYPES


def main(job: dict[str, Any], stage: Stage) -> None:
    """Prepare every measure of the suite, then leave the marker `job["marker"]`."""
    config = job["config"]
    hardware: Hardware = instantiate(config["hardware"])
    stage("loading the reference")
    model, tokenizer = load_model(unquantized(instantiate(config["model"])))
    model = model.to(hardware.device, DTYPES[config["reference_dtype"]])
    engine = TorchEngine(model, hardware.device, [])
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
    for name, node in config["suite"]["measures"].items():
        measure: Measure = instantiate(node)
        if not isinstance(measure, Comparing) or (context.random_weights and measure.quality):
            continue
        stage(f"reference: {name}")
        measure.prepare(engine, context)
    marker = Path(job["marker"])
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(marker, b"done\n")
