"""llama.cpp's kernels on a processor, as a contender of the bench.

Asked through the C functions of the ggml libraries that llama_cpp brings: one graph of one matrix
product, on as many threads as torch has. As llama.cpp does when it loads a model, a weight that
ggml has a better order for on this processor is stored again in that (buffer type `CPU_REPACK` or
`AMX`); the remark says so. ggml rounds activations to 8 bits.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.bench_core import Contender, Given, Prepared

FLOAT32 = 0
TYPES = {
    "Q4_0": (2, 4, 32),
    "Q8_0": (8, 8, 32),
    "Q4_K": (12, 4, 256),
    "Q3_K": (11, 3, 256),
    "Q2_K": (10, 2, 256),
}
"""Name -> number of the type, nominal bits, inputs of a block."""

ROUNDED = "activations rounded to 8 bits, a grid of its own"
HEADERS = 1 << 20
"""Memory of a context for what is no data."""


class _Memory(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@cache
def _library() -> Any:
    """Return ggml's functions (`ggml.h`, `ggml-backend.h`, `ggml-cpu.h`), as far as used here."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("llama_cpp is not installed")
    folder = Path(found.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    pointer, size, long, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
    types: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_init": (pointer, (_Memory,)),
        "ggml_free": (None, (pointer,)),
        "ggml_new_tensor_2d": (pointer, (pointer, number, long, long)),
        "ggml_get_data": (pointer, (pointer,)),
        "ggml_row_size": (size, (number, long)),
        "ggml_mul_mat": (pointer, (pointer, pointer, pointer)),
        "ggml_new_graph": (pointer, (pointer,)),
        "ggml_graph_overhead": (size, ()),
        "ggml_build_forward_expand": (None, (pointer, pointer)),
        "ggml_quantize_chunk": (size, (number, pointer, pointer, long, long, long, pointer)),
        "ggml_backend_get_device": (pointer, (pointer,)),
        "ggml_backend_dev_backend_reg": (pointer, (pointer,)),
        "ggml_backend_dev_buffer_type": (pointer, (pointer,)),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, (pointer, pointer)),
        "ggml_backend_reg_get_proc_address": (pointer, (pointer, ctypes.c_char_p)),
        "ggml_backend_buft_name": (ctypes.c_char_p, (pointer,)),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, (pointer, pointer)),
        "ggml_backend_buffer_free": (None, (pointer,)),
        "ggml_backend_tensor_set": (None, (pointer, pointer, size, size)),
        "ggml_backend_graph_compute": (number, (pointer, pointer)),
        "ggml_log_get": (None, (pointer, pointer)),
        "ggml_log_set": (None, (pointer, pointer)),
        "ggml_backend_cpu_init": (pointer, ()),
        "ggml_backend_cpu_set_n_threads": (None, (pointer, number)),
    }
    for name, (result, arguments) in types.items():
        # Symbols of the base library are found under the other one, which is linked to it.
        function = getattr(loaded if hasattr(loaded, name) else base, name)
        function.restype, function.argtypes = result, arguments
        setattr(loaded, name, function)
    return loaded


@cache
def _backend() -> int:
    """Return the processor as ggml's backend; it keeps the scratch memory of all graphs."""
    return int(_library().ggml_backend_cpu_init())


