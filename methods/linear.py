"""Modules that hold packed weights: a linear map, an embedding, a stack of experts.

Each has the buffers `packed`, `scale`, `zero_point` and `bias` (the last two may be None) and is
built from JSON facts. `prepare` chooses the kernel for the hardware: where it has a packed one, the
stored buffers are converted to its format and dropped. `use` says what was chosen and why.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from kernels import aten, cpu, gpu
from kernels.decode_step import Weights
from kernels.errors import ConfigError
from kernels.ops import packed_linear
from kernels.pack import LAYOUT_VERSION, pack, packed_bytes, unpack
from kernels.reference import dequantize, dequantize_packed, unpack_zero_point
from kernels.stored import Stored
from methods.affine import SCALE_DTYPES, Affine, Quantized
from methods.base import Hardware, KernelUse, Matrix

Kind = Literal["linear", "embedding", "experts"]

LARGEST_SIZE = 1 << 40
BIAS_DTYPES = (*SCALE_DTYPES, "float64")

FINDERS = {"cpu": cpu.linear_of, "cuda": gpu.linear_of}
"""Device -> what returns the packed linear map of so many bits there, or None and why."""

KERNEL_DTYPE = str(aten.DTYPE).removeprefix("torch.")


@dataclass(frozen=True)
class Layout:
    """The JSON facts of one stored matrix, or of a stack of `count` of them.

    Attributes:
        bias: stored type of the bias; None without one.
        transposed: the stack gives [in, out] matrices to the model.
        version: of the packed layout.
    """

    kind: Kind
    out_features: int
    in_features: int
    bits: int
    group_size: int
    symmetric: bool
    per_tensor: bool
    scale_dtype: str
    count: int = 1
    bias: str | None = None
    transposed: bool = False
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        sizes = (self.out_features, self.in_features, self.count)
        # No rows are some: projections are joined from their first row on.
        if not all(type(size) is int and 0 <= size <= LARGEST_SIZE for size in sizes):
            raise ValueError(f"a layout of {sizes} rows, columns and copies is none")
        flags = (self.symmetric, self.per_tensor, self.transposed)
        if self.kind not in get_args(Kind) or not all(type(flag) is bool for flag in flags):
            raise ValueError(f"a layout of kind {self.kind!r:.40} with the flags {flags} is none")
        if self.scale_dtype not in SCALE_DTYPES or self.bias not in (None, *BIAS_DTYPES):
            raise ValueError("a layout has scales or a bias in a type that is not stored")
        # Refuses bits and groups that are none.
        Affine(self.bits, self.group_size)

    @staticmethod
    def of(matrix: Matrix, affine: Affine) -> Layout:
        """Return the layout that stores `matrix`, without a bias, rounded as `affine` says."""
        linear: Kind = "embedding" if matrix.role == "embedding" else "linear"
        return Layout(
            kind="experts" if matrix.count > 1 else linear,
            out_features=matrix.out_features,
            in_features=matrix.in_features,
            bits=affine.bits,
            group_size=affine.group_size,
            symmetric=affine.symmetric,
            per_tensor=affine.per_tensor,
            scale_dtype=affine.scale_dtype,
            count=matrix.count,
        )

    @property
    def weights(self) -> int:
        """Number of weights, all copies together."""
        return self.count * self.out_features * self.in_features

    @property
    def covered(self) -> int:
        """Width of a stored row: `in_features` raised to whole groups."""
        return Affine(self.bits, self.group_size).padded(self.in_features)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and type of each stored buffer."""
        groups = Affine(self.bits, self.group_size).groups(self.in_features)
        scale_shape = (1, 1) if self.per_tensor else (self.out_features, groups)
        stack = (self.count,) if self.kind == "experts" else ()
        row = packed_bytes(self.covered, self.bits)
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "packed": ((*stack, self.out_features, row), torch.uint8),
            "scale": ((*stack, *scale_shape), SCALE_DTYPES[self.scale_dtype]),
        }
        if not self.symmetric:
            zero_bytes = packed_bytes(scale_shape[0] * scale_shape[1], self.bits)
            found["zero_point"] = ((*stack, zero_bytes), torch.uint8)
        if self.bias is not None:
            found["bias"] = ((self.out_features,), getattr(torch, self.bias))
        return found

    @property
    def stored_bits(self) -> int:
        """Bits of weights, scales and zero points; a bias is no part of the matrix."""
        return sum(
            8 * dtype.itemsize * torch.Size(shape).numel()
            for name, (shape, dtype) in self.shapes().items()
            if name != "bias"
        )


