"""Writes a transformers model as one GGUF file that llama.cpp runs, with the `gguf` package.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md) and what `convert_hf_to_gguf.py` of
llama.cpp writes for the same families. Matrices are stored in the type asked for, vectors and
position embeddings in float32, as llama.cpp wants them. The same model gives the same bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods.gguf_names import (
    ROPE_FREQUENCIES,
    Family,
    check_structure,
    family_of,
    gguf_name,
    head_width,
    rope_of,
    split_name,
)
from methods.gguf_tokenizer import add_tokenizer
from methods.layers import is_tied
from methods.library import require

# Names of the types in torch, in GGUF, and of the file type that states them.
DTYPES: dict[str, tuple[torch.dtype, str, str]] = {
    "float32": (torch.float32, "F32", "ALL_F32"),
    "float16": (torch.float16, "F16", "MOSTLY_F16"),
    "bfloat16": (torch.bfloat16, "BF16", "MOSTLY_BF16"),
}


def export(model: Any, tokenizer: Any, path: Path, dtype: str) -> list[str]:
    """Write `model` (float32, on the CPU; left as it is) and `tokenizer` into the file `path`.

    `dtype` is `float32`, `float16` or `bfloat16`. Tensors are converted and written one after the
    other. Returns sentences that a reader of the figures must know.

    Raises:
        ConfigError: the family or its structure has no form in GGUF, the gguf package is missing,
            or a weight is too large for float16.
    """
    require("gguf", "the GGUF exporter")
    if dtype not in DTYPES:
        raise ConfigError(f"GGUF matrices can be written as {', '.join(DTYPES)}, not {dtype!r}")
    check_structure(model.config)
    import gguf

    writer = gguf.GGUFWriter(path, family_of(model.config.model_type).arch)
    try:
        _add_architecture(writer, model)
        writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][2]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes = add_tokenizer(writer, tokenizer, model.config)
        _write_tensors(writer, model, dtype)
    except BaseException:
        writer.close()
        path.unlink(missing_ok=True)  # half a file looks like a whole one
        raise
    writer.close()
    return notes


def _add_architecture(writer: Any, model: Any) -> None:
    config = model.config
    family = family_of(config.model_type)
    writer.add_type("model")
    writer.add_name(type(model).__name__)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_feed_forward(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if not family.rotary:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = head_width(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rope = rope_of(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _feed_forward(config: Any) -> int:
    own = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(own or 4 * config.hidden_size)


def _write_tensors(writer: Any, model: Any, dtype: str) -> None:
    """Announce every tensor, then convert and write them in the same order."""
    import gguf

    model_type = model.config.model_type
    parameters = _parameters(model)
    rope = _frequency_factors(model.config)
    if rope is not None:
        shape = tuple(rope.shape)
        writer.add_tensor_info(ROPE_FREQUENCIES, shape, rope.dtype, rope.nbytes)
    for name, parameter in parameters.items():
        stored = _stored_dtype(model_type, name, parameter, dtype)
        torch_dtype, ggml, _ = DTYPES[stored]
        shape = tuple(parameter.shape)
        if _is_transposed(model_type, name, parameter):
            shape = shape[::-1]
        writer.add_tensor_info(
            gguf_name(model_type, name),
            shape,
            np.dtype(np.float32),
            parameter.numel() * torch_dtype.itemsize,
            raw_dtype=gguf.GGMLQuantizationType[ggml],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope is not None:
        writer.write_tensor_data(rope)
    for name, parameter in parameters.items():
        stored = _stored_dtype(model_type, name, parameter, dtype)
        writer.write_tensor_data(_converted(model, name, parameter, stored))


def _parameters(model: Any) -> dict[str, Tensor]:
    """Return the parameters by name; a head that is the embedding is left out."""
    head = model.get_output_embeddings()
    tied = is_tied(model)
    names = {id(module): name for name, module in model.named_modules()}
    left = f"{names[id(head)]}.weight" if tied else ""
    return {name: value for name, value in model.state_dict().items() if name != left}


def _stored_dtype(model_type: str, name: str, parameter: Tensor, dtype: str) -> str:
    # Position embeddings are added to the hidden state as vectors are, in float32.
    vector = parameter.ndim < 2 or gguf_name(model_type, name) == "position_embd.weight"
    return "float32" if vector else dtype


def _is_transposed(model_type: str, name: str, parameter: Tensor) -> bool:
    number, module, _ = split_name(model_type, name)
    inside = number is not None and module in family_of(model_type).transposed
    return inside and parameter.ndim == 2


def permute(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of `weight` [heads * width, ...] from halves to neighbouring pairs.

    transformers rotates row i of a head with row i + width / 2, llama.cpp row 2i with row 2i + 1.
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def heads_of(config: Any, module: str) -> int:
    """Return the heads of a query or key projection."""
    kv = module.endswith("k_proj")
    return int(config.num_key_value_heads if kv else config.num_attention_heads)


def _converted(model: Any, name: str, parameter: Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """Return the bytes of one tensor as they stand in the file, as an array."""
    config = model.config
    family: Family = family_of(config.model_type)
    number, module, _ = split_name(config.model_type, name)
    value = parameter.detach()
    if number is not None and module in family.permuted:
        value = permute(value, heads_of(config, module))
    if _is_transposed(config.model_type, name, parameter):
        value = value.T
    stored = value.to(DTYPES[dtype][0]).contiguous()
    if dtype == "float16" and not bool(torch.isfinite(stored).all()):
        raise ConfigError(
            f"weight {name} has values too large for float16; write the GGUF file in bfloat16"
        )
    if dtype == "bfloat16":
        stored = stored.view(torch.int16)
    return stored.numpy()


def _frequency_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """Return float32 [head_dim / 2] that divide the frequencies, for Llama 3's scaling; or None.

    Source: Llama 3.1's rope scaling as in transformers' `_compute_llama3_parameters`: long waves
    are divided by `factor`, short ones kept, those between interpolated.
    """
    if not family_of(config.model_type).rotary:
        return None
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    width, base, factor = head_width(config), float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    factors = []
    for index in range(0, width, 2):
        wave = 2 * math.pi * base ** (index / width)
        if wave < context / high:
            factors.append(1.0)
        elif wave > context / low:
            factors.append(factor)
        else:
            smooth = (context / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)
