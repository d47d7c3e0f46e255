"""Loading checkpoints in GPTQ and AWQ format with GPTQModel, and saying which kernel runs them.

Any such folder: made here, by AutoGPTQ, AutoAWQ or auto-round, or found on the hub. What runs a
matrix is read off the class that GPTQModel (7.6.0, its source) put in its place:

- CPU, 4 bits, groups of 32, 64 or 128: `aten::_weight_int4pack_mm_for_cpu` reads packed weights.
  It takes bfloat16 activations: others are converted to it and the result back.
- CPU, anything else: the weights are converted at each call, and torch multiplies.
- CUDA: what GPTQModel's own choice, or option `backend`, gives.

On a CPU the class is chosen here, since GPTQModel's automatic choice takes classes that fail:
TorchFusedLinear ignores zero points, and TorchAtenLinear takes groups of 16, which its kernel does
not. `load_dequantized` runs none of this: it decodes the weights itself (`methods.gptq_format`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods.base import Execution, Hardware, KernelUse, Matrix
from methods.engine import TorchEngine
from methods.gptq_format import (
    PARTS,
    Scheme,
    decode_awq,
    decode_gptq,
    matrices,
    scheme_of,
    tensor_names,
)
from methods.library import check_covered, put_linear, require, uses_of
from methods.options import refuse_emulated

__all__ = ["BACKENDS", "PATH_TOLERANCE", "check", "load", "load_dequantized", "matrices"]

BACKENDS = ("auto", "torch", "exllama_v2", "marlin")
CPU_BACKENDS = ("auto", "torch")
PACKED_GROUPS = (32, 64, 128)
"""Group sizes for which a CPU has a kernel that reads packed 4-bit weights."""

FEWEST_WORKERS = 2

PATH_TOLERANCE = 0.05
"""Largest difference between the logits of GPTQModel's kernels and of the weights decoded here, for
`methods.packed.compare_paths`: 0.003 to 0.01 for kernels in bfloat16, below 0.001 for weights
converted in float16. Turned zero points of one matrix of a small model give 0.13 and more."""

COMPUTED = ".rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints hold, and models compute."""

DECODED = "decoded once by methods.gptq_format + torch.matmul"

# Class -> (kernel, how it runs), read in the source of GPTQModel 7.6.0.
KERNELS: Mapping[str, tuple[str, Execution]] = {
    "TorchAtenLinear": ("aten::_weight_int4pack_mm_for_cpu in bfloat16", "packed"),
    "TorchAtenAwqLinear": ("aten::_weight_int4pack_mm_for_cpu in bfloat16", "packed"),
    "TorchLinear": ("dequantize in {scales} + torch.matmul in {activations}", "dequantized"),
    "AwqTorchLinear": ("dequantize + torch.matmul in {half}", "dequantized"),
    "MarlinLinear": ("gptq_marlin_gemm", "packed"),
    "AwqMarlinLinear": ("gptq_marlin_gemm", "packed"),
    "MacheteLinear": ("machete_mm", "packed"),
    "AwqMacheteLinear": ("machete_mm", "packed"),
    "ExllamaV2Linear": ("exllamav2 gemm_half_q_half in float16", "packed"),
    "AwqExllamaV2Linear": ("exllamav2 gemm_half_q_half in float16", "packed"),
    "AwqGEMMLinear": ("awq gemm (above 1024 rows: dequantize + torch.matmul)", "packed"),
    "TritonV2Linear": ("triton dequantize + torch.matmul", "dequantized"),
}


def has_packed_kernel(bits: int, group_size: int) -> bool:
    """Whether a CPU kernel reads the packed weights of this scheme."""
    return bits == 4 and group_size in PACKED_GROUPS


