"""The record of `job=sensitivity`, and what it refuses before a model is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from harness import sensitivity
from harness.planning import plan_cell
from harness.record import Record, read_record
from harness.sensitivity import Mixes, Options
from harness.shape_model import ShapeModel
from kernels.errors import ConfigError
from methods.rtn import RTN
from methods.unquantized import Unquantized
from tests.architectures import write_checkpoint

CONF = Path(__file__).resolve().parents[2] / "conf"

OPTIONS = {"bits": None, "mixes": 4, "calibration": {"samples": 3, "seq_len": 16, "seed": 0}}


def job_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return what the child is told; `changes` are options of the job or of the method."""
    options = {key: changes.pop(key) for key in list(changes) if key in OPTIONS}
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return {
        "cell": "cell",
        "folder": str(folder / "cell"),
        "cache": str(folder / "cache"),
        "summary": {"model": "m", "job": "sensitivity"},
        "model_identity": {},
        "random_weights": False,
        "config": {
            "job": {"options": {**copy.deepcopy(OPTIONS), **options}},
            "model": {
                "_target_": "harness.models.LocalModel",
                "name": "local",
                "path": str(folder / "model"),
            },
            "method": {
                "_target_": "methods.rtn.RTN",
                "name": "rtn",
                "bits": 3,
                "group_size": 16,
                **changes,
            },
            "hardware": {"_target_": "harness.hardware.Hardware", "name": "cpu", "device": "cpu"},
            "data": {
                "_target_": "harness.data.TextFile",
                "name": "text",
                "text": "text",
                "path": str(text),
                "calibration": str(text),
            },
        },
    }


def record_of(folder: Path, **changes: Any) -> Record:
    write_checkpoint(folder / "model", "llama_tied")
    job = job_of(folder, **changes)
    sensitivity.main(job, lambda text: None)
    return read_record(folder / "cell")


def figures(record: Record) -> dict[tuple[str, str], float]:
    return {(value.metric, value.protocol): value.value for value in record.values}


