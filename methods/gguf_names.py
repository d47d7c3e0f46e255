"""How a model's parameters are called in a GGUF file, and which structures such a file can express.

The names and the structure of a GGUF file are llama.cpp's, one loader per architecture
(`src/models/*.cpp` there), so this table names families: the one place of the project that does.
Free of torch: names and configuration values only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kernels.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """One model family of transformers in llama.cpp's terms.

    Attributes:
        arch: llama.cpp's name of the architecture; two families may share one.
        model: class of the causal language model in transformers.
        blocks: what stands before a block's number in a parameter's name.
        ends, block: module names outside and inside the blocks -> tensor names.
        rotary: whether positions are rotations of queries and keys, not embeddings.
        permuted: modules whose rows are stored in another order, as llama.cpp rotates neighbouring
            rows where transformers rotates the two halves of a head.
        transposed: modules that transformers keeps as [in, out].
        activations: values of the activation function's key that llama.cpp computes.
    """

    arch: str
    model: str
    blocks: str
    ends: dict[str, str]
    block: dict[str, str]
    rotary: bool
    permuted: frozenset[str]
    transposed: frozenset[str]
    activations: tuple[str, ...]


_ROTARY_ENDS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ROTARY_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QUERY_AND_KEY = frozenset({"self_attn.q_proj", "self_attn.k_proj"})


def _rotary(arch: str, model: str, permuted: frozenset[str]) -> Family:
    return Family(
        arch=arch,
        model=model,
        blocks="model.layers.",
        ends=_ROTARY_ENDS,
        block=_ROTARY_BLOCK,
        rotary=True,
        permuted=permuted,
        transposed=frozenset(),
        activations=("silu", "swish"),
    )


FAMILIES: dict[str, Family] = {
    "llama": _rotary("llama", "LlamaForCausalLM", _QUERY_AND_KEY),
    # llama.cpp has no architecture of Mistral's: without a sliding window it is Llama's.
    "mistral": _rotary("llama", "MistralForCausalLM", _QUERY_AND_KEY),
    "qwen2": _rotary("qwen2", "Qwen2ForCausalLM", frozenset()),
    "gpt2": Family(
        arch="gpt2",
        model="GPT2LMHeadModel",
        blocks="transformer.h.",
        ends={
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        block={
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        rotary=False,
        permuted=frozenset(),
        transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        # The exact erf form (`gelu`) is another function than llama.cpp's.
        activations=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    ),
}

ROPE_FREQUENCIES = "rope_freqs.weight"
"""Tensor [head_dim / 2] that divides the rotations' frequencies (the scaling of Llama 3)."""


def family_of(model_type: str) -> Family:
    """Return the family called `model_type` in config.json.

    Raises:
        ConfigError: there is no exporter for it.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"models of type {model_type!r} cannot be written as GGUF here; "
            f"the types that can are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def model_type_of(arch: str) -> str:
    """Return the model type that a GGUF file of architecture `arch` is read as.

    Raises:
        ConfigError: it is not one of those written here.
    """
    for model_type, family in FAMILIES.items():
        if family.arch == arch:
            return model_type
    known = dict.fromkeys(family.arch for family in FAMILIES.values())
    raise ConfigError(
        f"GGUF files of architecture {arch!r} cannot be read here; "
        f"the architectures that can are {', '.join(known)}"
    )


def split_name(model_type: str, parameter: str) -> tuple[str | None, str, str]:
    """Return (block number or None, module inside the block or outside, `weight` or `bias`).

    Raises:
        ConfigError: the family has no such parameter.
    """
    family = family_of(model_type)
    module, _, kind = parameter.rpartition(".")
    if kind in ("weight", "bias"):
        if module in family.ends:
            return None, module, kind
        if module.startswith(family.blocks):
            number, _, inner = module.removeprefix(family.blocks).partition(".")
            if number.isdigit() and inner in family.block:
                return number, inner, kind
    raise ConfigError(
        f"parameter {parameter!r} has no place in a GGUF file of architecture {family.arch!r}; "
        f"only models with exactly the structure of {model_type} can be exported"
    )


def gguf_name(model_type: str, parameter: str) -> str:
    """Return the tensor that holds `parameter`, named as in `model.state_dict()`.

    Raises:
        ConfigError: the family is unknown or has no such parameter.
    """
    family = family_of(model_type)
    number, module, kind = split_name(model_type, parameter)
    if number is None:
        return f"{family.ends[module]}.{kind}"
    return f"blk.{number}.{family.block[module]}.{kind}"


def hf_names(model_type: str, tensor: str) -> list[str]:
    """Return the parameters that a GGUF tensor holds: one, or none for a table of frequencies.

    Raises:
        ConfigError: the family is unknown or its files have no such tensor.
    """
    family = family_of(model_type)
    if family.rotary and tensor == ROPE_FREQUENCIES:
        return []
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor)
    if match is not None:
        number, stem, kind = match.groups()
        names = family.ends if number is None else family.block
        prefix = "" if number is None else f"{family.blocks}{number}."
        for module, own in names.items():
            if own == stem:
                return [f"{prefix}{module}.{kind}"]
    raise ConfigError(
        f"GGUF tensor {tensor!r:.80} is none of architecture {family.arch!r} that can be read here"
    )


def check_structure(config: Any) -> None:
    """Raise ConfigError where llama.cpp's architecture computes something else than the model.

    `config` is the model's configuration (`transformers.PreTrainedConfig`).
    """
    model_type = config.model_type
    family = family_of(model_type)
    for reason in (
        _activation(config, family),
        _window(config),
        _rope(config) if family.rotary else _gpt2(config),
        _widths(config, family),
    ):
        if reason is not None:
            raise ConfigError(f"this {model_type} model cannot be written as GGUF: {reason}")


def _activation(config: Any, family: Family) -> str | None:
    key = "hidden_act" if family.rotary else "activation_function"
    name = getattr(config, key, family.activations[0])
    if name in family.activations:
        return None
    return f"its {key} is {name!r}, and llama.cpp computes {family.activations[0]!r} for it"


def _window(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    if window >= config.max_position_embeddings:
        return None  # a window that no context fills is none
    return (
        f"its attention slides over {window} of {config.max_position_embeddings} tokens, "
        "which llama.cpp does not do for it; set sliding_window to null in config.json to run it "
        "with full attention"
    )


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotation's parameters of a configuration; `rope_type` and `rope_theta` are set."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    return {"rope_type": "default", "rope_theta": 10000.0} | found


def _rope(config: Any) -> str | None:
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        return (
            f"its rope_type is {rope['rope_type']!r}; the exporter writes default, linear and "
            "llama3"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates a part of each head only"
    return None


def _gpt2(config: Any) -> str | None:
    if not config.scale_attn_weights:
        return "it does not scale its attention (scale_attn_weights is false)"
    if config.scale_attn_by_inverse_layer_idx:
        return "it scales its attention by layer (scale_attn_by_inverse_layer_idx is true)"
    return "it has cross-attention" if config.add_cross_attention else None


def head_width(config: Any) -> int:
    """Return the width of one attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _widths(config: Any, family: Family) -> str | None:
    whole = head_width(config) * config.num_attention_heads
    if family.arch != "llama" and whole != config.hidden_size:
        return (
            f"its heads are {whole} wide together and its hidden state {config.hidden_size}, "
            f"which llama.cpp takes for equal in architecture {family.arch!r}"
        )
    return None
