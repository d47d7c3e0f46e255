"""Reading GPTQ and AWQ checkpoints: our decoding against packing by hand, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.errors import ConfigError
from methods import gptqmodel_engine as engine
from methods.base import Matrix
from methods.gptq import GPTQ
from methods.gptq_format import (
    AWQ_ORDER,
    Scheme,
    decode_awq,
    decode_gptq,
    matrices,
    scheme_of,
    unpack,
)
from methods.packed import compare_paths
from tests.methods.gptq_models import CALIBRATION, WEIGHTS, calibration_text, quantized
from tests.methods.machine import Machine

BITS = (2, 3, 4, 8)
OUT, WIDTH, GROUP = 32, 64, 16


def pack_by_hand(codes: Tensor, bits: int) -> Tensor:
    """Return int32 words [rows, n * bits / 32] of codes [rows, n], one bit at a time."""
    rows, count = codes.shape
    words = [[0] * (count * bits // 32) for _ in range(rows)]
    for row in range(rows):
        for index in range(count):
            for bit in range(bits):
                place = index * bits + bit
                if int(codes[row, index]) >> bit & 1:
                    words[row][place // 32] |= 1 << place % 32
    signed = [[word - (1 << 32) if word >> 31 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32)


def drawn(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [out, in], zero points [groups, out] and scales [groups, out]."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT, WIDTH), generator=generator)
    zeros = torch.randint(0, 2**bits, (WIDTH // GROUP, OUT), generator=generator)
    zeros[0, 0] = 0
    scales = torch.rand((WIDTH // GROUP, OUT), generator=generator).half() + 0.01
    return codes, zeros, scales


def expected(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """Return the weight [out, in], element by element."""
    weight = torch.empty(OUT, WIDTH)
    for row in range(OUT):
        for column in range(WIDTH):
            group = int(groups[column])
            level = int(codes[row, column]) - int(zeros[group, row])
            weight[row, column] = level * float(scales[group, row])
    return weight


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_against_packing_by_hand(bits: int) -> None:
    codes, _, _ = drawn(bits)
    assert torch.equal(unpack(pack_by_hand(codes, bits), bits), codes)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_gptq_decoded(bits: int, version: str) -> None:
    """Version 1 subtracts 1 from each zero point; with one of 0 among them a word borrows."""
    codes, zeros, scales = drawn(bits)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
    groups = (torch.arange(WIDTH) // GROUP)[order].int()
    words = pack_by_hand(zeros, bits)
    if version == "gptq" and bits == 3:
        words = pack_by_hand((zeros - 1) % 8, bits)
    elif version == "gptq":
        words = words - sum(1 << shift for shift in range(0, 32, bits))
    parts = {
        "qweight": pack_by_hand(codes, bits).T.contiguous(),
        "qzeros": words.int(),
        "scales": scales,
        "g_idx": groups,
    }
    assert torch.equal(decode_gptq(parts, version), expected(codes, zeros, scales, groups))
    del parts["g_idx"]
    plain = torch.arange(WIDTH) // GROUP
    assert torch.equal(decode_gptq(parts, version), expected(codes, zeros, scales, plain))


def test_awq_decoded() -> None:
    codes, zeros, scales = drawn(4)
    parts = {"scales": scales}
    for name, values in (("qweight", codes.T), ("qzeros", zeros)):
        eights = values.reshape(values.shape[0], -1, 8)[..., list(AWQ_ORDER)]
        parts[name] = pack_by_hand(eights.flatten(1), 4)
    groups = torch.arange(WIDTH) // GROUP
    assert torch.equal(decode_awq(parts, "gemm"), expected(codes, zeros, scales, groups))


@pytest.mark.parametrize("decode", [decode_gptq, decode_awq])
def test_other_versions_are_not_decoded(decode: Any) -> None:
    with pytest.raises(ConfigError, match="'gemv' are not decoded here"):
        decode({}, "gemv")


@pytest.mark.parametrize(
    ("name", "stated", "scheme"),
    [
        (
            "config.json",
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
            Scheme("gptq", "gptq", 4, 128, True, True),
        ),
        (
            "config.json",
            {
                "quant_method": "awq",
                "bits": 4,
                "group_size": 64,
                "zero_point": True,
                "version": "GEMM",
            },
            Scheme("awq", "gemm", 4, 64, False, False),
        ),
        (
            "quantize_config.json",
            {"bits": 3, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
            Scheme("gptq", "gptq_v2", 3, -1, False, False),
        ),
        (
            "quant_config.json",
            {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
            Scheme("awq", "gemm", 4, 128, False, False),
        ),
    ],
)
def test_schemes_as_other_tools_write_them(
    name: str, stated: dict[str, Any], scheme: Scheme, tmp_path: Path
) -> None:
    """AutoGPTQ, AutoAWQ (new and old), GPTQModel."""
    (tmp_path / "config.json").write_text("{}")
    whole = {"quantization_config": stated} if name == "config.json" else stated
    (tmp_path / name).write_text(json.dumps(whole))
    assert scheme_of(tmp_path) == scheme


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        (None, "says nowhere how it is quantized"),
        ({"quant_method": "bitsandbytes"}, "quantized as 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 4}, "does not say 'group_size'"),
    ],
)
def test_other_checkpoints_are_refused(stated: Any, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated}))
    with pytest.raises(ConfigError, match=sentence):
        scheme_of(tmp_path)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_matrices_are_read_from_the_files(kind: str, tmp_path: Path) -> None:
    stated = {"quant_method": kind, "bits": 4, "group_size": GROUP}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated}))
    with pytest.raises(ConfigError, match="no safetensors file with quantized matrices"):
        matrices(tmp_path)
    shape = (WIDTH * 4 // 32, OUT) if kind == "gptq" else (WIDTH, OUT * 4 // 32)
    for number, name in enumerate(("lm_head", "model.layers.0.up_proj")):
        tensors = {
            f"{name}.qweight": torch.zeros(shape, dtype=torch.int32),
            f"{name}.scales": torch.zeros(WIDTH // GROUP, OUT),
            f"other.{number}.weight": torch.zeros(2, 2),
        }
        save_file(tensors, tmp_path / f"model-{number}.safetensors")
    assert matrices(tmp_path) == [
        Matrix("lm_head", "head", OUT, WIDTH),
        Matrix("model.layers.0.up_proj", "block", OUT, WIDTH),
    ]


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an asymmetric artefact with 4 bits in groups of 16."""
    folder = tmp_path_factory.mktemp("sixteen") / "artefact"
    quantized(GPTQ("gptq", CALIBRATION, 4, 16), "llama", folder)
    return folder


