"""FP8 in E5M2, unknown to compressed-tensors 0.19 and llm-compressor: rounded and stored here.

PyTorch's cast to `torch.float8_e5m2` rounds (to nearest, ties to even); a scale is max|x| / 57344:
of a row for weights, of a token or of all calibration text for activations. The container is that
of `methods/artefact.py`: `weight` float8_e5m2 [out, in], `scale` float32 [out], `input_scale`
float32 [1] where it is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from methods import artefact as artefacts
from methods.artefact import dtype_name, stored_bias
from methods.base import Hardware, KernelUse, Matrix
from methods.compressed_layers import Activations, Fp8Linear, token_scale
from methods.engine import TorchEngine
from methods.layers import replace, weight_of
from methods.library import put_linear, uses_of
from methods.observers import MinMax, observe_inputs

E5M2 = torch.float8_e5m2
LARGEST = torch.finfo(E5M2).max
PLAIN = "aten::linear on decompressed float weights"


def write(
    model: Any,
    matrices: Sequence[Matrix],
    activations: Activations,
    calibration: Tensor | None,
    into: Path,
) -> None:
    """Round `matrices` of `model` (float32, changed in place) and write folder `into`.

    `calibration`, int64 [samples, seq_len], is read by the float model for static activations.
    """
    observers = {matrix.name: MinMax() for matrix in matrices}
    if activations == "static":
        assert calibration is not None
        observe_inputs(model, calibration, observers)
    layers: dict[str, artefacts.Facts] = {}
    for matrix in matrices:
        weight = weight_of(model, matrix)
        scale = token_scale(weight, LARGEST)
        fixed = None
        if activations == "static":
            fixed = token_scale(torch.tensor(observers[matrix.name].range()), LARGEST)
        bias = stored_bias(model, matrix)
        codes = _rounded(weight, scale)
        replace(model, matrix, Fp8Linear(codes, scale, activations, fixed, bias))
        layers[matrix.name] = {
            "out_features": matrix.out_features,
            "in_features": matrix.in_features,
            "activations": activations,
            "bias": dtype_name(bias),
        }
    artefacts.save(model, into, layers)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp_(-LARGEST, LARGEST).to(E5M2)


def _empty(name: str, facts: artefacts.Facts) -> nn.Module:
    out_features, in_features = facts["out_features"], facts["in_features"]
    with torch.device("meta"):
        return Fp8Linear(
            torch.empty(out_features, in_features, dtype=E5M2),
            torch.empty(out_features),
            facts["activations"],
            torch.empty(1) if facts["activations"] == "static" else None,
            torch.empty(out_features) if facts["bias"] is not None else None,
        )


def load(artefact: Path, hardware: Hardware) -> TorchEngine:
    """Load the stored bytes, which are converted at each call."""
    dtype = getattr(torch, hardware.compute_dtype)
    model = artefacts.load(artefact, _empty, dtype, hardware.device)
    uses: list[KernelUse] = []
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            module.prepare(name, hardware)
            uses.append(module.use(name))
    return TorchEngine(model, hardware.device, uses)


def load_dequantized(artefact: Path, hardware: Hardware) -> TorchEngine:
    """Load into plain `nn.Linear` by PyTorch's own casts, in float32 whatever `hardware` says."""
    model = artefacts.load(artefact, _empty, torch.float32, hardware.device)
    stored = {n: m for n, m in model.named_modules() if isinstance(m, Fp8Linear)}
    matrices = [Matrix(n, "block", *m.weight.shape) for n, m in stored.items()]
    for matrix in matrices:
        layer = stored[matrix.name]
        weight = layer.weight.float() * layer.scale[:, None]
        put_linear(model, matrix, weight, None if layer.bias is None else layer.bias.float())
        if layer.activations != "none":
            plain = model.get_submodule(matrix.name)
            plain.register_forward_pre_hook(_rounding(layer.input_scale))
    uses = uses_of(model, matrices, PLAIN, "simulated")
    return TorchEngine(model, hardware.device, uses)


def _rounding(fixed: Tensor | None) -> Callable[[nn.Module, Any], Tensor]:
    def hook(module: nn.Module, inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        scale = x.abs().amax(-1, keepdim=True) / LARGEST if fixed is None else fixed
        return _rounded(x, scale).float() * scale

    return hook