class QuantizedModule(nn.Module):
    """What the three modules share: buffers, facts, provenance."""

    packed: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    bias: Tensor | None

    converter: ClassVar[str] = "quantbench::packed_linear"
    """What converts the weights at each call where no packed kernel is used."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        if layout.version != LAYOUT_VERSION:
            raise ValueError(
                f"packed layout version {layout.version}; this version reads {LAYOUT_VERSION}"
            )
        self.layout = layout
        self.dtype = torch.float32
        self._kernel: str | None = None
        self._remark = ""
        shapes = layout.shapes()
        for name in ("packed", "scale", "zero_point", "bias"):
            empty = None
            if name in shapes:
                shape, dtype = shapes[name]
                empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_buffer(name, empty)

    def fill(self, quantized: Quantized, bias: Tensor | None) -> QuantizedModule:
        """Put weights and bias into the buffers, packed; return self.

        Raises:
            ValueError: they do not have the shapes and types of the layout.
        """
        zero_point = quantized.zero_point
        tensors = {"packed": pack(quantized.codes, self.layout.bits), "scale": quantized.scale}
        if zero_point is not None:
            tensors["zero_point"] = pack(zero_point.flatten(-2), self.layout.bits)
        if bias is not None:
            tensors["bias"] = bias
        found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        if found != self.layout.shapes():
            raise ValueError(f"tensors {found} do not fit {self.layout}")
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        return self

    def facts(self) -> dict[str, Any]:
        """Return the JSON facts from which `empty` builds this module again."""
        return asdict(self.layout)

    def stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return packed weights, scales and zero points as they are stored.

        Raises:
            RuntimeError: `prepare` converted them to a kernel's own format.
        """
        if self.packed is None or self.scale is None:
            raise RuntimeError("the stored weights were dropped when the kernel was prepared")
        return self.packed, self.scale, self.zero_point

    def prepare(self, name: str, hardware: Hardware, packed: bool = True) -> None:
        """Choose how `name` runs on `hardware`; `packed=False` converts at each call in any case.

        Raises:
            ConfigError: the packed kernel refuses and `hardware` allows no fallback.
        """
        self.dtype = getattr(torch, hardware.compute_dtype)
        self._remark = "" if packed else "asked for"

    def use(self, name: str) -> KernelUse:
        """Return what runs this module, under the name `name`."""
        remark = f" ({self._remark})" if self._remark else ""
        return KernelUse(
            name=name,
            layer=type(self).__name__,
            kernel=f"{self._kernel or self.converter}{remark}",
            execution="packed" if self._kernel else "dequantized",
            weights=self.layout.weights,
        )


def packed_kernel(
    name: str, bits: int, group_size: int, hardware: Hardware
) -> tuple[type[cpu.Linear] | type[gpu.PackedLinear] | None, str]:
    """Return the packed kernel for a linear map called `name`, or None; and a remark on the choice.

    Bits for which the hardware has no packed kernel at all are dequantized at each call: that is
    how the format runs there, and no fallback. Where it has one for the bits, but not for this
    group size, dequantizing is a fallback; so are the kernels of a processor without a C compiler,
    and the rounding of activations to their type.

    Raises:
        ConfigError: it would be a fallback, which `hardware` does not allow.
    """
    find = FINDERS.get(hardware.device)
    linear, missing = find(bits) if find else (None, "")
    if linear is None:
        remark = f"no packed kernel for {bits} bits on {hardware.device}"
        return None, f"{remark}: {missing}" if missing else remark
    refusal = linear.refusal(group_size)
    rounds = getattr(torch, hardware.compute_dtype) not in linear.dtypes
    if refusal is None and not rounds:
        return linear, missing
    if not hardware.allow_fallback:
        types = " or ".join(str(dtype).removeprefix("torch.") for dtype in linear.dtypes)
        cause = refusal or f"computes in {types}, not in {hardware.compute_dtype}"
        change = "group_size" if refusal else "hardware.compute_dtype"
        raise ConfigError(
            f"{name}: {linear.kernel} {cause}, and hardware.allow_fallback is false; "
            f"choose another {change} or set hardware.allow_fallback=true"
        )
    if refusal is None:
        return linear, "; ".join(filter(None, (f"{KERNEL_DTYPE} activations", missing)))
    return None, f"{linear.kernel} {refusal}"