def _buffer_types() -> list[int]:
    """Return the processor's buffer types in the order llama.cpp tries them, the plain one last."""
    ggml = _library()
    device = ggml.ggml_backend_get_device(_backend())
    register = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
    found: list[int] = []
    if address:
        ask = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        listed = ask(device)
        while listed and listed[len(found)]:
            found.append(listed[len(found)])
    return [*found, ggml.ggml_backend_dev_buffer_type(device)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep ggml from writing a line for each weight that it stores again."""
    ggml, callback, data = _library(), ctypes.c_void_p(), ctypes.c_void_p()
    ggml.ggml_log_get(ctypes.byref(callback), ctypes.byref(data))
    ggml.ggml_log_set(_SILENT, None)
    try:
        yield
    finally:
        ggml.ggml_log_set(callback, data)


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


@dataclass(frozen=True)
class _Weight:
    """A weight in ggml's memory: its tensor, and the name of the order."""

    tensor: int
    order: str


@dataclass(frozen=True)
class _Graph:
    """One product: what frees it, and views of the activations and of the result."""

    tokens: int
    free: Callable[[], object]
    graph: int
    given: Tensor
    result: Tensor


class Product(nn.Module):
    """A weight in one of ggml's types: `rows` in the order of files, as uint8."""

    def __init__(self, rows: Tensor, kind: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.kind, self.shape = rows, kind, shape
        self._graph: _Graph | None = None
        self._weight: _Weight | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Product:
        return Product(deepcopy(self.rows), self.kind, self.shape)

    @property
    def weight(self) -> _Weight:
        """The weight in the first order that ggml multiplies with; RuntimeError for none."""
        if self._weight is None:
            for buffer_type in _buffer_types():
                self._weight = self._stored(buffer_type)
                if self._weight is not None:
                    return self._weight
            raise RuntimeError("ggml takes the weight in no order")
        return self._weight

    def _stored(self, buffer_type: int) -> _Weight | None:
        """Put the weight into a buffer type; None where ggml does not multiply with it there."""
        ggml = _library()
        out, columns = self.shape
        context = ggml.ggml_init(_Memory(HEADERS, None, True))
        tensor = ggml.ggml_new_tensor_2d(context, self.kind, columns, out)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        # Only asked about: it has no memory of its own.
        other = ggml.ggml_new_tensor_2d(context, FLOAT32, columns, 512)
        product = ggml.ggml_mul_mat(context, tensor, other)
        device = ggml.ggml_backend_get_device(_backend())
        if not buffer or not ggml.ggml_backend_dev_supports_op(device, product):
            if buffer:
                ggml.ggml_backend_buffer_free(buffer)
            ggml.ggml_free(context)
            return None
        with _quiet():
            ggml.ggml_backend_tensor_set(tensor, self.rows.data_ptr(), 0, self.rows.nbytes)
        weakref.finalize(self, ggml.ggml_free, context)
        weakref.finalize(self, ggml.ggml_backend_buffer_free, buffer)
        order = ggml.ggml_backend_buft_name(buffer_type).decode()
        return _Weight(tensor, order)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight: x is copied to float32, as llama.cpp has it."""
        if self._graph is None or x.shape[0] != self._graph.tokens:
            if self._graph is not None:
                self._graph.free()
            self._graph = self._built(x.shape[0])
        self._graph.given.copy_(x)
        ggml = _library()
        ggml.ggml_backend_cpu_set_n_threads(_backend(), torch.get_num_threads())
        status = ggml.ggml_backend_graph_compute(_backend(), self._graph.graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self._graph.result

    def _built(self, tokens: int) -> _Graph:
        ggml = _library()
        out, columns = self.shape
        room = 4 * tokens * (columns + out) + ggml.ggml_graph_overhead() + HEADERS
        context = ggml.ggml_init(_Memory(room, None, False))
        given = ggml.ggml_new_tensor_2d(context, FLOAT32, columns, tokens)
        product = ggml.ggml_mul_mat(context, self.weight.tensor, given)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, product)
        return _Graph(
            tokens,
            weakref.finalize(self, ggml.ggml_free, context),
            graph,
            _view(ggml.ggml_get_data(given), (tokens, columns)),
            _view(ggml.ggml_get_data(product), (tokens, out)),
        )


def _view(address: int, shape: tuple[int, int]) -> Tensor:
    """Return memory of ggml's as a float32 tensor."""
    held = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
    return torch.frombuffer(held, dtype=torch.float32).view(shape)


def product(name: str, given: Given, dtype: torch.dtype) -> Prepared | str:
    """Quantize a weight by ggml's own rounding to one of its types."""
    kind, _, block = TYPES[name]
    out, columns = given.weight.shape
    if columns % block:
        return f"takes multiples of {block} inputs"
    ggml = _library()
    source = given.weight.float().contiguous()
    rows = torch.empty(out * ggml.ggml_row_size(kind, columns), dtype=torch.uint8)
    ggml.ggml_quantize_chunk(kind, source.data_ptr(), rows.data_ptr(), 0, out, columns, None)
    module = Product(rows, kind, (out, columns))
    order = module.weight.order
    again = "" if order == "CPU" else f", weights stored again as {order}"
    return Prepared(module, rows.nbytes, ROUNDED + again)


CONTENDERS = tuple(
    Contender(f"llama.cpp {name}", "peer", (bits,), partial(product, name), "llama_cpp")
    for name, (_, bits, _) in TYPES.items()
)
