"""Which kernel llama.cpp runs for each matrix of a GGUF file: the provenance that a record states.

On a CPU ggml multiplies packed weights with activations rounded to a type of their own
(`type_traits_cpu` in `ggml-cpu.c`). Some weights it first stores in another order, eight rows side
by side (buffer type `CPU_REPACK`, or `AMX`): asked of ggml here, with the question that llama.cpp
itself asks when it loads a tensor (`weight_buft_supported`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from methods.base import Hardware, KernelUse
from methods.gguf_names import gguf_name
from methods.gguf_types import FLOATS, TENSOR_TYPES
from methods.llamacpp_engine import library

LAYER = "ggml_tensor"

CPU_DEVICE = 0
"""`GGML_BACKEND_DEVICE_TYPE_CPU`."""

EMBEDDING, HEAD, POSITIONS = "token_embd.weight", "output.weight", "position_embd.weight"


class Stored(Protocol):
    """What is asked of a tensor: `methods.gguf_read.StoredTensor`."""

    @property
    def type(self) -> str:
        """Name of its type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and width."""
        ...


def uses_of(path: Path, hardware: Hardware) -> list[KernelUse]:
    """Return what runs each matrix of the GGUF file `path` on `hardware`.

    Raises:
        ConfigError: the file cannot be read, or llama.cpp is missing.
    """
    from methods import gguf_read

    model_type = str(gguf_read.read_config(path)["model_type"])
    return kernel_uses(gguf_read.stored_tensors(path), model_type, hardware)


def kernel_uses(
    tensors: Mapping[str, Stored], model_type: str, hardware: Hardware
) -> list[KernelUse]:
    """Return one KernelUse a matrix of `tensors`, by Hugging Face parameter names."""
    named = {gguf_name(model_type, name): (name, tensor) for name, tensor in tensors.items()}
    layers = 1 + max(_layer(tensor) for tensor in named)
    head = HEAD if HEAD in named else EMBEDDING
    uses = []
    for tensor, (name, stored) in named.items():
        if len(stored.shape) != 2 or tensor == POSITIONS:
            continue
        rows, width = stored.shape
        if tensor == EMBEDDING != head:
            kernel = f"ggml get_rows {stored.type}, rows looked up become F32"
        else:
            place = layers if tensor == head else _layer(tensor)
            kernel = _product(stored, hardware, place >= layers + 1 - _on_card(layers, hardware))
            kernel += " (the head; looked up as the embedding)" if tensor == EMBEDDING else ""
        uses.append(KernelUse(name.removesuffix(".weight"), LAYER, kernel, "packed", rows * width))
    return uses


def _layer(tensor: str) -> int:
    return int(tensor.split(".")[1]) if tensor.startswith("blk.") else -1


def _on_card(layers: int, hardware: Hardware) -> int:
    """Return how many of the layers are on a card, from the last on; the head counts as one."""
    if hardware.device != "cuda":
        return 0
    return layers + 1 if hardware.gpu_layers is None else hardware.gpu_layers


def _product(stored: Stored, hardware: Hardware, on_card: bool) -> str:
    """Return what multiplies with a weight [rows, width], and what it rounds activations to."""
    if on_card:
        # As ggml-cuda.cu chooses; none of it is seen from here.
        packed = ", activations rounded to Q8_1, or weights to F16 in batches too large for that"
        return f"ggml CUDA mul_mat {stored.type}{'' if stored.type in FLOATS else packed}"
    rows, width = stored.shape
    activations = TENSOR_TYPES[stored.type].activations
    text = f"ggml mul_mat {stored.type} x {activations}"
    text += f", activations rounded to {activations}" if activations != "F32" else ""
    # A residue says whether groups of rows are whole, and takes no memory to speak of.
    buffer = weight_buffer(stored.type, rows if rows < 128 else 64 + rows % 64, width)
    text += f", weights stored again as {buffer}" if buffer != "CPU" else ""
    return text + (", large batches on the card" if hardware.device == "cuda" else "")


@cache
def weight_buffer(tensor_type: str, rows: int, width: int) -> str:
    """Return the buffer type that llama.cpp keeps [rows, width] weights of a product in on a CPU.

    `CPU` is the file's own order.
    """
    ggml = _ggml()
    device = ggml.ggml_backend_dev_by_type(CPU_DEVICE)
    for buffer_type in _extra_buffer_types(ggml, device):
        if _takes(ggml, device, buffer_type, (TENSOR_TYPES[tensor_type].number, rows, width)):
            return str(ggml.ggml_backend_buft_name(buffer_type).decode())
    return "CPU"


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


@cache
def _ggml() -> Any:
    """Return ggml's C interface (`ggml.h`, `ggml-backend.h`), typed as far as it is used here."""
    loaded = library().api.llama_cpp._lib  # the handle finds the libraries under it too
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    types: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_init": (pointer, (_InitParams,)),
        "ggml_free": (None, (pointer,)),
        "ggml_new_tensor_2d": (pointer, (pointer, ctypes.c_int, number, number)),
        "ggml_mul_mat": (pointer, (pointer, pointer, pointer)),
        "ggml_backend_dev_by_type": (pointer, (ctypes.c_int,)),
        "ggml_backend_dev_backend_reg": (pointer, (pointer,)),
        "ggml_backend_reg_get_proc_address": (pointer, (pointer, ctypes.c_char_p)),
        "ggml_backend_buft_name": (ctypes.c_char_p, (pointer,)),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, (pointer, pointer)),
        "ggml_backend_buffer_free": (None, (pointer,)),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, (pointer, pointer)),
    }
    for name, (result, arguments) in types.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _extra_buffer_types(ggml: Any, device: Any) -> list[int]:
    """Return the CPU's buffer types beside the plain one, in the order llama.cpp tries them."""
    register = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    ask = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    found: list[int] = []
    listed = ask(device)
    while listed and listed[len(found)]:
        found.append(listed[len(found)])
    return found


def _takes(ggml: Any, device: Any, buffer_type: int, weight: tuple[int, int, int]) -> bool:
    """Whether the device multiplies a weight (type, rows, width) kept in `buffer_type`."""
    number, rows, width = weight
    contexts = [ggml.ggml_init(_InitParams(1 << 16, None, True)) for _ in range(2)]
    try:
        tensor = ggml.ggml_new_tensor_2d(contexts[0], number, width, rows)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(contexts[0], buffer_type)
        if not buffer:
            return False
        other = ggml.ggml_new_tensor_2d(contexts[1], TENSOR_TYPES["F32"].number, width, 512)
        product = ggml.ggml_mul_mat(contexts[1], tensor, other)
        taken = bool(ggml.ggml_backend_dev_supports_op(device, product))
        ggml.ggml_backend_buffer_free(buffer)
        return taken
    finally:
        for context in contexts:
            ggml.ggml_free(context)
