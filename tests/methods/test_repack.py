"""GPTQ and AWQ checkpoints repacked: equal bit for bit, run by our kernels, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from harness.load import meta_model
from kernels.errors import ConfigError
from kernels.reference import dequantize_packed
from methods.awq import AWQ
from methods.base import Matrix
from methods.checkpoint import Checkpoint
from methods.export import pack_words
from methods.gptq import GPTQ
from methods.gptq_format import Integers, Scheme, decode_awq, decode_gptq, read_gptq, scheme_of
from methods.gptqmodel_engine import load, load_dequantized
from methods.linear import QuantizedModule
from methods.packed import compare_paths, load_engine
from methods.repack import OrderedLinear, build, module_of, repack
from tests.architectures import write_checkpoint
from tests.methods.gptq_models import (
    CALIBRATION,
    WEIGHTS,
    calibration_text,
    parts_of,
    quantized,
    stored_bits,
)
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
OUT, WIDTH, GROUP = 32, 64, 16
MATRIX = Matrix("layer", "block", OUT, WIDTH)
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32},
    "act_order": {"bits": 3, "group_size": 16, "symmetric": True, "act_order": True},
    "awq": {"group_size": 32},
}
TOLERANCE = 0.05


def method(name: str, **options: Any) -> GPTQ | AWQ:
    kind = AWQ if name == "awq" else GPTQ
    return kind(**{"name": name, "calibration": CALIBRATION, **METHODS[name], **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return name of METHODS -> checkpoint as GPTQModel writes it."""
    folders = {}
    for name in METHODS:
        folders[name] = tmp_path_factory.mktemp(name) / "checkpoint"
        quantized(method(name), "llama", folders[name])
    return folders


def weight_of(module: QuantizedModule) -> Tensor:
    """Return the dequantized weight, its columns in the order of the inputs."""
    layout = module.layout
    packed, scale, zero_point = module.stored()
    weight = dequantize_packed(
        packed, scale, zero_point, layout.bits, layout.group_size, layout.in_features
    )
    if isinstance(module, OrderedLinear):
        weight[:, module.order.long()] = weight.clone()
    return weight