def check(
    owner: str,
    hardware: Hardware,
    backend: str,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
) -> None:
    """Raise ConfigError where GPTQModel has no kernel for this scheme on this hardware.

    `owner` names the method; the scheme is that of the checkpoint, as far as it is known.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"method.backend of {owner} is {backend!r}; it must be one of {', '.join(BACKENDS)}"
        )
    dtype = hardware.compute_dtype
    if hardware.device == "cpu":
        if backend not in CPU_BACKENDS:
            raise ConfigError(
                f"method.backend={backend} of {owner} is a CUDA kernel, and hardware.device is "
                f"'cpu'; there it must be one of {', '.join(CPU_BACKENDS)}"
            )
        refuse_emulated(hardware)
        packed = backend == "auto" and has_packed_kernel(bits, group_size)
        if not packed and not hardware.allow_fallback:
            raise ConfigError(
                f"on a CPU GPTQModel has a packed kernel for 4 bits with group_size "
                f"{', '.join(map(str, PACKED_GROUPS))} and backend=auto alone, not for {bits} bits "
                f"with group_size {group_size} and backend={backend}; with "
                "hardware.allow_fallback=true the weights are converted at each call"
            )
        return
    if dtype == "float32":
        raise ConfigError(
            "hardware.compute_dtype is 'float32'; GPTQModel's CUDA kernels take 'float16' or "
            "'bfloat16'"
        )
    if backend == "torch" and not hardware.allow_fallback:
        raise ConfigError(
            "method.backend=torch converts the weights at each call, which "
            "hardware.allow_fallback=false forbids; choose backend=auto"
        )
    if backend == "marlin" and owner == "gptq" and (bits not in (4, 8) or not symmetric):
        raise ConfigError("method.backend=marlin takes 4 or 8 bits with symmetric=true")
    if backend == "exllama_v2" and bits != 4:
        raise ConfigError(f"method.backend=exllama_v2 takes 4 bits, not {bits}")


@contextmanager
def library() -> Iterator[None]:
    """Import GPTQModel with as many workers as this process has threads, its warnings unheard."""
    # Unset, it starts workers for cores that are not ours, and they starve; 1 it does not take.
    workers = max(FEWEST_WORKERS, torch.get_num_threads())
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(workers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(folder: Path, hardware: Hardware, backend: str = "auto") -> TorchEngine:
    """Load the GPTQ or AWQ checkpoint in `folder` with GPTQModel.

    Activations, and all that is not quantized, are in `hardware.compute_dtype`.

    Raises:
        ConfigError: GPTQModel is missing, has no kernel for it here, or cannot read it.
    """
    scheme = _readable_scheme(folder)
    require("gptqmodel", f"a {scheme.kind} checkpoint")
    check(scheme.kind, hardware, backend, scheme.bits, scheme.group_size, scheme.symmetric)
    found = matrices(folder)
    compute = getattr(torch, hardware.compute_dtype)
    # Scales are stored in float16; only a CUDA kernel wants them in the type of the activations.
    model = _load_with_library(
        folder,
        hardware.device,
        _library_backend(scheme, hardware.device, backend),
        torch.float16 if hardware.device == "cpu" else compute,
    )
    check_covered("GPTQModel's loader", found, _quantized_modules(model))
    _restore_floats(model, folder, found, compute, hardware.device)
    uses = [_use(model, matrix, hardware) for matrix in found]
    return TorchEngine(model.eval().requires_grad_(False), hardware.device, uses)


def _readable_scheme(folder: Path) -> Scheme:
    scheme = scheme_of(folder)
    if scheme.zeros_in_doubt:
        raise ConfigError(
            f"{folder.name} is asymmetric in version 1 of the GPTQ format, whose zero points are "
            "sure only where GPTQModel wrote them; use a symmetric one, or one in format gptq_v2"
        )
    return scheme


def _library_backend(scheme: Scheme, device: str, backend: str) -> str:
    """Return GPTQModel's name of the backend."""
    if backend == "auto" and device != "cpu":
        return "auto"
    if backend == "auto":
        packed = has_packed_kernel(scheme.bits, scheme.group_size)
        backend = "torch_aten" if packed else "torch"
    return f"{scheme.kind}_{backend}"


def _load_with_library(folder: Path, device: str, backend: str, dtype: torch.dtype) -> Any:
    with library():
        from gptqmodel import GPTQModel
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        try:
            loaded: Any = GPTQModel.load(str(folder), device=device, backend=backend, dtype=dtype)
        except (ValueError, NotImplementedError, OSError) as error:
            raise ConfigError(f"GPTQModel cannot load {folder.name}: {_sentence(error)}") from error
    unused = getattr(loaded.quantize_config, "_offload_temp_dir", None)
    if unused is not None:
        # Left alone it is removed with a warning, at any time.
        unused.cleanup()
    for module in loaded.model.modules():
        if isinstance(module, TorchLinear):
            # torch.compile would compile for each module anew, give up after eight, and needs a
            # compiler; without it all calls are alike.
            module.__dict__.pop("dequantize_weight", None)
    return loaded.model


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _quantized_modules(model: Any) -> list[str]:
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    return [name for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)]


