"""llama.cpp's own quantizer (`llama_model_quantize`), called on a GGUF file in float32."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.gguf_types import FILE_TYPES, TENSOR_TYPES, Choice
from methods.llamacpp_engine import library


class QuantizeError(RuntimeError):
    """llama.cpp did not quantize a file."""


def quantize_file(
    source: Path, target: Path, choice: Choice, importance: Mapping[str, Tensor]
) -> None:
    """Quantize the GGUF file `source` (float32) into the file `target` as `choice` says.

    `importance` holds float32 [in] by GGUF tensor name; empty: no importance matrix.

    Raises:
        QuantizeError: llama.cpp refuses; the sentence is its own.
    """
    loaded = library()
    api = loaded.api
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[choice.file_type].number
    parameters.pure = choice.pure
    parameters.nthread = torch.get_num_threads()
    if choice.output is not None:
        parameters.output_tensor_type = TENSOR_TYPES[choice.output].number
    if choice.embedding is not None:
        parameters.token_embedding_type = TENSOR_TYPES[choice.embedding].number
    entries = _entries(api, importance)
    if entries is not None:
        parameters.imatrix = entries
    loaded.said.clear()
    # Each fallback is a warning there; `methods.gguf` said them before.
    with loaded.errors_only():
        code = api.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
    if code != 0:
        raise QuantizeError(f"llama.cpp did not quantize to {choice.file_type}: {loaded.reason()}")


def _entries(api: Any, importance: Mapping[str, Tensor]) -> Any:
    """Return the importance as a C array that ends with an empty entry; None where there is none.

    It points into the tensors, which `importance` keeps alive.
    """
    if not importance:
        return None
    entries = (api.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, mean) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = ctypes.cast(mean.data_ptr(), ctypes.POINTER(ctypes.c_float))
        entry.size = mean.numel()
    return entries
