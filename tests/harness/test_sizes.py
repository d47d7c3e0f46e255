"""Sizes by arithmetic are the sizes of real artefacts, for every architecture and kind of scope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file

from harness import sizes
from harness.load import meta_model
from harness.record import read_record
from kernels.errors import ConfigError
from methods.artefact import WEIGHTS
from methods.base import Method
from methods.onnx_int4 import OnnxInt4
from methods.onnx_int8 import OnnxInt8Dynamic
from methods.onnx_unquantized import OnnxUnquantized
from methods.rtn import RTN
from methods.unquantized import Unquantized
from tests.architectures import CONFIGS, tiny

CONF = Path(__file__).resolve().parents[2] / "conf"

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


@pytest.mark.parametrize(
    ("method", "bytes_each"),
    [
        (OnnxUnquantized("onnx_fp32", "float32"), 4),
        (OnnxUnquantized("onnx_fp16", "float16"), 2),
        (OnnxInt8Dynamic("onnx_int8_dynamic"), 4),
        (OnnxInt4("onnx_int4", group_size=32), 4),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_an_onnx_graph_does_not_quantize_is_in_the_type_it_computes_in(
    method: Method, bytes_each: int
) -> None:
    found = sizes.compute(on_meta("llama", "bfloat16"), method)
    assert found.part_bytes["embedding"] == found.part_bytes["head"] == bytes_each * 320 * 32


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


def published(name: str, **changed: int) -> Any:
    """The architecture of a choice of `model` on the meta device, with values of it changed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        source = instantiate(compose("config", overrides=[f"model={name}"]).model)
    return meta_model({**source.architecture(), **changed})


@pytest.mark.parametrize(
    ("method", "gigabytes"),
    [
        (METHODS["fp16"], 13.215),
        (RTN("rtn", 8, -1, symmetric=True), 6.742),
        (RTN("rtn", 4, 128, symmetric=True), 3.602),
        (RTN("rtn", 4, 64, symmetric=True), 3.703),
        (RTN("rtn", 4, 32, symmetric=True), 3.906),
        (RTN("rtn", 2, 64, symmetric=True), 2.084),
    ],
)
def test_decoding_llama_7b_reads_its_matrices_its_head_and_one_row(
    method: Method, gigabytes: float
) -> None:
    # 6,476,005,376 weights of linear maps at 16, 8, 4 or 2 bits and 16 a scale, a head of
    # 4096 x 32000 in FP16, norms and one row of 4096.
    found = sizes.compute(published("llama-7b"), method)
    rest = 2 * (4096 * 32000 + 65 * 4096 + 4096)
    assert found.read_bytes == found.part_bytes["quantized"] + rest
    assert found.read_bytes / 1e9 == pytest.approx(gigabytes, abs=0.001)


def test_decoding_mixtral_reads_two_of_eight_experts() -> None:
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    expert = 3 * 4096 * 14336
    rest = 4096 * 32000 + 65 * 4096 + 4096
    router = 8 * 4096
    found = sizes.compute(published("mixtral-8x7b"), METHODS["fp16"])
    assert found.read_bytes == 2 * (32 * (attention + 2 * expert + router) + rest)
    # Experts that a method leaves as they are count the same.
    kept = RTN("rtn", 8, -1, symmetric=True, keep=("*.experts.*",))
    left = sizes.compute(published("mixtral-8x7b"), kept)
    scales = 2 * 2 * (4096 + 1024)
    assert left.read_bytes == 32 * (attention + scales) + 2 * (32 * (2 * expert + router) + rest)


def test_a_head_that_is_the_embedding_is_read_whole_and_positions_by_one_row() -> None:
    found = sizes.compute(published("gpt2"), METHODS["fp16"])
    assert found.read_bytes == found.total_bytes - 2 * 1023 * 768
    # A head with a copy of its own is read, and of the embedding one row.
    own = RTN("rtn", 8, -1, head=True, symmetric=True)
    apart = sizes.compute(published("gpt2"), own)
    parts = apart.part_bytes
    assert parts["head"] == 50257 * (768 + 2)
    assert apart.read_bytes == apart.total_bytes - 4 * (1023 + 50256) * 768
    # A quantized embedding unties the head, which stays as it was.
    untied = sizes.compute(published("gpt2"), RTN("rtn", 8, -1, embeddings=True, symmetric=True))
    assert untied.part_bytes["head"] == 4 * 50257 * 768
    assert untied.read_bytes == untied.total_bytes - 4 * 1023 * 768 - 50256 * (768 + 2)


REFUSED = {
    "llama-7b": {"checkpoint", "mixed", "server"},
    "gpt2": {
        *("checkpoint", "mixed", "server", "awq", "auto_awq", "auto_gptq", "auto_round", "fp8"),
        *("fp8_static", "smoothquant", "torchao_int8", "w8a8", "w8a8_static"),
    },
    "mixtral-8x7b": {
        *("checkpoint", "mixed", "server", "awq", "auto_awq", "auto_gptq", "auto_round", "gptq"),
        *("fp8", "fp8_static", "smoothquant", "w8a8", "w8a8_static", "gguf", "gguf_imatrix"),
        *("gguf_server", "onnx_fp16", "onnx_fp32", "onnx_int4", "onnx_int8_dynamic"),
        "onnx_int8_static",
    },
}
"""What a method cannot store at all, or not by arithmetic: each says so in a sentence."""


def test_every_method_has_a_size_for_the_real_architectures_or_says_why_not() -> None:
    names = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    given = [f"+method@all.{name}={name}" for name in names]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[*given, "all.server.url=http://127.0.0.1:1"])
    methods = {name: instantiate(config["all"][name]) for name in names}
    for model, refused in REFUSED.items():
        short = {"n_layer": 2} if model == "gpt2" else {"num_hidden_layers": 2}
        shape = published(model, **short)
        for name, method in methods.items():
            if name in refused:
                with pytest.raises(ConfigError, match=r"choose|use|another|can are") as said:
                    sizes.compute(shape, method)
                assert "\n" not in str(said.value), (model, name)
                continue
            found = sizes.compute(shape, method)
            assert 1 < found.bits_per_weight <= 32, (model, name)
            assert 0 < found.read_bytes < found.total_bytes, (model, name)


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
    assert found["read_bytes_per_token"] == found["computed_bytes"] - 2 * 319 * 32
    assert record.details["model"]["parameters"] == 2 * 320 * 32 + 2 * 9216 + 5 * 32
    coverage = record.details["coverage"]
    assert coverage["total_weights"] == record.details["model"]["parameters"]
