"""Checkpoints of bitsandbytes: written, loaded, and decoded without bitsandbytes.

A checkpoint is a folder in Hugging Face layout whose `config.json` has a `quantization_config`;
`AutoModelForCausalLM.from_pretrained(folder)` loads it. Beside a linear map's bias it stores

- LLM.int8() (Dettmers et al. 2022): `weight` int8 [out, in], `SCB` float32 [out], the largest
  absolute value of a row; weight = int8 * SCB / 127; and one byte `weight_format`.
- NF4, FP4 (Dettmers et al. 2023, QLoRA): `weight` uint8 [out * in / 2, 1], two codes a byte, the
  first in the high half; `weight.quant_map` float32 [16], the values of the codes;
  `weight.absmax`, the scale of each block of consecutive weights, float32; and JSON facts (shape,
  block size) as the bytes of `weight.quant_state.bitsandbytes__nf4`. With double quantization
  `absmax` is uint8: absmax = nested_quant_map[code] * nested_absmax[block of 256] + nested_offset.

What runs is decided here matrix by matrix, and settled while loading: on a CPU with AVX512_BF16
bitsandbytes packs 4-bit weights anew at their first call.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kernels.errors import ConfigError
from methods.artefact import checkpoint_dtype
from methods.base import Execution, Hardware, Matrix, QuantizeReport
from methods.engine import TorchEngine
from methods.files import opened, whole
from methods.layers import Selection, bias_of, check_finite, replace, weight_of
from methods.library import check_covered, no_progress_bars, put_linear, require, uses_of

PACKAGE = "bitsandbytes"

ROWS_OF_CPU_KERNEL = 32
"""The kernel for AVX512_BF16 takes blocks of so many rows; bitsandbytes asserts it, no more."""

CUBLAS_WIDTH = 4
"""cuBLASLt multiplies INT8 matrices whose width is a multiple of this."""

INT8_LARGEST = 127
FOUR_BIT_PARTS = ("weight.absmax", "weight.quant_map")
LARGEST_BLOCK = 4096
"""Weights that share a scale; bitsandbytes has 32 to 4096."""
STATE = "weight.quant_state.bitsandbytes__"

CPU_4BIT = "bitsandbytes::gemv_4bit (AVX512_BF16)"
CUDA_4BIT = "bitsandbytes::gemm_4bit (CUDA; many rows at once are dequantized)"
DECODED = "decoded once + torch.nn.functional.linear"

Build = Callable[[Tensor], nn.Module]
"""From a floating weight [out, in] to bitsandbytes' linear map, quantized, without a bias."""


def library() -> Any:
    """Return bitsandbytes, imported; raise ConfigError where it is missing.

    It warns of the hub's kernel package, which this project's own name keeps away, and at each
    call of LLM.int8() of a cast to float16, which the engine states instead.
    """
    require(PACKAGE, "the method")
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def write(
    model: Any, into: Path, selection: Selection, settings: dict[str, Any], build: Build
) -> QuantizeReport:
    """Quantize `selection` in `model` (changed in place) and write the checkpoint into `into`.

    Weights are quantized from the checkpoint's own floating type, as bitsandbytes' users have
    them. `settings` are those of transformers' BitsAndBytesConfig.

    Raises:
        ConfigError: a weight or a scale is not finite.
    """
    library()
    from transformers import BitsAndBytesConfig

    linears = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    model.to(checkpoint_dtype(model))
    bits = 0
    for matrix in selection.matrices:
        weight, bias = weight_of(model, matrix), bias_of(model, matrix)
        check_finite(matrix.name, weight)
        linear = build(weight.contiguous())
        parts = linear.state_dict().values()
        for part in parts:
            if part.is_floating_point():
                # LLM.int8() goes through float16, which bfloat16 weights may exceed.
                check_finite(matrix.name, part)
        bits += 8 * sum(part.nbytes for part in parts)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        replace(model, matrix, linear)
    covered = [matrix.name for matrix in selection.matrices]
    model.config.quantization_config = BitsAndBytesConfig(
        **settings, llm_int8_skip_modules=_skipped(linears, covered)
    )
    with no_progress_bars():
        model.save_pretrained(into)
    return QuantizeReport(selection.matrices, bits, selection.left_out)


def _skipped(linears: set[str], covered: Sequence[str]) -> list[str]:
    """Return the names of uncovered maps; transformers reads them as beginnings of names."""
    return [
        f"{name}$" if any(other.startswith(name) for other in covered) else name
        for name in sorted(linears - set(covered))
    ]


def matrices(folder: Path) -> list[Matrix]:
    """Return the quantized matrices of a checkpoint folder, in the order of their names."""
    found = []
    for name, parts in _stored(folder).items():
        facts = _read_facts(name, parts)
        if facts is None:
            if "weight" not in parts:
                raise ConfigError(f"the checkpoint has no weight for {name}")
            with opened(parts["weight"]) as tensors:
                shape = tensors.get_slice(f"{name}.weight").get_shape()
            if len(shape) != 2:
                raise ConfigError(f"the checkpoint's {name}.weight has {len(shape)} dimensions")
            rows, width = shape
        else:
            rows, width = facts["shape"]
        found.append(Matrix(name, "block", rows, width))
    return found