def test_groups_that_the_packed_kernel_refuses_are_converted(sixteen: Path) -> None:
    """GPTQModel's own choice is a class that fails at the first token."""
    loaded = engine.load(sixteen, Machine())
    assert {(use.layer, use.execution) for use in loaded.kernels()} == {
        ("TorchLinear", "dequantized")
    }
    decoded = engine.load_dequantized(sixteen, Machine())
    compare_paths(loaded, decoded, calibration_text()[:2], 0.002)
    with pytest.raises(ConfigError, match="group_size 16 and backend=auto"):
        engine.load(sixteen, Machine(allow_fallback=False))


def test_the_library_runs_eagerly(sixteen: Path) -> None:
    """torch.compile would need a compiler at the first token."""
    model: Any = engine.load(sixteen, Machine()).model
    layer = model.model.layers[0].mlp.up_proj
    assert "dequantize_weight" not in vars(layer)


def test_zero_points_that_are_in_doubt_are_refused(sixteen: Path, tmp_path: Path) -> None:
    """AutoGPTQ's asymmetric version 1 packed a zero point of 0 over its neighbours."""
    foreign = tmp_path / "foreign"
    shutil.copytree(sixteen, foreign)
    config = json.loads((foreign / "config.json").read_text())
    stated = config["quantization_config"]
    stated["meta"], stated["format"], stated["checkpoint_format"] = {}, "gptq", "gptq"
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "quantize_config.json").write_text(json.dumps(stated))
    for load in (engine.load, engine.load_dequantized):
        with pytest.raises(ConfigError, match="foreign is asymmetric in version 1"):
            load(foreign, Machine())


def test_a_class_of_which_nothing_is_known_is_refused(
    sixteen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "KERNELS", {})
    with pytest.raises(ConfigError, match="chose TorchLinear, of which it is not known"):
        engine.load(sixteen, Machine())


@pytest.mark.parametrize("missing", [True, False])
def test_files_of_another_model_are_refused(sixteen: Path, tmp_path: Path, missing: bool) -> None:
    other = tmp_path / "other"
    shutil.copytree(sixteen, other)
    tensors = load_file(other / WEIGHTS)
    if missing:
        del tensors["lm_head.weight"]
    else:
        tensors["model.strange.weight"] = torch.zeros(2)
    save_file(tensors, other / WEIGHTS)
    sentence = "lacks the tensors lm_head" if missing else "tensor that its model lacks: model.str"
    with pytest.raises(ConfigError, match=sentence):
        engine.load_dequantized(other, Machine())


def test_tensors_that_models_compute_are_passed_over(sixteen: Path, tmp_path: Path) -> None:
    """Checkpoints of the first Llamas hold the frequencies of their rotary embedding."""
    other = tmp_path / "other"
    shutil.copytree(sixteen, other)
    tensors = load_file(other / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, other / WEIGHTS, {"format": "pt"})
    loaded = engine.load(other, Machine())
    decoded = engine.load_dequantized(other, Machine())
    compare_paths(loaded, decoded, calibration_text()[:2], 0.002)


def test_only_what_uses_the_library_imports_it() -> None:
    code = "import sys, methods.gptq, methods.awq; assert 'gptqmodel' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
