"""What `torchao_int8` and `torchao_int4` share: torchao's one verb, and its int8 checkpoints.

torchao quantizes by `quantize_(model, config)`, which puts a tensor of its own class where a weight
was and, where a shape does not suit it, leaves the weight alone with a line in a log: so what was
covered is checked here.

Checkpoints of `Int8Tensor` are those of transformers' `TorchAoConfig`: a folder that
`AutoModelForCausalLM.from_pretrained` loads, with a `quantization_config` in `config.json` and
safetensors that hold, for a matrix `name`, `name._weight_qdata` int8 [out, in],
`name._weight_scale` float32 [out, 1] and `name._weight_zero_point` int8 [out, 1] (all 0, but
stored), with weight = scale * (qdata - zero_point).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kernels.errors import ConfigError
from methods.base import Hardware, Matrix
from methods.library import check_covered, no_progress_bars, require

PACKAGE = "torchao"
WEIGHTS = "model.safetensors"
QDATA, SCALE, ZERO_POINT = "_weight_qdata", "_weight_scale", "_weight_zero_point"
DTYPES = {
    "cpu": ("float32", "bfloat16"),
    "cuda": ("float32", "bfloat16", "float16"),
}
ACTIVATIONS = ("none", "dynamic")


def check_activations(activations: str) -> None:
    """Raise ConfigError where the option `activations` is not one that torchao's methods know."""
    if activations not in ACTIVATIONS:
        raise ConfigError(
            f"method.activations is {activations!r}; it must be one of {', '.join(ACTIVATIONS)}"
        )


def check_dtype(owner: str, hardware: Hardware) -> None:
    """Raise ConfigError for an activation type that `hardware` only emulates."""
    dtypes = DTYPES[hardware.device]
    if hardware.compute_dtype not in dtypes:
        raise ConfigError(
            f"{owner} computes in {' or '.join(dtypes)} on {hardware.device}, not in "
            f"{hardware.compute_dtype}; set hardware.compute_dtype=float32"
        )


def quantized_weights(model: nn.Module) -> dict[str, Any]:
    """Return module name -> weight of every linear map whose weight is a tensor of torchao's."""
    require(PACKAGE, "the method")
    from torchao.utils import TorchAOBaseTensor

    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, TorchAOBaseTensor)
    }


def quantize(owner: str, model: nn.Module, matrices: Sequence[Matrix], config: Any) -> None:
    """Run torchao's `quantize_` with `config` over exactly `matrices`; `model` is changed in place.

    Raises:
        RuntimeError: torchao left one of them alone.
    """
    require(PACKAGE, owner)
    from torchao.quantization import quantize_

    wanted = {matrix.name for matrix in matrices}
    quantize_(model, config, filter_fn=lambda module, name: name in wanted)
    check_covered(owner, matrices, quantized_weights(model))


def write_folder(model: Any, config: Any, into: Path) -> None:
    """Write `model`, quantized by `config`, as a checkpoint of transformers' TorchAoConfig."""
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    done = quantized_weights(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    settings = TorchAoConfig(config, modules_to_not_convert=sorted(linears - set(done)))
    model.config.quantization_config = settings
    # What from_pretrained attaches when it quantizes: saving asks it for plain tensors.
    model.hf_quantizer = TorchAoHfQuantizer(settings, pre_quantized=True)
    with no_progress_bars():
        model.save_pretrained(into)


def load_folder(owner: str, folder: Path, hardware: Hardware, matrices: Sequence[Matrix]) -> Any:
    """Load such a checkpoint for `hardware`, in eval mode, with torchao's tensors as weights.

    Raises:
        RuntimeError: other weights than those of `matrices` are quantized.
    """
    require(PACKAGE, owner)
    dtype = getattr(torch, hardware.compute_dtype)
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    check_covered(owner, matrices, quantized_weights(model))
    return model.to(hardware.device).eval().requires_grad_(False)


def stored_matrices(folder: Path) -> list[str]:
    """Return the names of the matrices that a checkpoint stores quantized."""
    suffix = f".{QDATA}"
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = file.keys()  # not a dict: it cannot be iterated over itself
    return [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]


def stored_tensors(folder: Path, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (qdata int8 [out, in], scale float32 [out, 1], zero_point int8 [out, 1]) of a matrix.

    Read from the file by name, torchao not asked.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        qdata, scale, zero_point = (
            file.get_tensor(f"{name}.{part}") for part in (QDATA, SCALE, ZERO_POINT)
        )
    return qdata, scale, zero_point
