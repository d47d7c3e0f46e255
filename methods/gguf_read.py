"""Reads GGUF files without llama.cpp: the configuration they state, and the weights.

The quantized blocks are decoded by `gguf.quants`, which is not the code that llama.cpp runs: an
independent reading of the same bytes. Importing this module imports neither torch nor gguf.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kernels.errors import ConfigError
from methods.gguf_header import Header, StoredTensor, read_header
from methods.gguf_names import (
    ROPE_FREQUENCIES,
    family_of,
    hf_names,
    model_type_of,
    split_name,
)

MOST_SHOWN = 8
"""Entries of a list that a sentence shows."""

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return what is stored for each parameter, named as in transformers; as stored.

    A head that is the embedding is not in the file and not here.

    Raises:
        ConfigError: the file cannot be read, or has tensors of another architecture.
    """
    header = read_header(path)
    model_type = _model_type(path, header.fields)
    return {
        parameter: tensor
        for name, (tensor, _) in header.tensors.items()
        for parameter in hf_names(model_type, name)
    }


def _model_type(path: Path, fields: dict[str, Any]) -> str:
    arch = fields.get("general.architecture")
    if not isinstance(arch, str):
        raise ConfigError(f"{path} does not say which architecture it holds")
    return model_type_of(arch)


class _Fields:
    """The metadata of one architecture, each value asked for with the type it must have."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.arch = header.fields["general.architecture"]

    def get(self, key: str, kind: type[int] | type[float] | type[str]) -> Any:
        """Return the value of `<architecture>.<key>`, or None."""
        value = self.header.fields.get(f"{self.arch}.{key}")
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one for each block, all alike
        if value is None or isinstance(value, kind):
            return value
        long = isinstance(value, list) and len(value) > MOST_SHOWN
        shown = f"a list of {len(value)}" if long else f"{value!r:.80}"
        raise ConfigError(
            f"{self.path} states {self.arch}.{key} as {shown}; one {kind.__name__} is known here"
        )

    def need(self, key: str) -> int:
        value = self.get(key, int)
        if value is None or value < 1:
            raise ConfigError(f"{self.path} does not state {self.arch}.{key}; write it again")
        return int(value)

    def real(self, key: str, default: float) -> float:
        value = self.get(key, float)
        if value is not None and not math.isfinite(value):
            raise ConfigError(
                f"{self.path} states {self.arch}.{key} as {value}, which is no number"
            )
        # Shortest text of the float32: 1e-06 and not 9.999999974752427e-07.
        return default if value is None else float(f"{value:.7g}")

    def token(self, kind: str) -> int | None:
        value = self.header.fields.get(f"tokenizer.ggml.{kind}_token_id")
        return value if isinstance(value, int) else None


def read_config(path: Path) -> dict[str, Any]:
    """Return the model's configuration as config.json of the same model has it; reads no weights.

    A Mistral model without sliding window is a Llama model in GGUF, and read as one. `dtype` is the
    floating type of the matrices where they have one, else float16.

    Raises:
        ConfigError: the file cannot be read, or is of an architecture or structure that is not
            known here.
    """
    return _config(path, read_header(path))


def _config(path: Path, header: Header) -> dict[str, Any]:
    model_type = _model_type(path, header.fields)
    fields = _Fields(path, header)
    family = family_of(model_type)
    types = {tensor.type for tensor, _ in header.tensors.values() if len(tensor.shape) > 1}
    types -= {"F32"} if len(types) > 1 else set()
    shape = _shape(header, path, "token_embd.weight", 2)
    config = {
        "architectures": [family.model],
        "model_type": model_type,
        "dtype": FLOATS.get(types.pop(), "float16") if len(types) == 1 else "float16",
        "vocab_size": shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": fields.token("bos"),
        "eos_token_id": fields.token("eos"),
        "pad_token_id": fields.token("padding"),
    }
    _check_shapes(fields, shape[1])
    return config | (_rotary_config(fields) if family.rotary else _gpt2_config(fields))


def _shape(header: Header, path: Path, name: str, dimensions: int) -> tuple[int, ...]:
    tensor = header.tensors.get(name)
    if tensor is None or len(tensor[0].shape) != dimensions:
        raise ConfigError(f"{path} has no tensor {name!r} of {dimensions} dimensions")
    return tensor[0].shape


def _check_shapes(fields: _Fields, width: int) -> None:
    """Raise ConfigError where metadata and tensors disagree on the size of the model."""
    blocks = sum(name.endswith(".attn_norm.weight") for name in fields.header.tensors)
    inner = _shape(fields.header, fields.path, "blk.0.ffn_up.weight", 2)[0]
    for key, found in (
        ("embedding_length", width),
        ("block_count", blocks),
        ("feed_forward_length", inner),
    ):
        if fields.need(key) != found:
            raise ConfigError(
                f"{fields.path} states {fields.arch}.{key} as {fields.need(key)}, and its tensors "
                f"are for {found}"
            )
    heads = fields.need("attention.head_count")
    if fields.get("attention.key_length", int) is None and width % heads:
        raise ConfigError(f"{fields.path} states {heads} heads of a model {width} wide")


def _rotary_config(fields: _Fields) -> dict[str, Any]:
    hidden, heads = fields.need("embedding_length"), fields.need("attention.head_count")
    width = fields.get("attention.key_length", int) or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if (fields.get(key, int) or width) != width:
            raise ConfigError(f"{fields.path} has heads of several widths, which is not known here")
    if fields.get("expert_count", int):
        raise ConfigError(f"{fields.path} has experts; only models without them can be read here")
    tensors = fields.header.tensors
    config = {
        "hidden_size": hidden,
        "intermediate_size": fields.need("feed_forward_length"),
        "num_hidden_layers": fields.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", int) or heads,
        "max_position_embeddings": fields.need("context_length"),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon", 1e-5),
        "hidden_act": "silu",
        "rope_parameters": _rope_parameters(fields, width),
    }
    if fields.arch == "llama":
        config["head_dim"] = width
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return config


def _rope_parameters(fields: _Fields, width: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": fields.real("rope.freq_base", 10000.0),
    }
    factor = fields.real("rope.scaling.factor", 1.0)
    scaling = fields.get("rope.scaling.type", str) or "linear"
    if scaling not in ("none", "linear"):
        raise ConfigError(f"{fields.path} scales its rotations by {scaling!r:.40}, unknown here")
    if scaling == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if ROPE_FREQUENCIES not in fields.header.tensors:
        return rope
    if _shape(fields.header, fields.path, ROPE_FREQUENCIES, 1) != (width // 2,):
        raise ConfigError(f"{fields.path} has rotations of another width than its heads")
    factors = [float(value) for value in _decoded(fields.path, fields.header, ROPE_FREQUENCIES)]
    # The file has the divisors, not the rule of Llama 3 that made them: transformers takes
    # divisors as they are under this name, short and long ones.
    return rope | {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": fields.need("context_length"),
    }


def _gpt2_config(fields: _Fields) -> dict[str, Any]:
    return {
        "n_embd": fields.need("embedding_length"),
        "n_inner": fields.need("feed_forward_length"),
        "n_layer": fields.need("block_count"),
        "n_head": fields.need("attention.head_count"),
        "n_positions": fields.need("context_length"),
        "layer_norm_epsilon": fields.real("attention.layer_norm_epsilon", 1e-5),
        "activation_function": "gelu_new",
    }


def _decoded(path: Path, header: Header, name: str) -> Any:
    """Return one tensor as a float32 array of its shape; quantized blocks through gguf.quants."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor, offset = header.tensors[name]
    data = np.memmap(path, np.uint8, "r", offset, (tensor.bytes,))
    rows = data.reshape(*tensor.shape[:-1], -1)
    kind = GGMLQuantizationType[tensor.type]
    if tensor.type in ("F32", "F16"):
        rows = rows.view(np.float32 if tensor.type == "F32" else np.float16)
    try:
        values = dequantize(rows, kind)
    except NotImplementedError:
        raise ConfigError(
            f"{path} stores {name!r} as {tensor.type}, which the gguf package cannot decode"
        ) from None
    # A copy: what is mapped from the file cannot be written to, which torch warns of.
    return np.array(values, dtype=np.float32).reshape(tensor.shape)