class QuantizedLinear(QuantizedModule):
    """A linear map with packed weights: [..., in] -> [..., out] in the type of its input."""

    def prepare(self, name: str, hardware: Hardware, packed: bool = True) -> None:
        """Convert the stored weights to the format of the hardware's kernel, if it has one."""
        super().prepare(name, hardware, packed)
        if self.bias is not None:
            self.bias = self.bias.to(self.dtype)
        if not packed:
            return
        layout = self.layout
        linear, self._remark = packed_kernel(name, layout.bits, layout.group_size, hardware)
        if linear is None:
            return
        codes, scale, zero_point = self.stored()
        self.linear = linear(
            Stored(codes, scale, zero_point, layout.bits, layout.group_size, layout.in_features)
        )
        self._kernel = linear.kernel
        if isinstance(self.linear, cpu.PanelLinear):
            self.linear.choose(self.dtype)
            first = self.linear.choice.get("library_from")
            if first is not None:
                self._kernel += f", from {first} tokens dequantized for torch's GEMM"
        self.packed = self.scale = self.zero_point = None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight and add the bias."""
        if self._kernel is None:
            codes, scale, zero_point = self.stored()
            bits, group_size = self.layout.bits, self.layout.group_size
            y: Tensor = packed_linear(x, codes, scale, zero_point, self.bias, bits, group_size)
        else:
            y = self.linear(x, self.bias)
        return y

    def in_c(self, dtype: torch.dtype) -> Weights | str:
        """Return the matrix for a C caller with activations of `dtype`, or why there is none."""
        linear = getattr(self, "linear", None)
        if isinstance(linear, cpu.PanelLinear):
            return linear.in_c(dtype, self.bias)
        return f"weights are read by {self._kernel or self.converter}"


class QuantizedExperts(QuantizedModule):
    """A stack of expert matrices; `module[i]` is expert i's weight, as the model multiplies by it.

    The model's own code multiplies, so the weight is dequantized on every device.
    """

    converter = "dequantize one expert"

    def __getitem__(self, index: Tensor | int) -> Tensor:
        """Return the weight of expert `index`: [out, in], or [in, out] for a transposed stack."""
        packed, scale, zero_point = self.stored()
        weight = dequantize_packed(
            packed[index],
            scale[index],
            None if zero_point is None else zero_point[index],
            self.layout.bits,
            self.layout.group_size,
            self.layout.in_features,
        ).to(self.dtype)
        return weight.T if self.layout.transposed else weight


class QuantizedEmbedding(QuantizedModule):
    """An embedding with packed rows: int64 [...] -> [..., width]; only the rows read are converted.

    `prepare` unpacks the zero points to one byte each, since a row's own may not start at a byte.
    """

    converter = "gather packed rows and dequantize"

    def prepare(self, name: str, hardware: Hardware, packed: bool = True) -> None:
        """Unpack the zero points."""
        super().prepare(name, hardware, packed)
        _, scale, zero_point = self.stored()
        if zero_point is not None and zero_point.ndim == 1:
            self.zero_point = unpack_zero_point(zero_point, scale, self.layout.bits)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids` in the type of the activations."""
        packed, scale, zero_point = self.stored()
        if zero_point is not None and zero_point.ndim == 1:
            raise RuntimeError("an embedding is prepared for its hardware before it is read")
        flat = ids.flatten()
        if not self.layout.per_tensor:
            scale = scale[flat]
            zero_point = None if zero_point is None else zero_point[flat]
        bits = self.layout.bits
        codes = unpack(packed[flat], bits, self.layout.covered)
        rows = dequantize(codes, scale, zero_point, bits)[:, : self.layout.in_features]
        return rows.to(self.dtype).reshape(*ids.shape, -1)


_MODULES: dict[Kind, type[QuantizedModule]] = {
    "linear": QuantizedLinear,
    "embedding": QuantizedEmbedding,
    "experts": QuantizedExperts,
}


def module_of(layout: Layout) -> QuantizedModule:
    """Return the module for `layout`, its buffers on the meta device."""
    return _MODULES[layout.kind](layout)


def empty(facts: dict[str, Any]) -> QuantizedModule:
    """Return the module that JSON `facts` describe, its buffers on the meta device."""
    return module_of(Layout(**facts))
