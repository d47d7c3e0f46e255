"""Contenders on a processor: PyTorch's own ops, our packed linears, and llama.cpp's kernels.

llama.cpp is asked through the C functions of the ggml libraries that llama_cpp brings: one graph of
one matrix product, on as many threads as torch has. It rounds activations to 8 bits.
"""

from __future__ import annotations

import ctypes
import importlib.util
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import aten, cpu
from kernels.bench_core import Contender, Prepared, codes_of, held_bytes, quantize
from kernels.bench_peers import LIBRARIES
from kernels.stored import Stored


class Linear(nn.Module):
    """An unquantized weight in the type of the activations."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight."""
        return functional.linear(x, self.weight)


def unquantized(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Prepared | str:
    """Keep the weight in the type of the activations; bits and group_size have no meaning."""
    module = Linear(weight, dtype)
    return Prepared(module, held_bytes(module))


def packed(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Prepared | str:
    """Prepare this project's packed linear of a processor."""
    linear = cpu.PACKED_LINEARS.get(bits)
    if linear is None:
        return f"no packed kernel for {bits} bits"
    refusal = linear.refusal(group_size)
    if refusal is not None:
        return f"{linear.kernel} {refusal}"
    module = linear(quantize(weight, bits, group_size))
    return Prepared(module, held_bytes(module))


class Int4Op(nn.Module):
    """`_weight_int4pack_mm_for_cpu` as it is: no padding, scales in the type of the activations."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.group_size = stored.group_size
        codes = codes_of(stored).int()
        self.weight = nn.Buffer(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        scale = stored.scale.to(dtype)
        both = torch.stack([scale, torch.zeros_like(scale)], dim=-1)
        self.scales = nn.Buffer(both.transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the packed weight."""
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.weight, self.group_size, self.scales
        )
        return y


def int4_op(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Prepared | str:
    """Prepare PyTorch's int4 op; it wants rows in blocks of 16 and whole groups."""
    if weight.shape[0] % aten.INT4_ROWS or weight.shape[1] % group_size:
        return f"takes multiples of {aten.INT4_ROWS} rows and whole groups of inputs"
    module = Int4Op(quantize(weight, bits, group_size), dtype)
    return Prepared(module, held_bytes(module))


class Int8Op(nn.Module):
    """`_weight_int8pack_mm` as it is: scales in the type of the activations."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Buffer((codes_of(stored).short() - 128).to(torch.int8))
        self.scales = nn.Buffer(stored.scale.flatten().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the packed weight."""
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return y


def int8_op(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Prepared | str:
    """Prepare PyTorch's int8 op; it crashes on a row that ends inside one of its vectors."""
    if weight.shape[1] % aten.INT8_INPUTS:
        return f"takes multiples of {aten.INT8_INPUTS} inputs"
    module = Int8Op(quantize(weight, bits, group_size), dtype)
    return Prepared(module, held_bytes(module))


# llama.cpp

FLOAT32 = 0
GGML_TYPES = {"Q4_0": (2, 4, 32), "Q8_0": (8, 8, 32), "Q4_K": (12, 4, 256), "Q3_K": (11, 3, 256)}
GGML_TYPES["Q2_K"] = (10, 2, 256)
"""Name -> number of the type, nominal bits, inputs of a block."""

ROUNDED = "activations rounded to 8 bits, a grid of its own"


class _Memory(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@cache
def _ggml() -> tuple[Any, Any]:
    """Return ggml's two libraries, with the types of what is called of them."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("llama_cpp is not installed")
    folder = Path(found.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"))
    compute = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    pointer, size, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_init", pointer, (_Memory,)),
        ("ggml_free", None, (pointer,)),
        ("ggml_new_tensor_2d", pointer, (pointer, ctypes.c_int, long, long)),
        ("ggml_get_data", pointer, (pointer,)),
        ("ggml_nbytes", size, (pointer,)),
        ("ggml_row_size", size, (ctypes.c_int, long)),
        ("ggml_mul_mat", pointer, (pointer, pointer, pointer)),
        ("ggml_new_graph", pointer, (pointer,)),
        ("ggml_graph_overhead", size, ()),
        ("ggml_build_forward_expand", None, (pointer, pointer)),
        ("ggml_quantize_chunk", size, (ctypes.c_int, pointer, pointer, long, long, long, pointer)),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    run = compute.ggml_graph_compute_with_ctx
    run.restype, run.argtypes = ctypes.c_int, (pointer, pointer, ctypes.c_int)
    return base, compute


class GgmlProduct(nn.Module):
    """A weight in one of ggml's types; a graph is built for each number of tokens, once."""

    def __init__(self, rows: Tensor, kind: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.kind, self.shape = rows, kind, shape
        self._graphs: dict[int, tuple[int, int, Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> GgmlProduct:
        return GgmlProduct(deepcopy(self.rows), self.kind, self.shape)

    def __del__(self) -> None:
        for context, *_ in self._graphs.values():
            _ggml()[0].ggml_free(context)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight: x is copied to float32, as llama.cpp has it."""
        tokens = x.shape[0]
        if tokens not in self._graphs:
            self._graphs[tokens] = self._graph(tokens)
        context, graph, given, result = self._graphs[tokens]
        given.copy_(x)
        status = _ggml()[1].ggml_graph_compute_with_ctx(context, graph, torch.get_num_threads())
        if status != 0:
            raise RuntimeError(f"ggml_graph_compute_with_ctx returned {status}")
        return result

    def _graph(self, tokens: int) -> tuple[int, int, Tensor, Tensor]:
        base, _ = _ggml()
        out, columns = self.shape
        # Weight, activations, their 8-bit copy and the result, and some room for the rest.
        room = self.rows.nbytes + 4 * tokens * (2 * columns + out) + base.ggml_graph_overhead()
        context = base.ggml_init(_Memory(room + (16 << 20), None, False))
        weight = base.ggml_new_tensor_2d(context, self.kind, columns, out)
        ctypes.memmove(base.ggml_get_data(weight), self.rows.data_ptr(), self.rows.nbytes)
        given = base.ggml_new_tensor_2d(context, FLOAT32, columns, tokens)
        product = base.ggml_mul_mat(context, weight, given)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, product)
        return (
            context,
            graph,
            _view(base.ggml_get_data(given), (tokens, columns)),
            _view(base.ggml_get_data(product), (tokens, out)),
        )


def _view(address: int, shape: tuple[int, int]) -> Tensor:
    """Return memory of ggml's as a float32 tensor."""
    held = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
    return torch.frombuffer(held, dtype=torch.float32).view(shape)


def ggml(
    name: str, weight: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Prepared | str:
    """Quantize a weight by ggml's own rounding to one of its types."""
    kind, _, block = GGML_TYPES[name]
    out, columns = weight.shape
    if columns % block:
        return f"takes multiples of {block} inputs"
    base, _ = _ggml()
    source = weight.float().contiguous()
    rows = torch.empty(out * base.ggml_row_size(kind, columns), dtype=torch.uint8)
    base.ggml_quantize_chunk(kind, source.data_ptr(), rows.data_ptr(), 0, out, columns, None)
    return Prepared(GgmlProduct(rows, kind, (out, columns)), rows.nbytes, ROUNDED)


CONTENDERS = (
    Contender("torch linear", "baseline", (16,), unquantized),
    Contender("quantbench", "ours", (8, 4, 3, 2), packed),
    Contender("torch _weight_int4pack_mm_for_cpu", "peer", (4,), int4_op),
    Contender("torch _weight_int8pack_mm", "peer", (8,), int8_op),
    *(
        Contender(f"llama.cpp {name}", "peer", (bits,), partial(ggml, name), "llama_cpp")
        for name, (_, bits, _) in GGML_TYPES.items()
    ),
    *LIBRARIES,
)
