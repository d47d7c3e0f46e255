"""HQQ: affine levels whose zero points are fitted to the weights alone, through hqq.

Badri and Shaji 2023, Half-Quadratic Quantization. Scales are those of round-to-nearest (min/max);
the zero points are real numbers that minimize the p-norm (0.7) of the error by alternating steps,
so weights with heavy tails lose less. weight = (code - zero) * scale.

The artefact has hqq's own safetensors layout (`HQQLinear.state_dict()`, what its
`save_to_safetensors` writes: `W_q`, `scale`, `zero` and each option as a small tensor). hqq's other
format is a pickle, and reading the first one back hqq evaluates strings that stand in it, so here
the options are read without it, and only the finished tensors are handed to `HQQLinear`.

Packing: W_q holds the codes as [groups, group] (axis 1) or [group, groups] (axis 0), cut along the
first dimension into as many equal parts as fit a word, the first part in the high bits: a word is
8 bits, but for 3 bits it is an int32 with 10 codes, rows filled up with zeros.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods.artefact import dtype_name
from methods.base import Engine, Execution, Hardware, Matrix, QuantizeReport
from methods.engine import TorchEngine
from methods.layers import (
    Scope,
    Selection,
    bias_of,
    check_finite,
    replace,
    select_linears,
    weight_of,
)
from methods.library import put_linear, require, uses_of, whole_maps_only
from methods.options import names, refuse_emulated

PACKAGE = "hqq"
CODES_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
WORD_BYTES = {8: 1, 4: 1, 3: 4, 2: 1, 1: 1}
SCALE_DTYPES = ("float16", "bfloat16", "float32")
Backend = Literal["pytorch", "aten", "gemlite"]
BACKENDS: tuple[str, ...] = get_args(Backend)
GROUP_MULTIPLE = 8
GEMLITE_BITS = (8, 4, 2, 1)

FACTS_BYTES = 3 * 4 + 2 * 8 + 9
"""nbits, group_size and axis as int32, the shape as two int64, nine flags of a byte."""

PATH_TOLERANCE = 0.05
"""For `methods.packed.compare_paths`. None is seen in float32, where hqq computes the very same
weights; with `compute_dtype=bfloat16` hqq rounds zero points to bfloat16 too: 0.004 to 0.02 (the
most with 8 bits, whose zero points are large). Parts in another order give 1 and more."""


class StoredHqq(nn.Module):
    """An HQQ matrix as it is stored: one buffer for each tensor, under hqq's names."""

    def __init__(self, tensors: dict[str, list[Any]]) -> None:
        super().__init__()
        for name, (dtype, shape) in tensors.items():
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            self.register_buffer(name, empty)

    def number(self, name: str) -> int:
        """Return the option `name`."""
        return int(self.get_buffer(name))

    def features(self) -> torch.Size:
        """Return [out, in]."""
        return torch.Size(self.get_buffer("shape").tolist())

    def decode(self) -> Tensor:
        """Return the weight, float32 [out, in], from the stored tensors alone."""
        bits, packed = self.number("nbits"), self.get_buffer("W_q")
        per_word = CODES_PER_WORD[bits]
        parts = [packed >> bits * (per_word - 1 - part) for part in range(per_word)]
        codes = torch.cat(parts) & (1 << bits) - 1
        group = self.number("group_size")
        rows = self.features().numel() // group if self.number("axis") == 1 else group
        scale, zero = self.get_buffer("scale").float(), self.get_buffer("zero").float()
        return ((codes[:rows] - zero) * scale).view(self.features())

    def deploy(self, dtype: torch.dtype, device: str) -> nn.Module:
        """Return hqq's own layer of these tensors, computing in `dtype`."""
        from hqq.core.quantize import HQQLinear, Quantizer

        bits = self.number("nbits")
        packing = Quantizer.bit_to_packing[bits]
        meta = {
            "nbits": bits,
            "group_size": self.number("group_size"),
            "axis": self.number("axis"),
            "shape": self.features(),
            "scale": self.get_buffer("scale"),
            "zero": self.get_buffer("zero"),
            "packing": packing,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
        }
        layer = HQQLinear(None, None, compute_dtype=dtype, device=device)
        state = {"W_q": nn.Parameter(self.get_buffer("W_q"), requires_grad=False), "meta": meta}
        layer.load_state_dict({**state, "bias": self._buffers.get("bias")})
        return layer  # type: ignore[no-any-return]