def group_sizes(folder: Path) -> set[int]:
    """Return the block sizes of a checkpoint's 4-bit matrices; -1 stands for LLM.int8()'s rows."""
    every = (_read_facts(name, parts) for name, parts in _stored(folder).items())
    return {-1 if facts is None else int(facts["blocksize"]) for facts in every}


def _read_facts(name: str, parts: dict[str, Path]) -> dict[str, Any] | None:
    """Return the JSON facts of a 4-bit matrix, None for LLM.int8()."""
    state = {part: path for part, path in parts.items() if part.startswith(STATE)}
    return _facts(_read(name, state)) if state else None


def _stored(folder: Path) -> dict[str, dict[str, Path]]:
    """Return the files in which the parts of each quantized matrix lie: name -> part -> file."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with opened(path) as tensors:
            files |= dict.fromkeys(tensors.keys(), path)
    marks = (f".{STATE}", ".SCB")
    names = {name.partition(mark)[0] for name in files for mark in marks if mark in name}
    found: dict[str, dict[str, Path]] = {name: {} for name in sorted(names)}
    for name, path in files.items():
        owner = next((name[:end] for end in _dots(name) if name[:end] in found), None)
        if owner is not None and not name.endswith(".bias"):
            found[owner][name[len(owner) + 1 :]] = path
    return found


def _dots(name: str) -> list[int]:
    return [index for index, letter in enumerate(name) if letter == "."]


def _read(name: str, parts: dict[str, Path]) -> dict[str, Tensor]:
    found = {}
    for part, path in parts.items():
        with opened(path) as tensors:
            found[part] = tensors.get_tensor(f"{name}.{part}")
    return found


def _facts(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the JSON facts of a 4-bit matrix: shape, block size, offset of the scales.

    Raises:
        ConfigError: they are none, or say something that cannot be.
    """
    name, state = next((part, t) for part, t in tensors.items() if part.startswith(STATE))
    try:
        facts = json.loads(state.contiguous().view(torch.uint8).numpy().tobytes())
    except (ValueError, RecursionError, RuntimeError) as error:
        raise ConfigError(f"the checkpoint's {name} holds no JSON: {error}") from error
    found: dict[str, Any] = facts if isinstance(facts, dict) else {}
    shape, offset = found.get("shape"), found.get("nested_offset", 0.0)
    sized = isinstance(shape, list) and len(shape) == 2 and all(whole(n, 1, 1 << 40) for n in shape)
    blocks = [found.get("blocksize"), found.get("nested_blocksize", 1)]
    if (
        not sized
        or not all(whole(n, 1, LARGEST_BLOCK) for n in blocks)
        or type(offset) is not float
    ):
        raise ConfigError(f"the checkpoint's {name} states no shape and block size that can be")
    return found


def decode(tensors: dict[str, Tensor]) -> Tensor:
    """Return the weight, float32 [out, in], from a matrix's stored tensors (`weight`, ...) alone.

    4-bit weights are those of bitsandbytes' dequantize_4bit bit for bit; blocks run through rows.

    Raises:
        ConfigError: a part is missing, or they do not fit together.
    """
    wanted = ("SCB",) if "SCB" in tensors else FOUR_BIT_PARTS
    if "weight.nested_absmax" in tensors:
        wanted = (*wanted, "weight.nested_quant_map")
    if missing := [part for part in ("weight", *wanted) if part not in tensors]:
        raise ConfigError(f"the checkpoint lacks {missing[0]} of a quantized matrix")
    try:
        return _decoded(tensors)
    except (RuntimeError, LookupError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the parts of a quantized matrix do not fit: {reason}") from error


def _decoded(tensors: dict[str, Tensor]) -> Tensor:
    if "SCB" in tensors:
        return tensors["weight"].float() * (tensors["SCB"] / INT8_LARGEST).unsqueeze(1)
    facts = _facts(tensors)
    weights = torch.Size(facts["shape"]).numel()
    packed = tensors["weight"].contiguous().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()[:weights]
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" in tensors:
        nested = tensors["weight.nested_absmax"].repeat_interleave(facts["nested_blocksize"])
        values = tensors["weight.nested_quant_map"][absmax.int()]
        absmax = values * nested[: absmax.numel()] + facts["nested_offset"]
    scales = absmax.repeat_interleave(facts["blocksize"])[:weights]
    return (tensors["weight.quant_map"][codes.int()] * scales).view(facts["shape"])


def load(folder: Path, hardware: Hardware) -> TorchEngine:
    """Load any bitsandbytes checkpoint as its users do; call each matrix once, so that it settles.

    Raises:
        ConfigError: bitsandbytes is missing, it would compute a matrix wrongly, or a matrix would
            fall back to a slower kernel and `hardware` allows none.
    """
    int8 = library().nn.Linear8bitLt
    found = matrices(folder)
    model = _load(folder, hardware, found)
    uses = []
    for matrix in found:
        module = model.get_submodule(matrix.name)
        settle = _settle_int8 if isinstance(module, int8) else _settle_4bit
        kernel, execution = settle(matrix, module, hardware)
        uses += uses_of(model, [matrix], kernel, execution)
    # LLM.int8() looks for outlier features in all that a call reads.
    modules = [model.get_submodule(matrix.name) for matrix in found]
    outliers = any(isinstance(m, int8) and m.state.threshold > 0 for m in modules)
    return TorchEngine(model, hardware.device, uses, couples_rows=outliers)


def load_dequantized(folder: Path, hardware: Hardware) -> TorchEngine:
    """Load with every matrix decoded here into an `nn.Linear`, to hold the kernels against."""
    found = matrices(folder)
    model = _load(folder, hardware, found)
    dtype = getattr(torch, hardware.compute_dtype)
    stored = _stored(folder)
    for matrix in found:
        weight = decode(_read(matrix.name, stored[matrix.name])).to(hardware.device, dtype)
        bias = bias_of(model, matrix)
        put_linear(model, matrix, weight, None if bias is None else bias.to(dtype))
    return TorchEngine(model, hardware.device, uses_of(model, found, DECODED, "dequantized"))


def _load(folder: Path, hardware: Hardware, found: Sequence[Matrix]) -> Any:
    bitsandbytes = library()
    dtype = getattr(torch, hardware.compute_dtype)
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": hardware.device}, local_files_only=True
        )
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    check_covered("transformers", found, modules)
    inside = {id(module) for module in modules.values()}
    for module in model.modules():
        if id(module) in inside:
            continue
        # What transformers renames or stacks (experts, routers) keeps the type it is stored in.
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def _call(matrix: Matrix, module: nn.Module, hardware: Hardware) -> None:
    dtype = getattr(torch, hardware.compute_dtype)
    with torch.no_grad():
        module(torch.ones(1, matrix.in_features, dtype=dtype, device=hardware.device))


