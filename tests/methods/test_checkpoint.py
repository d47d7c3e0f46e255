"""A checkpoint that is quantized already is measured as it is, and said to be what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.hardware import Hardware
from harness.load import meta_model
from kernels.errors import ConfigError
from methods.base import AdoptingMethod, Method
from methods.bnb_4bit import Bnb4Bit
from methods.bnb_int8 import BnbInt8
from methods.checkpoint import PATH_TOLERANCE, Checkpoint, scheme_of
from methods.hqq import HQQ
from methods.packed import compare_paths
from methods.w8a8 import W8A8
from tests.architectures import tiny, tiny_ids, write_checkpoint

CPU = Hardware("cpu", "cpu")
METHODS: dict[str, tuple[Callable[[], Method], float, int]] = {
    "bitsandbytes": (lambda: Bnb4Bit("nf4", "nf4", block_size=32), 4.0, 32),
    "bitsandbytes int8": (lambda: BnbInt8("bnb_int8"), 8.0, -1),
    "compressed-tensors": (lambda: W8A8("w8a8"), 8.0, -1),
}
CHECKPOINT = Checkpoint("checkpoint")
HQQ_STATED = {
    "quant_method": "hqq",
    "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32, "axis": 1}},
}


@pytest.fixture(scope="module", params=list(METHODS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return (scheme's name, method, its artefact)."""
    build, bits, size = METHODS[request.param]
    folder = tmp_path_factory.mktemp("made")
    method = build()
    report = method.quantize(tiny("llama_tied"), None, None, folder)
    return request.param.split()[0], bits, size, method, folder, report


def adopt(folder: Path, into: Path) -> Any:
    into.mkdir()
    config = json.loads((folder / "config.json").read_text())
    return CHECKPOINT.adopt(folder, meta_model(config), into)


def test_it_is_what_its_maker_says(made: Any, tmp_path: Path) -> None:
    kind, bits, size, _, folder, wanted = made
    report = adopt(folder, tmp_path / "into")
    assert isinstance(CHECKPOINT, AdoptingMethod)
    assert (scheme_of(folder).kind, report.bits, report.group_size) == (kind, bits, size)
    assert {m.name for m in report.quantized} == {m.name for m in wanted.quantized}
    assert report.stored_bits == wanted.stored_bits
    assert sum(entry[1] for entry in report.left_out) == sum(e[1] for e in wanted.left_out)
    assert "not quantized here" in report.notes[0]


def test_it_computes_what_its_maker_loads(made: Any, tmp_path: Path) -> None:
    method, folder = made[3], made[4]
    adopt(folder, tmp_path / "into")
    expected, _ = method.load(folder, CPU).prefill(tiny_ids())
    engine = CHECKPOINT.load(tmp_path / "into", CPU)
    assert torch.equal(engine.prefill(tiny_ids())[0], expected)
    other = CHECKPOINT.load_dequantized(tmp_path / "into", CPU)
    compare_paths(engine, other, tiny_ids(), PATH_TOLERANCE)


@pytest.mark.parametrize("model", ["llama_tied", "llama", "qwen2"])
def test_an_hqq_checkpoint_is_put_into_our_container(model: str, tmp_path: Path) -> None:
    """With the tensors that transformers 4 wrote: those of hqq's own state dictionary."""
    method = HQQ("hqq", 4, 32)
    wanted = method.quantize(tiny(model), None, None, tmp_path / "made")
    (tmp_path / "made" / "layers.json").unlink()
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    (tmp_path / "made" / "config.json").write_text(
        json.dumps({**config, "quantization_config": HQQ_STATED})
    )
    report = adopt(tmp_path / "made", tmp_path / "into")
    assert (report.bits, report.group_size) == (4.0, 32)
    assert report.stored_bits == wanted.stored_bits
    method.quantize(tiny(model), None, None, tmp_path / "again")
    expected, _ = method.load(tmp_path / "again", CPU).prefill(tiny_ids())
    assert torch.equal(CHECKPOINT.load(tmp_path / "into", CPU).prefill(tiny_ids())[0], expected)
    other = CHECKPOINT.load_dequantized(tmp_path / "into", CPU)
    torch.testing.assert_close(other.prefill(tiny_ids())[0], expected, rtol=1e-3, atol=1e-3)


def test_the_checkpoint_itself_is_not_touched(made: Any, tmp_path: Path) -> None:
    folder = made[4]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adopt(folder, tmp_path / "into")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "float")
    with pytest.raises(ConfigError, match="measures checkpoints that are quantized already"):
        adopt(tmp_path / "float", tmp_path / "a")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    for kind, sentence in (
        ("spqr", "quantized as 'spqr'; method=checkpoint runs gptq, awq, bitsandbytes"),
        ("gptq", "says it is quantized as gptq, but no matrix of its decoder blocks is"),
    ):
        stated = {"quant_method": kind, "bits": 4, "group_size": 32}
        (tmp_path / "float" / "config.json").write_text(
            json.dumps({**config, "quantization_config": stated})
        )
        with pytest.raises(ConfigError, match=sentence):
            adopt(tmp_path / "float", tmp_path / kind)


def test_a_size_by_arithmetic_is_refused() -> None:
    (matrix, *_), _ = CHECKPOINT.select(tiny("llama"))
    with pytest.raises(ConfigError, match="choose another suite"):
        CHECKPOINT.stored_bits(matrix)