@dataclass(frozen=True)
class HQQ:
    """HQQ with hqq's own settings (zero points fitted, 4-bit ones from integers).

    Attributes:
        bits: 8, 4, 3, 2 or 1.
        group_size: weights that share a scale, a multiple of 8; -1: a whole row or column.
        axis: 1: groups run along the inputs of an output; 0: along the outputs of an input.
        scale_dtype: stored type of scales and zero points.
        backend: `pytorch`; on CUDA also `aten` (axis 0, hqq's extension hqq_aten) and `gemlite`
            (axis 1).
        keep: patterns of module names to spare.
    """

    name: str
    bits: int
    group_size: int
    axis: int = 1
    scale_dtype: str = "float16"
    backend: Backend = "pytorch"
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        for field, values in (
            ("bits", tuple(CODES_PER_WORD)),
            ("axis", (0, 1)),
            ("scale_dtype", SCALE_DTYPES),
            ("backend", BACKENDS),
        ):
            value = getattr(self, field)
            if value not in values or isinstance(value, bool):
                raise ConfigError(
                    f"{field} of {self.name} is {value!r}; "
                    f"it must be one of {', '.join(str(one) for one in values)}"
                )
        size = self.group_size
        fits = isinstance(size, int) and size >= GROUP_MULTIPLE and size % GROUP_MULTIPLE == 0
        if size != -1 and not fits:
            raise ConfigError(
                f"group_size of {self.name} is {size!r}; it must be a multiple of "
                f"{GROUP_MULTIPLE}, or -1 for a whole row"
            )
        axis = {"aten": 0, "gemlite": 1}.get(self.backend, self.axis)
        if self.axis != axis:
            raise ConfigError(
                f"method.backend={self.backend} of {self.name} runs axis {axis} only; "
                f"set method.axis={axis}"
            )
        if self.backend == "gemlite" and self.bits not in GEMLITE_BITS:
            raise ConfigError(
                f"method.backend=gemlite of {self.name} runs {', '.join(map(str, GEMLITE_BITS))} "
                f"bits, not {self.bits}; choose method.backend=pytorch"
            )
        object.__setattr__(self, "keep", names(self.keep))

    def check(self, hardware: Hardware) -> None:
        """Refuse FP16 on a CPU, and backends of CUDA elsewhere."""
        refuse_emulated(hardware)
        if hardware.device != "cuda" and self.backend != "pytorch":
            raise ConfigError(
                f"method.backend={self.backend} of {self.name} needs CUDA, and the device is "
                f"{hardware.device}; choose method.backend=pytorch"
            )

    def _group(self, matrix: Matrix) -> int:
        """Return the weights that share a scale in `matrix`."""
        if self.group_size != -1:
            return self.group_size
        return matrix.in_features if self.axis == 1 else matrix.out_features

    def _rows(self, matrix: Matrix) -> int:
        """Return the first dimension of the codes before they are packed."""
        group = self._group(matrix)
        return matrix.weights // group if self.axis == 1 else group

    def stored_bits(self, matrix: Matrix) -> int:
        """Packed codes, filled up to whole words; scales and zero points; and hqq's options."""
        groups, rows = matrix.weights // self._group(matrix), self._rows(matrix)
        words = math.ceil(rows / CODES_PER_WORD[self.bits]) * (matrix.weights // rows)
        dtype: torch.dtype = getattr(torch, self.scale_dtype)
        word = WORD_BYTES[self.bits]
        strings = ("3bit_32", "torch.int32") if self.bits == 3 else ("4bit_u8", "torch.uint8")
        said = sum(map(len, (*strings, str(dtype))))
        return 8 * (words * word + 2 * groups * dtype.itemsize + FACTS_BYTES + said)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out.

        Raises:
            ConfigError: groups do not divide a matrix, or its codes do not fill whole words.
        """
        selection = self._select(model)
        return selection.matrices, selection.left_out

    def _select(self, model: nn.Module) -> Selection:
        selection = select_linears(model, Scope(keep=names(self.keep)), whole_maps_only(PACKAGE))
        for matrix in selection.matrices:
            side = matrix.in_features if self.axis == 1 else matrix.out_features
            what = "width" if self.axis == 1 else "number of rows"
            if side % self._group(matrix):
                raise ConfigError(
                    f"layer {matrix.name}: its {what} {side} is not a multiple of group_size "
                    f"{self.group_size}; choose a divisor of it, or -1"
                )
            # hqq fills up rows for 3 bits alone; of others it would lose the last.
            if self.bits != 3 and self._rows(matrix) % CODES_PER_WORD[self.bits]:
                raise ConfigError(
                    f"layer {matrix.name}: hqq packs {CODES_PER_WORD[self.bits]} codes of "
                    f"{self.bits} bits together, and {self._rows(matrix)} is no multiple of that; "
                    "choose another group_size"
                )
        return selection

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Fit and pack every matrix; raises ConfigError where a value is not finite."""
        require(PACKAGE, self.name)
        selection = self._select(model)
        layers: dict[str, artefacts.Facts] = {}
        for matrix in selection.matrices:
            layer = self._quantize_one(model, matrix)
            tensors = layer.state_dict()
            layers[matrix.name] = {
                "tensors": {
                    name: [dtype_name(tensor), list(tensor.shape)]
                    for name, tensor in tensors.items()
                }
            }
            replace(model, matrix, layer)
        artefacts.save(model, into, layers)
        bits = sum(self.stored_bits(matrix) for matrix in selection.matrices)
        return QuantizeReport(selection.matrices, bits, selection.left_out, self._notes())

    def _quantize_one(self, model: nn.Module, matrix: Matrix) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        # None is a whole row (or column) of any width; a number must be a multiple of 8.
        group = None if self.group_size == -1 else self.group_size
        config = BaseQuantizeConfig(nbits=self.bits, group_size=group, axis=self.axis)
        weight, bias = weight_of(model, matrix), bias_of(model, matrix)
        check_finite(matrix.name, weight)
        layer: Any = HQQLinear.from_weights(
            weight.contiguous(),
            None,
            config,
            compute_dtype=getattr(torch, self.scale_dtype),
            device="cpu",
        )
        for part in ("scale", "zero"):
            # float16 ends at 65504, which the zero point of a narrow group far from 0 exceeds.
            check_finite(f"{matrix.name} ({part} as {self.scale_dtype})", layer.meta[part])
        if bias is not None:
            layer.bias = bias.to(artefacts.checkpoint_dtype(model))
        return layer  # type: ignore[no-any-return]

    def _notes(self) -> list[str]:
        if self.bits > 1:
            return []
        return ["1 bit: every weight of a group becomes one of two values"]

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load as hqq's own layers, on `backend`."""
        self.check(hardware)
        return load(artefact, hardware, self.backend)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with the weights decoded by this project into `nn.Linear`s, to compare with."""
        return load_dequantized(artefact, hardware)


def load(artefact: Path, hardware: Hardware, backend: Backend = "pytorch") -> TorchEngine:
    """Load the artefact as hqq's own layers, run by `backend`.

    Raises:
        ConfigError: hqq or the backend's library is missing, or `hardware` computes in FP16.
    """
    refuse_emulated(hardware)
    require(PACKAGE, "hqq")
    if backend != "pytorch":
        require("hqq_aten" if backend == "aten" else "gemlite", "hqq")
    from hqq.core.quantize import HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.ATEN if backend == "aten" else HQQBackend.PYTORCH)
    dtype = getattr(torch, hardware.compute_dtype)
    model, found = _load(artefact, hardware)
    uses = []
    for matrix, stored in found:
        bits = stored.number("nbits")
        layer: Any = stored.deploy(dtype, hardware.device)
        if backend == "gemlite":
            helper = importlib.import_module("gemlite.helper")
            layer = helper.A16Wn(device=hardware.device).from_hqqlinear(layer)
        replace(model, matrix, layer)
        uses += uses_of(model, [matrix], *_kernel(backend, bits, hardware.compute_dtype))
    return TorchEngine(model, hardware.device, uses)


def _kernel(backend: Backend, bits: int, dtype: str) -> tuple[str, Execution]:
    if backend == "gemlite":
        return f"gemlite A16W{bits} (Triton), {dtype}", "packed"
    dequantize = "hqq_aten dequantize" if backend == "aten" else "hqq dequantize"
    return f"{dequantize} + torch.matmul in {dtype}", "dequantized"


def load_dequantized(artefact: Path, hardware: Hardware) -> TorchEngine:
    """Load with every matrix decoded here into an `nn.Linear`, to hold hqq's layers against."""
    refuse_emulated(hardware)
    dtype = getattr(torch, hardware.compute_dtype)
    model, found = _load(artefact, hardware)
    for matrix, stored in found:
        bias = stored._buffers.get("bias")
        put_linear(
            model, matrix, stored.decode().to(dtype), None if bias is None else bias.to(dtype)
        )
    matrices = [matrix for matrix, _ in found]
    uses = uses_of(model, matrices, "decoded once + torch.nn.functional.linear", "dequantized")
    return TorchEngine(model, hardware.device, uses)


def _load(artefact: Path, hardware: Hardware) -> tuple[Any, list[tuple[Matrix, StoredHqq]]]:
    """Return the model with `StoredHqq` in the place of each matrix, and these."""
    dtype = getattr(torch, hardware.compute_dtype)
    model = artefacts.load(
        artefact, lambda name, facts: StoredHqq(facts["tensors"]), dtype, hardware.device
    )
    found = [
        (Matrix(name, "block", *module.features()), module)
        for name, module in model.named_modules()
        if isinstance(module, StoredHqq)
    ]
    return model, found