def drawn(bits: int, version: str, act_order: bool) -> dict[str, Tensor]:
    """Return the tensors of a matrix in GPTQ format, with zero points of every size."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT, WIDTH), generator=generator)
    least = 1 if version == "gptq" else 0
    zeros = torch.randint(least, 2**bits, (WIDTH // GROUP, OUT), generator=generator)
    zeros[0, 0], zeros[0, 1] = least, 2**bits - 1
    groups = torch.arange(WIDTH, dtype=torch.int32) // GROUP
    order = torch.randperm(WIDTH, generator=generator) if act_order else torch.arange(WIDTH)
    return {
        "qweight": pack_words(codes, bits).T.contiguous(),
        "qzeros": pack_words(zeros - least, bits),
        "scales": torch.rand((WIDTH // GROUP, OUT), generator=generator).half() + 0.01,
        "g_idx": groups[order],
    }


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_equal_bit_for_bit(bits: int, version: str, act_order: bool) -> None:
    parts = drawn(bits, version, act_order)
    scheme = Scheme("gptq", version, bits, GROUP, False, act_order, ("gptqmodel",))
    module = module_of(MATRIX, read_gptq(parts, version), scheme, None)
    assert torch.equal(weight_of(module), decode_gptq(parts, version))
    assert isinstance(module, OrderedLinear) == act_order
    assert (module.layout.bits, module.layout.group_size) == (bits, GROUP)
    assert module.layout.scale_dtype == "float16"


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_the_library_is_repacked_without_loss(
    name: str, made: dict[str, Path], tmp_path: Path
) -> None:
    found = repack(made[name], tmp_path / "ours")
    scheme = scheme_of(made[name])
    ours: Any = load_engine(tmp_path / "ours", Machine(), packed=False, build=build)
    decode = decode_awq if name == "awq" else decode_gptq
    for matrix in found:
        expected = decode(parts_of(made[name], matrix.name), scheme.version)
        assert torch.equal(weight_of(ours.model.get_submodule(matrix.name)), expected)
    ids = calibration_text()[:2]
    theirs = load_dequantized(made[name], Machine())
    if name != "act_order":  # there the sums are of another order
        assert torch.equal(ours.prefill(ids)[0], theirs.prefill(ids)[0])
    compare_paths(ours, theirs, ids, 1e-5)
    engine = load_engine(tmp_path / "ours", Machine(), build=build)
    compare_paths(engine, load(made[name], Machine()), ids, TOLERANCE)
    layers = {use.layer for use in engine.kernels()}
    assert layers == {"OrderedLinear" if name == "act_order" else "QuantizedLinear"}
    if name == "act_order":
        assert all("inputs gathered in group order" in use.kernel for use in engine.kernels())
    stored = load_file(made[name] / WEIGHTS)
    kept = load_file(tmp_path / "ours" / WEIGHTS)
    for part in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(kept[part], stored[part])
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text())


@pytest.mark.parametrize("name", METHODS)
def test_the_option_stores_and_runs_it_here(name: str, tmp_path: Path) -> None:
    chosen = method(name, kernel="quantbench")
    chosen.check(Machine())
    report = quantized(chosen, "llama", tmp_path / "artefact")
    assert report.stored_bits == stored_bits(tmp_path / "artefact", report)
    assert "repacked without loss" in report.notes[-1]
    engine = chosen.load(tmp_path / "artefact", Machine())
    decoded = chosen.load_dequantized(tmp_path / "artefact", Machine())
    compare_paths(engine, decoded, calibration_text()[:2], chosen.path_tolerance)
    assert {use.name for use in engine.kernels()} == {m.name for m in report.quantized}
    # GPTQModel's classes are nowhere.
    assert {type(m).__module__.split(".")[0] for m in engine.model.modules()}.isdisjoint(
        {"gptqmodel"}
    )
    assert not list(tmp_path.glob(".artefact*"))


@pytest.mark.parametrize("name", METHODS)
def test_a_ready_made_checkpoint_is_adopted_and_run_here(
    name: str, made: dict[str, Path], tmp_path: Path
) -> None:
    chosen = Checkpoint("checkpoint", kernel="quantbench")
    config = json.loads((made[name] / "config.json").read_text())
    (tmp_path / "into").mkdir()
    report = chosen.adopt(made[name], meta_model(config), tmp_path / "into")
    bits, size = METHODS[name].get("bits", 4), METHODS[name]["group_size"]
    assert (report.bits, report.group_size) == (bits, size)
    assert report.stored_bits == stored_bits(tmp_path / "into", report)
    assert len(report.quantized) == 14
    engine = chosen.load(tmp_path / "into", Machine())
    decoded = chosen.load_dequantized(tmp_path / "into", Machine())
    compare_paths(engine, decoded, calibration_text()[:2], TOLERANCE)
    theirs = load(made[name], Machine())
    compare_paths(engine, theirs, calibration_text()[:2], TOLERANCE)


def test_other_checkpoints_are_not_repacked(made: dict[str, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    stated = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    text = json.dumps({**config, "quantization_config": stated})
    (tmp_path / "float" / "config.json").write_text(text)
    chosen = Checkpoint("checkpoint", kernel="quantbench")
    with pytest.raises(ConfigError, match="runs checkpoints of gptq and awq, and this"):
        chosen.adopt(tmp_path / "float", meta_model(config), tmp_path / "into")
    foreign = tmp_path / "foreign"
    shutil.copytree(made["gptq"], foreign)
    whole = json.loads((foreign / "config.json").read_text())
    stated = whole["quantization_config"]
    stated["meta"], stated["format"], stated["checkpoint_format"] = {}, "gptq", "gptq"
    (foreign / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="foreign is asymmetric in version 1"):
        repack(foreign, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_matrices_without_a_layout_here_are_refused() -> None:
    parts = drawn(4, "gptq_v2", act_order=False)
    scheme = Scheme("gptq", "gptq_v2", 4, GROUP, False, False)
    uneven = {**parts, "g_idx": (torch.arange(WIDTH, dtype=torch.int32) // 24)}
    with pytest.raises(ConfigError, match="layer has groups of 16 and 24 inputs"):
        module_of(MATRIX, read_gptq(uneven, "gptq_v2"), scheme, None)
    found = read_gptq({**parts, "scales": parts["scales"].double()}, "gptq_v2")
    with pytest.raises(ConfigError, match="has scales in float64"):
        module_of(MATRIX, found, scheme, None)


def test_zero_points_that_are_not_the_middle_are_kept_whatever_the_config_says() -> None:
    parts = drawn(4, "gptq_v2", act_order=False)
    scheme = Scheme("gptq", "gptq_v2", 4, GROUP, True, False)
    module = module_of(MATRIX, read_gptq(parts, "gptq_v2"), scheme, None)
    assert not module.layout.symmetric
    found = read_gptq(parts, "gptq_v2")
    middle = Integers(
        4, found.codes, found.scale, torch.full_like(found.zero_point, 8), found.groups
    )
    assert module_of(MATRIX, middle, scheme, None).layout.symmetric


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_bad_options_are_one_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match="it must be one of library, quantbench"):
        method(name, kernel="ours")
    with pytest.raises(ConfigError, match="is a kernel of GPTQModel, and"):
        method(name, kernel="quantbench", backend="torch")
    chosen = method(name, kernel="quantbench")
    with pytest.raises(ConfigError, match="'float16' on a CPU, where it is emulated"):
        chosen.check(Machine(compute_dtype="float16"))
    with pytest.raises(ConfigError, match="it must be one of library, quantbench"):
        Checkpoint("checkpoint", kernel="ours")


def test_the_yaml_has_the_option() -> None:
    axes = {"bits": 4, "group_size": 128, "seed": 0}
    for name in ("gptq", "awq", "checkpoint"):
        node = OmegaConf.load(CONF / f"{name}.yaml")
        config = OmegaConf.create({**axes, "method": node})
        assert instantiate(config.method).kernel == "library"
        config.method.kernel = "quantbench"
        assert instantiate(config.method).kernel == "quantbench"