def _settle_4bit(matrix: Matrix, module: Any, hardware: Hardware) -> tuple[str, Execution]:
    """Return kernel and execution of a Linear4bit, ready to run."""
    state, compute = module.weight.quant_state, _dtype_name(module.compute_dtype)
    kind, aligned = state.quant_type.upper(), matrix.in_features % state.blocksize == 0
    if hardware.device != "cpu":
        _call(matrix, module, hardware)
        if aligned:
            return f"{CUDA_4BIT}, {kind}, {compute}", "packed"
        return f"bitsandbytes dequantize_4bit ({kind}) + linear in {compute}", "dequantized"
    if not aligned:
        raise ConfigError(
            f"{matrix.name}: its width {matrix.in_features} is not a multiple of the block size "
            f"{state.blocksize}, and bitsandbytes on a CPU then takes the wrong scales; make it "
            "with a block size that divides the width"
        )
    refusal = _refusal(matrix, module, compute)
    if refusal and not hardware.allow_fallback:
        raise ConfigError(
            f"{matrix.name}: {CPU_4BIT} {refusal}, and hardware.allow_fallback is false; "
            "set hardware.allow_fallback=true"
        )
    if matrix.out_features % ROWS_OF_CPU_KERNEL:
        # bitsandbytes would stop at an assertion; without this flag it dequantizes.
        module.support_avx512bf16_for_cpu = False
    _call(matrix, module, hardware)
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        asked = f" ({compute} was asked for)" if compute != "bfloat16" else ""
        return f"{CPU_4BIT}: {kind}, bfloat16 activations and scales{asked}", "packed"
    remark = f" ({CPU_4BIT} {refusal})" if refusal else ""
    return f"bitsandbytes dequantize_4bit ({kind}) + linear in {compute}{remark}", "dequantized"


def _refusal(matrix: Matrix, module: Any, compute: str) -> str:
    """Return in what the CPU's kernel falls short of what is asked for, or nothing."""
    if not module.support_avx512bf16_for_cpu:
        return ""
    if matrix.out_features % ROWS_OF_CPU_KERNEL:
        return f"takes rows in blocks of {ROWS_OF_CPU_KERNEL}, not {matrix.out_features} of them"
    return "" if compute == "bfloat16" else f"computes in bfloat16, not in {compute}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settle_int8(matrix: Matrix, module: Any, hardware: Hardware) -> tuple[str, Execution]:
    """Return kernel and execution of a Linear8bitLt, ready to run."""
    _call(matrix, module, hardware)
    threshold = module.state.threshold
    outliers = f"; features of {threshold:g} and more in {hardware.compute_dtype}"
    said = f"float16, then INT8 activations{outliers if threshold else ''}"
    if hardware.device == "cpu":
        packed, product = has_integer_kernel(), "torch._int_mm"
    else:
        packed, product = matrix.in_features % CUBLAS_WIDTH == 0, "cuBLASLt INT8"
    product = product if packed else "to(float32) + torch.matmul"
    return f"bitsandbytes::int8_scaled_mm, {product}: {said}", "packed" if packed else "dequantized"


def has_integer_kernel() -> bool:
    """Whether bitsandbytes multiplies integers on this processor; otherwise it converts both."""
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512")