def _as_transformers(config: Any, parameter: str, value: Any) -> Any:
    """Return a decoded tensor in the orientation and order of rows that transformers has."""
    family = family_of(config.model_type)
    number, module, _ = split_name(config.model_type, parameter)
    if number is None:
        return value
    if module in family.transposed and value.ndim == 2:
        return value.T.contiguous()
    if module in family.permuted:
        kv = module.endswith("k_proj")
        heads = config.num_key_value_heads if kv else config.num_attention_heads
        # Neighbouring pairs back to the two halves of a head.
        pairs = value.reshape(heads, -1, 2, *value.shape[1:])
        return pairs.transpose(1, 2).reshape(value.shape)
    return value


def load_dequantized(path: Path) -> Any:
    """Return the file's model of transformers in float32 on the CPU, every weight decoded.

    Independent of llama.cpp: the blocks are decoded by `gguf.quants`, tensors renamed, and rows of
    queries and keys put back into transformers' order.

    Raises:
        ConfigError: the file cannot be read, or tensors are missing or of another shape.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    header = read_header(path)
    facts = _config(path, header)
    config = CONFIG_MAPPING[facts["model_type"]].from_dict({**facts, "dtype": "float32"})
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config).eval()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights = {}
    for name in header.tensors:
        for parameter in hf_names(facts["model_type"], name):
            weights[parameter] = _as_transformers(
                config, parameter, torch.from_numpy(_decoded(path, header, name))
            )
    if facts["tie_word_embeddings"]:
        expected.pop("lm_head.weight", None)
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        wrong = min({name for name, _ in found.items() ^ expected.items()})
        raise ConfigError(
            f"{path}: parameter {wrong} is {found.get(wrong)}, and {expected.get(wrong)} is needed"
        )
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(False)


def tokenizer_files(path: Path, into: Path) -> None:
    """Write the tokenizer that the file `path` carries as transformers reads it into `into`.

    tokenizer.json and tokenizer_config.json, verified to split as llama.cpp does.

    Raises:
        ConfigError: the file has no vocabulary, or one that cannot be rebuilt.
    """
    from methods.gguf_vocabulary import write_tokenizer

    write_tokenizer(path, into)
