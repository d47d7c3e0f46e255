"""Sizes by arithmetic are the sizes of real artefacts, for every architecture and kind of scope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import sizes
from harness.load import meta_model
from harness.record import read_record
from kernels.errors import ConfigError
from methods.artefact import WEIGHTS
from methods.base import Method
from methods.rtn import RTN
from methods.unquantized import Unquantized
from tests.architectures import CONFIGS, tiny

METHODS: dict[str, Method] = {
    "fp32": Unquantized("fp32", "float32"),
    "fp16": Unquantized("fp16", "float16"),
    "rtn4": RTN("rtn", 4, 32),
    "rtn3": RTN("rtn", 3, 16),
    "rtn2_per_channel": RTN("rtn", 2, -1, symmetric=True),
    "rtn4_ends": RTN("rtn", 4, 32, head=True, embeddings=True),
    "rtn4_kept": RTN("rtn", 4, 32, keep=("*.0.*",)),
}


def artefact_bytes(folder: Path) -> int:
    return sum(t.numel() * t.element_size() for t in load_file(folder / WEIGHTS).values())


def on_meta(kind: str, dtype: str) -> Any:
    return meta_model({**CONFIGS[kind], "dtype": dtype})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mixtral"])
def test_computed_bytes_are_the_bytes_of_the_artefacts_tensors(
    kind: str, method: str, tmp_path: Path
) -> None:
    model = tiny(kind)
    model.config.dtype = torch.bfloat16
    computed = sizes.compute(on_meta(kind, "bfloat16"), METHODS[method])
    report = METHODS[method].quantize(model, None, None, tmp_path)
    assert computed.total_bytes == artefact_bytes(tmp_path)
    assert computed.quantized_bits == report.stored_bits
    assert list(computed.quantized) == list(report.quantized)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "qwen2"])
def test_so_are_those_of_architectures_with_biases(kind: str, tmp_path: Path) -> None:
    computed = sizes.compute(on_meta(kind, "float32"), METHODS["fp16"])
    METHODS["fp16"].quantize(tiny(kind), None, None, tmp_path)
    assert computed.total_bytes == artefact_bytes(tmp_path)


def test_the_parts_add_up_and_are_what_they_are_called() -> None:
    embedding, blocks, norms = 320 * 32, 2 * 9216, 5 * 32
    untied = sizes.compute(on_meta("llama", "float16"), METHODS["rtn4"])
    assert untied.part_bytes["head"] == untied.part_bytes["embedding"] == 2 * embedding
    assert untied.part_bytes["other"] == 2 * norms
    assert untied.quantized_weights == blocks
    assert sum(untied.part_bytes.values()) == untied.total_bytes
    tied = sizes.compute(on_meta("llama_tied", "float16"), METHODS["rtn4"])
    assert (tied.part_bytes["head"], tied.part_bytes["embedding"]) == (0, 2 * embedding)
    kept = sizes.compute(on_meta("llama", "float16"), METHODS["rtn4_kept"])
    assert kept.part_bytes["other"] == 2 * (norms + blocks // 2)
    assert kept.quantized_weights == blocks // 2


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    assert sizes.compute(on_meta("llama", "float16"), METHODS["fp16"]).bits_per_weight == 16
    symmetric = RTN("rtn", 4, 32, symmetric=True)
    # Q4_0's arithmetic: 32 weights of 4 bits and one scale of 16.
    assert sizes.compute(on_meta("llama", "float16"), symmetric).bits_per_weight == 4.5


def test_a_width_that_no_group_divides_is_refused_without_weights() -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj.*width 32"):
        sizes.compute(on_meta("llama", "float16"), RTN("rtn", 4, 128))


def test_a_70b_model_is_computed_in_memory_of_no_size() -> None:
    config = {
        **CONFIGS["llama"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "dtype": "float16",
    }
    computed = sizes.compute(meta_model(config), Unquantized("fp16", "float16"))
    assert computed.total_bytes == 2 * 68_976_648_192


def test_the_child_writes_a_record(tmp_path: Path) -> None:
    config = {**CONFIGS["llama"], "dtype": "float16"}
    job = {
        "cell": "cell",
        "folder": str(tmp_path),
        "summary": {"model": "m"},
        "model_identity": {"kind": "architecture", "sha256": "0"},
        "config": {
            "model": {"_target_": "harness.shape_model.ShapeModel", "name": "m", "config": config},
            "method": {"_target_": "methods.rtn.RTN", "name": "rtn", "bits": 4, "group_size": 32},
            "hardware": {"_target_": "harness.hardware.Hardware", "name": "cpu", "device": "cpu"},
        },
    }
    stages: list[str] = []
    sizes.main(job, stages.append)
    record = read_record(tmp_path)
    assert record.status == "ok"
    assert stages == ["computing sizes"]
    found = {value.metric: value.value for value in record.values}
    assert {value.protocol for value in record.values} == {"computed"}
    parts = ("quantized_bytes", "head_bytes", "embedding_bytes", "other_bytes")
    assert found["computed_bytes"] == sum(found[part] for part in parts)
    assert found["computed_bits_per_weight"] == pytest.approx(4.625)
    assert record.details["model"]["parameters"] == 2 * 320 * 32 + 2 * 9216 + 5 * 32
    coverage = record.details["coverage"]
    assert coverage["total_weights"] == record.details["model"]["parameters"]