def _restore_floats(
    model: Any, folder: Path, found: list[Matrix], dtype: torch.dtype, device: str
) -> None:
    """Read what is not quantized once more from the files: the library rounded it to 16 bits."""
    inside = {matrix.name for matrix in found}
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for path, name in tensor_names(folder):
        if name.rpartition(".")[0] in inside or name.endswith(COMPUTED):
            continue
        if name not in own:
            raise ConfigError(f"{folder.name} holds a tensor that its model lacks: {name}")
        with safe_open(path, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        if tensor.is_floating_point():
            own[name].data = tensor.to(device=device, dtype=dtype)


def _use(model: Any, matrix: Matrix, hardware: Hardware) -> KernelUse:
    """Return what runs `matrix`, by the class that stands in its place."""
    layer = type(model.get_submodule(matrix.name)).__name__
    if layer not in KERNELS:
        raise ConfigError(
            f"GPTQModel chose {layer}, of which it is not known here how it runs; set "
            f"method.backend to one of {', '.join(BACKENDS[1:])}"
        )
    kernel, execution = KERNELS[layer]
    if execution == "dequantized" and not hardware.allow_fallback:
        raise ConfigError(
            f"GPTQModel runs {matrix.name} by {layer}, which converts its weights at each call; "
            "hardware.allow_fallback=false forbids it"
        )
    dtype = hardware.compute_dtype
    half = "float16" if dtype == "float32" else dtype
    scales = "float16" if hardware.device == "cpu" else dtype
    kernel = kernel.format(activations=dtype, half=half, scales=scales)
    return KernelUse(matrix.name, layer, kernel, execution, matrix.weights)


def read_checkpoint(
    folder: Path, dtype: torch.dtype | None = None
) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """Return the model in `folder` without its quantized matrices, and their tensors, as stored.

    The model's other floating tensors are in `dtype`, by default as stored.

    Raises:
        ConfigError: the zero points are in doubt, or the files hold another model's tensors.
    """
    _readable_scheme(folder)
    model = artefacts.skeleton(folder)
    owners = {matrix.name for matrix in matrices(folder)}
    parts: dict[str, dict[str, Tensor]] = {}
    floats: dict[str, Tensor] = {}
    for path, name in tensor_names(folder):
        owner, _, part = name.rpartition(".")
        with safe_open(path, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        if owner in owners and part in (*PARTS, "bias"):
            parts.setdefault(owner, {})[part] = tensor
        elif not name.endswith(COMPUTED):
            floats[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    unknown = model.load_state_dict(floats, strict=False, assign=True).unexpected_keys
    if unknown:
        raise ConfigError(f"{folder.name} holds a tensor that its model lacks: {unknown[0]}")
    strange = sorted(owners - {name for name, _ in model.named_modules()})
    if strange:
        raise ConfigError(
            f"{folder.name} holds a matrix that its model lacks (experts stored one by "
            f"one, perhaps): {strange[0]}"
        )
    return model, parts


def complete(model: Any, folder: Path) -> None:
    """Tie what the model ties, and raise ConfigError where `folder` had no tensor for a parameter.

    Called when the quantized matrices have been put in.
    """
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ConfigError(f"{folder.name} lacks the tensors {', '.join(missing[:3])}")


def load_dequantized(folder: Path, hardware: Hardware) -> TorchEngine:
    """Load the checkpoint with its weights decoded here, straight from the stored tensors.

    Raises:
        ConfigError: the checkpoint's version of the format is not one that is decoded here.
    """
    scheme, found = _readable_scheme(folder), matrices(folder)
    decode = decode_gptq if scheme.kind == "gptq" else decode_awq
    dtype = getattr(torch, hardware.compute_dtype)
    model, parts = read_checkpoint(folder, dtype)
    for matrix in found:
        stored = parts.pop(matrix.name)
        bias = stored.get("bias")
        weight = decode(stored, scheme.version).to(dtype)
        put_linear(model, matrix, weight, None if bias is None else bias.to(dtype))
    complete(model, folder)
    model = model.eval().requires_grad_(False).to(hardware.device)
    return TorchEngine(model, hardware.device, uses_of(model, found, DECODED, "dequantized"))
