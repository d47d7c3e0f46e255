"""An encoder's cell, stage by stage: quantized, compared with, loaded again, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from harness import measure, quantize, reference
from harness.record import read_record
from tests.encoders import write_encoder
from tests.harness.measures.test_encoder_measures import TEXT

CONF = Path(__file__).resolve().parents[2] / "conf"


def job_of(folder: Path, suite: str, measures: tuple[str, ...]) -> dict[str, Any]:
    overrides = ["model=local", f"model.path={folder / 'model'}", "method=int8_static"]
    overrides += ["method.calibration.samples=2", "method.calibration.seq_len=24"]
    overrides += ["data.source=text", f"data.path={folder / 'text.txt'}", "hardware.threads=1"]
    overrides += ["data.calibration=embedded", "hardware.allow_fallback=true", f"suite={suite}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides)
    nodes = {key: composed[key] for key in composed if key not in ("job", "data")}
    config: Any = OmegaConf.to_container(OmegaConf.create(nodes), resolve=True)
    config["data"] = OmegaConf.to_container(composed.data.text, resolve=True)
    chosen = config["suite"]["measures"]
    config["suite"]["measures"] = {name: chosen[name] for name in measures}
    return {
        "config": config,
        "method": config["method"],
        "cell": "a-cell",
        "folder": str(folder / suite),
        "cache": str(folder / "cache"),
        "artefact": str(folder / "artefact"),
        "baseline_artefact": None,
        "model_key": "a model",
        "model_identity": {},
        "random_weights": False,
        "has_reference": True,
        "marker": str(folder / f"{suite}.done"),
        "summary": {},
        "resident_at_start": 0,
    }


def test_an_encoder_goes_the_way_of_every_model(tmp_path: Path) -> None:
    write_encoder(tmp_path / "model", "bert_masked", "cls_token")
    (tmp_path / "text.txt").write_text(TEXT)
    job = job_of(tmp_path, "encoder", ("size", "memory", "embedding", "masked", "paths"))
    job["config"]["suite"]["measures"]["memory"]["depth"] = 32
    said: list[str] = []
    quantize.main(job, said.append)
    reference.main(job, said.append)
    measure.main(job, said.append)
    record = read_record(tmp_path / "encoder")
    assert record.errors == ()
    assert record.status == "ok"
    found = {value.metric: value.value for value in record.values}
    assert 0.9 < found["embedding_cosine"] < 1
    assert 0 < found["masked_kl"] < 0.5
    assert found["path_difference_hidden"] <= 0.2
    parts = ("quantized_bytes", "head_bytes", "embedding_bytes", "other_bytes")
    assert sum(found[part] for part in parts) == found["artefact_bytes"]
    assert record.details["coverage"]["quantized_weights"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)

    # What only causal models can answer is said, and breaks nothing.
    other = ("perplexity", "divergence", "generation", "speed", "paths", "loading")
    job = job_of(tmp_path, "smoke", other)
    reference.main(job, said.append)
    measure.main(job, said.append)
    record = read_record(tmp_path / "smoke")
    assert (record.status, record.errors) == ("ok", ())
    notes = [note for note in record.details["notes"] if "not measured" in note]
    assert len(notes) == 5
    assert "divergence not measured: the engine (pytorch) cannot give logits" in notes
    assert "first_embedding_seconds" in {value.metric for value in record.values}
