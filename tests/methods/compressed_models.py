"""What the tests of the compressed-tensors methods share: models, and rounding written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from methods.base import Calibration, Matrix
from methods.int8_static import has_integer_kernel
from tests.architectures import logits_of, tiny, tiny_ids

CALIBRATION = Calibration(samples=4, seq_len=32, seed=0)
INT8_EXECUTION = "packed" if has_integer_kernel() else "dequantized"
Rounding = Callable[[Tensor], Tensor]


def calibration_text() -> Tensor:
    return tiny_ids(4, 32)


def half(kind: str) -> Any:
    """Return a tiny model whose values float16 holds exactly, as its checkpoint is stored."""
    model = tiny(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    model.config.dtype = torch.float16
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return tensors


def symmetric_int8(x: Tensor, largest: Tensor) -> Tensor:
    """Round `x` to the grid -128..127 times largest / 127.5."""
    scale = largest / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def fp8(x: Tensor, largest: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Round `x` by PyTorch's own cast, `largest` becoming the type's largest value."""
    end = torch.finfo(dtype).max
    scale = largest / end
    return (x / scale).clamp(-end, end).to(dtype).float() * scale


def by_row(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


@torch.no_grad()
def largest_inputs(model: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the largest magnitude that each linear map reads in the calibration text."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            seen[name] = torch.maximum(inputs[0].abs().max(), seen.get(name, torch.tensor(0.0)))

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    for sample in calibration_text():
        model(input_ids=sample[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def plain_logits(
    model: Any,
    matrices: Sequence[Matrix],
    weights: Rounding,
    inputs: dict[str, Rounding] | None,
) -> Tensor:
    """Return the logits of `tiny_ids` with weights and inputs of `matrices` rounded, in float."""
    for matrix in matrices:
        linear = model.get_submodule(matrix.name)
        linear.weight.copy_(weights(linear.weight))
        if inputs is not None:
            own = inputs[matrix.name]
            linear.register_forward_pre_hook(lambda m, args, own=own: (own(args[0]),))
    return logits_of(model, tiny_ids())


@torch.no_grad()
def difference(logits: Tensor, expected: Tensor) -> float:
    """Return the root mean square difference over that of `expected`."""
    return float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