def test_the_record_of_one_scheme(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    assert record.status == "ok"
    assert record.config["bits"] == 3
    (table,) = record.details["sensitivity"]
    assert table["scheme"] == "rtn 3 bits g16"
    assert table["tokens"] == 3 * 15
    assert [entry["block"] for entry in table["modules"]] == [0] * 7 + [1] * 7
    first = table["modules"][0]
    assert (first["name"], first["module"]) == (
        "model.layers.0.self_attn.q_proj",
        "self_attn.q_proj",
    )
    assert first["weights"] == 32 * 32
    assert first["bits_per_weight"] == 3 + (16 + 3) / 16
    assert table["sum_kl"] == pytest.approx(sum(entry["kl"] for entry in table["modules"]))
    assert table["noise_floor_kl"] == 0
    prediction = table["prediction"]
    assert prediction["mixes"] == len(prediction["predicted"]) == len(prediction["measured"]) == 4
    # A matrix is in the scheme or untouched, so no mix is all of them.
    assert max(prediction["predicted"]) < table["sum_kl"]
    name = f"calibration_{table['text']}_3x16"
    found = figures(record)
    assert found["all_kl", f"{name} rtn 3 bits g16"] == table["all_kl"] > 0
    assert found["rank_correlation", name] == prediction["rank_correlation"]
    assert record.details["calibration"]["text"] == table["text"]
    (whole,) = [value for value in record.values if value.metric == "all_kl"]
    assert len(whole.samples) == 3
    assert whole.value == pytest.approx(sum(whole.samples) / 3)


def test_the_record_of_several_schemes(tmp_path: Path) -> None:
    record = record_of(tmp_path, bits=[4, 2, 4], mixes=0, head=True, embeddings=True)
    assert record.config["bits"] is None
    four, two = record.details["sensitivity"]
    assert [table["scheme"] for table in (four, two)] == ["rtn 4 bits g16", "rtn 2 bits g16"]
    assert four["all_kl"] < two["all_kl"]
    assert four["prediction"] is None
    ends = [(entry["name"], entry["module"], entry["block"]) for entry in two["modules"][14:]]
    assert ends == [
        ("model.embed_tokens", "model.embed_tokens", None),
        ("lm_head", "lm_head", None),
    ]
    assert "rank_correlation" not in {value.metric for value in record.values}
    assert two["cost"] == four["cost"]
    assert two["cost"]["candidates"] == 2 * 16


def test_a_mix_of_several_schemes_leaves_nothing_untouched(tmp_path: Path) -> None:
    record = record_of(tmp_path, bits=[8, 2], mixes=5)
    eight, two = record.details["sensitivity"]
    assert eight["prediction"] == two["prediction"]
    predicted = eight["prediction"]["predicted"]
    assert eight["sum_kl"] <= min(predicted) < max(predicted) <= two["sum_kl"]


def test_a_rank_correlation_needs_something_to_rank() -> None:
    assert Mixes([1.0, 2.0, 3.0], [10.0, 20.0, 15.0]).rank_correlation == pytest.approx(0.5)
    constant = Mixes([1.0, 1.0], [10.0, 20.0]).rank_correlation
    assert constant != constant


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"calibration": {"samples": 0, "seq_len": 8, "seed": 0}}, "samples is 0; it must be 1 or"),
        ({"calibration": {"samples": 1, "seq_len": 1, "seed": 0}}, "the first is not scored"),
        ({"mixes": -1}, r"job.options.mixes is -1; it must be 0 \(none\), or 2 or more to rank"),
        ({"mixes": 1}, "job.options.mixes is 1"),
        ({"bits": 4}, "job.options.bits is 4; it must be null or a list"),
        ({"bits": []}, r"job.options.bits is \[\]"),
    ],
)
def test_options_that_cannot_work(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Options.of({**OPTIONS, **changes})


def test_methods_that_cannot_quantize_single_matrices() -> None:
    whole = Unquantized("fp16", "float16")
    with pytest.raises(ConfigError, match="method fp16 quantizes the model as a whole"):
        sensitivity._methods(whole, None)
    with pytest.raises(ConfigError, match="rounds weights alone"):
        sensitivity._methods(RTN("rtn", 4, 32, activation_bits=8), None)
    with pytest.raises(ConfigError, match="bits"):
        sensitivity._methods(RTN("rtn", 4, 32), [5])


@pytest.mark.parametrize(
    ("length", "sentence"),
    [(65, "reads at most 64"), (64, "has 5 tokens, less than one window of 64")],
)
def test_a_text_or_a_context_too_short(tmp_path: Path, length: int, sentence: str) -> None:
    write_checkpoint(tmp_path / "model")
    job = job_of(tmp_path, calibration={"samples": 1, "seq_len": length, "seed": 0})
    Path(job["config"]["data"]["path"]).write_text("a cat")
    with pytest.raises(ConfigError, match=sentence):
        sensitivity.main(job, lambda text: None)


def test_random_weights_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    job = {**job_of(tmp_path), "random_weights": True}
    with pytest.raises(ConfigError, match="the weights of model model are random"):
        sensitivity.main(job, lambda text: None)


def test_the_calibration_text_is_part_of_the_cell(tmp_path: Path) -> None:
    keys = set()
    for text in ("one", "another"):
        file = tmp_path / f"{text}.txt"
        file.write_text(text)
        overrides = ["job=sensitivity", f"data.calibration={file}", f"runs_dir={tmp_path}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides)
        keys.add(plan_cell(config, overrides).key)
    assert len(keys) == 2


def test_an_encoder_is_refused() -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    source = ShapeModel("shape", config=config)
    with pytest.raises(ConfigError, match="model shape is an encoder"):
        sensitivity._check_model(source, False)
