"""Packed against dequantized: they agree on sound artefacts, and a broken kernel is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cpu import PanelLinear
from kernels.decode_step import DecodeStep
from methods.packed import PATH_TOLERANCE, PathDisagreementError, compare_paths
from methods.rtn import RTN
from tests.architectures import tiny, tiny_ids
from tests.methods.machine import Machine


def artefact(method: RTN, folder: Path, kind: str = "llama") -> Path:
    method.quantize(tiny(kind), None, None, folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(8, -1), (8, 32), (4, 32), (4, -1), (3, 32), (2, -1)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_paths_agree(kind: str, bits: int, group_size: int, dtype: str, tmp_path: Path) -> None:
    method = RTN("rtn", bits, group_size)
    artefact(method, tmp_path, kind)
    machine = Machine(compute_dtype=dtype)
    packed, plain = method.load(tmp_path, machine), method.load_dequantized(tmp_path, machine)
    assert {use.execution for use in plain.kernels()} == {"dequantized"}
    found = compare_paths(packed, plain, tiny_ids(), method.path_tolerance)
    assert found.tolerance == PATH_TOLERANCE
    assert any(use.execution == "packed" for use in packed.kernels())
    assert found.prefill > 0
    assert found.decode > 0


def swapped_nibbles(weight: Tensor) -> Tensor:
    return (weight << 4) | (weight >> 4)


def shifted_rows(weight: Tensor) -> Tensor:
    return weight.roll(1, 0)


@pytest.mark.parametrize("damage", [swapped_nibbles, shifted_rows])
def test_a_kernel_that_reads_another_layout_is_caught(
    damage: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    method = RTN("rtn", 4, 32)
    artefact(method, tmp_path)
    packed, plain = method.load(tmp_path, Machine()), method.load_dequantized(tmp_path, Machine())
    for module in packed.model.modules():  # type: ignore[attr-defined]
        if isinstance(module, PanelLinear):
            module.weight.copy_(damage(module.weight))
    with pytest.raises(PathDisagreementError, match="prefill: logits of the packed and the deq"):
        compare_paths(packed, plain, tiny_ids(), method.path_tolerance)


@pytest.mark.parametrize("value", [float("nan"), 3.0])
def test_a_fault_of_decode_alone_is_caught(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = RTN("rtn", 4, 32)
    artefact(method, tmp_path)
    packed, plain = method.load(tmp_path, Machine()), method.load_dequantized(tmp_path, Machine())
    whole, step = PanelLinear.forward, DecodeStep.__call__

    def wrong_for_one_row(self: PanelLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        return whole(self, x, bias) * (value if x.shape[1] == 1 else 1)

    def wrong_step(self: DecodeStep, *given: Any) -> Tensor:
        return step(self, *given) * value

    monkeypatch.setattr(PanelLinear, "forward", wrong_for_one_row)
    monkeypatch.setattr(DecodeStep, "__call__", wrong_step)
    with pytest.raises(PathDisagreementError, match="decode: logits"):
        compare_paths(packed, plain, tiny_ids(), method.path_tolerance)


def test_buffers_are_those_of_the_kernels_and_small(tmp_path: Path) -> None:
    method = RTN("rtn", 4, 32)
    artefact(method, tmp_path)
    engine = method.load(tmp_path, Machine())
    types = {buffer.dtype for buffer in engine.model.state_dict().values()}  # type: ignore[attr-defined]
    assert torch.uint8 in types
    linears = [m for m in engine.model.modules() if isinstance(m, PanelLinear)]  # type: ignore[attr-defined]
    assert len(linears) == 14
    assert sum(m.weight.nbytes for m in linears) * 2 == sum(u.weights for u in engine.kernels())
