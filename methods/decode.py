"""Decoding in C: which models `kernels/c/decode.c` can run, and the check that it runs this one.

A model is taken by what it is built of, never by its name: modules and settings are those of
transformers' Llama, Mistral, Qwen 2 and Qwen 3, norm, activation and rotary embedding compute what
the C code does, and a few tokens decoded both ways agree. For any other model one sentence says
why transformers itself decodes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.decode_step import Block, DecodeStep, Shape, Weights, dense
from kernels.host_build import HostBuildError
from methods import graphed
from methods.base import Cache, Hardware
from methods.engine import FastDecode, relative_difference
from methods.kv_cache import BufferedCache, BufferedLayer

NAME = "one C call a token (kernels/c/decode.c)"
MOST_SEQUENCES = 8
"""Larger batches are read by the model: its matrix products share each weight among more tokens."""

CHECKED_TOKENS, CHECKED_STEPS = 12, 2
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest difference of the logits, root mean square over that of the logits about their mean. The
model rounds to bfloat16 between any two operations, the C code only before a matrix."""

INT8_ROOM = 3.0
"""Times as much for matrices that round their activations to int8: a code flips where the model has
rounded to bfloat16 before, and then moves by a whole step."""

EXACT = 1e-4
"""Largest relative difference of one norm, activation or rotation in float32."""

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")

# What modules may consist of (names of transformers), and which of their settings change nothing.
_MODEL = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
_BLOCK = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_HEAD_NORMS = frozenset({"q_norm", "k_norm"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_PRETRAINED = frozenset(
    {"all_tied_weights_keys", "config", "generation_config", "gradient_checkpointing"}
    | {"has_sliding_layers", "kernel_config", "loss_type", "name_or_path", "padding_idx"}
    | {"vocab_size"}
)
_SETTINGS = frozenset(
    {"attention_dropout", "attention_type", "config", "gradient_checkpointing", "head_dim"}
    | {"hidden_size", "intermediate_size", "is_causal", "layer_idx", "layer_type"}
    | {"num_key_value_groups", "scaling"}
)


class _NotKnownError(Exception):
    """The model does something that the C code does not: what, as half a sentence."""


@runtime_checkable
class InC(Protocol):
    """A linear map that the C code can read."""

    def in_c(self, dtype: torch.dtype) -> Weights | str:
        """Return it for activations of `dtype`, or why the C code cannot read it."""
        ...


class CDecode:
    """Decodes one token of up to `MOST_SEQUENCES` sequences in one C call."""

    name = NAME

    def __init__(self, model: Any, step: DecodeStep, dtype: torch.dtype) -> None:
        self._embed = model.model.embed_tokens
        self._rotation = _Rotation(model.model.rotary_emb, step, dtype)
        self._step = step

    def decode(self, token: Tensor, cache: Cache) -> Tensor | None:
        """Read int64 [B, 1]; return float32 logits [B, 1, V] and advance `cache` in place.

        None, and nothing done, for a larger batch or a cache without the tokens before.
        """
        layers = cache.layers
        batch = token.shape[0]
        if batch > MOST_SEQUENCES or not _fits(layers, batch, self._step.shape.cache):
            return None
        length = layers[0].length
        for layer in layers:
            layer.reserve(1)
        x = self._embed(token[:, 0]).float().contiguous()
        kept = [(layer.key_buffer, layer.value_buffer) for layer in layers]
        logits = self._step(x, self._rotation.at(length), kept, length)
        for layer in layers:
            layer.length = length + 1
        return logits[:, None]


class _Rotation:
    """Cosines and sines of a position, from the model's own module, so that any scaling is right.

    They are kept in a table, except where they depend on how much has been read.
    """

    def __init__(self, rotary: Any, step: DecodeStep, dtype: torch.dtype) -> None:
        self._rotary = rotary
        self._like = torch.empty(1, 1, step.hidden, dtype=dtype)
        kind = rotary.rope_type
        self._fixed = "dynamic" not in kind and kind != "longrope"
        self._table = (torch.empty(0), torch.empty(0))

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of `position`, float32 [head_size]."""
        if not self._fixed:
            cos, sin = self._computed(position, position + 1)
            return cos[0], sin[0]
        if position >= self._table[0].shape[0]:
            self._table = self._computed(0, 2 * (position + 1))
        return self._table[0][position], self._table[1][position]

    def _computed(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(self._like, torch.arange(start, end)[None])
        return cos[0].float().contiguous(), sin[0].float().contiguous()


def fast_decode(model: Any, hardware: Hardware) -> tuple[FastDecode | None, str]:
    """Return what decodes `model` faster than itself, or None; its name, or why there is none."""
    if hardware.decode == "model":
        return None, "hardware.decode=model"
    if hardware.device == "cuda":
        return graphed.fast_decode(model, hardware)
    return c_decode(model)


def c_decode(model: Any) -> tuple[CDecode | None, str]:
    """Return what decodes `model` (on the CPU, in eval mode) in C, or None; its name, or why not.

    The model reads `CHECKED_TOKENS` tokens for the check, the C code the last `CHECKED_STEPS`.
    """
    try:
        step, dtype = _step_of(model)
        decode = CDecode(model, step, dtype)
    except (_NotKnownError, HostBuildError) as reason:
        return None, str(reason)
    room = INT8_ROOM if step.rounds_activations else 1.0
    difference, tolerance = _difference(model, decode), room * TOLERANCES[dtype]
    # Written so that NaN, too, is a disagreement.
    if not difference <= tolerance:
        return None, (
            f"logits decoded in C differ from the model's by {difference:.2g} of their size, and "
            f"{tolerance:.2g} is tolerated"
        )
    return decode, NAME


def _fits(layers: Sequence[Any], batch: int, dtype: torch.dtype) -> bool:
    """Return whether `layers` hold tokens of `batch` sequences, all as many, as the C code does."""
    return all(
        type(layer) is BufferedLayer
        and layer.key_buffer is not None
        and layer.key_buffer.shape[0] == batch
        and layer.key_buffer.dtype == dtype
        and layer.length == layers[0].length
        for layer in layers
    )


@torch.no_grad()
def _difference(model: Any, decode: CDecode) -> float:
    """Return the relative difference of the logits of the last tokens of two drawn sequences."""
    generator = torch.Generator().manual_seed(0)
    size = (2, min(CHECKED_TOKENS, model.config.max_position_embeddings))
    ids = torch.randint(model.config.vocab_size, size, generator=generator)
    cache = BufferedCache(model.config)
    expected = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=CHECKED_STEPS
    ).logits.float()
    for layer in cache.layers:
        layer.crop(-CHECKED_STEPS)
    steps = [
        decode.decode(ids[:, at : at + 1], cache)
        for at in range(ids.shape[1] - CHECKED_STEPS, ids.shape[1])
    ]
    found = torch.cat([step for step in steps if step is not None], dim=1)
    if found.shape != expected.shape:
        return float("nan")
    return relative_difference(found, expected)


@torch.no_grad()
def _step_of(model: Any) -> tuple[DecodeStep, torch.dtype]:
    """Return the decoder in C and the type of the model's activations.

    Raises:
        _NotKnownError: the model does something that the C code does not.
    """
    _check_outside(model)
    decoder = model.model
    dtype = decoder.embed_tokens(torch.zeros(1, dtype=torch.int64)).dtype
    if dtype not in TOLERANCES:
        raise _NotKnownError(f"activations in {dtype} are not read by the decode step in C")
    norm, epsilon = _norm(decoder.norm, "the last norm")
    blocks = [_block(block, epsilon, dtype) for block in decoder.layers]
    attention = decoder.layers[0].self_attn
    size = attention.head_dim
    shape = Shape(
        heads=blocks[0].query.matrix.rows // size,
        kv_heads=blocks[0].key.matrix.rows // size,
        head_size=size,
        cache=dtype,
        epsilon=epsilon,
        scaling=attention.scaling,
    )
    _check_blocks(decoder.layers, blocks, shape)
    _check_rotation(decoder, attention)
    return DecodeStep(blocks, norm, _linear(model.lm_head, "the head", dtype), shape), dtype


def _check_outside(model: Any) -> None:
    """Refuse what is wrong with the model as a whole, before its blocks are looked at."""
    for name, module in model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked or not {"_hf_hook", "forward"}.isdisjoint(vars(module)):
            raise _NotKnownError(
                f"{name or 'the model'} has a hook, which the C code would pass by"
            )
    _check_parts(model, "the model", frozenset({"model", "lm_head"}), frozenset(), _PRETRAINED)
    _check_parts(model.model, "the decoder", _MODEL, frozenset(), _PRETRAINED)
    for name in CAPS:
        if getattr(model.config, name, None) is not None:
            raise _NotKnownError(f"the model caps its scores or logits ({name})")
    for layer in BufferedCache(model.config).layers:
        if type(layer) is not BufferedLayer:
            raise _NotKnownError(
                f"layers keep a {type(layer).__name__}, not keys and values of all tokens"
            )


def _check_parts(
    module: nn.Module,
    what: str,
    wanted: frozenset[str],
    optional: frozenset[str],
    settings: frozenset[str],
) -> None:
    """Refuse a module with other parts or settings than those named."""
    found = {name for name, _ in module.named_children()}
    missing, other = wanted - found, found - wanted - optional
    if missing:
        raise _NotKnownError(f"{what} has no part named {', '.join(sorted(missing))}")
    if other:
        raise _NotKnownError(f"{what} has parts that the C code lacks: {', '.join(sorted(other))}")
    unknown = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in settings | {"training"}
        and not (name == "sliding_window" and value is None)
    }
    if unknown:
        raise _NotKnownError(
            f"{what} has settings that the C code lacks: {', '.join(sorted(unknown))}"
        )


def _block(block: Any, epsilon: float, dtype: torch.dtype) -> Block:
    """Return a decoder block for the C code."""
    attention, mlp = block.self_attn, block.mlp
    _check_parts(block, "a decoder block", _BLOCK, frozenset(), _SETTINGS)
    _check_parts(attention, "attention", _ATTENTION, _HEAD_NORMS, _SETTINGS)
    _check_parts(mlp, "the MLP", _MLP, frozenset(), _SETTINGS)
    parts = {name for name, _ in attention.named_children()}
    x = torch.linspace(-12, 12, 97)
    _check_equal(mlp.act_fn(x), functional.silu(x), "the activation of the MLP is not SiLU")
    return Block(
        attention_norm=_same_norm(block.input_layernorm, epsilon),
        mlp_norm=_same_norm(block.post_attention_layernorm, epsilon),
        query_norm=_same_norm(attention.q_norm, epsilon) if "q_norm" in parts else None,
        key_norm=_same_norm(attention.k_norm, epsilon) if "k_norm" in parts else None,
        query=_linear(attention.q_proj, "a linear map", dtype),
        key=_linear(attention.k_proj, "a linear map", dtype),
        value=_linear(attention.v_proj, "a linear map", dtype),
        output=_linear(attention.o_proj, "a linear map", dtype),
        gate=_linear(mlp.gate_proj, "a linear map", dtype),
        up=_linear(mlp.up_proj, "a linear map", dtype),
        down=_linear(mlp.down_proj, "a linear map", dtype),
    )


def _same_norm(module: Any, epsilon: float) -> Tensor:
    """Return the weight of a norm whose epsilon is that of all."""
    weight, own = _norm(module, "a norm")
    if own != epsilon:
        raise _NotKnownError(f"norms have several epsilons: {own:g} and {epsilon:g}")
    return weight


def _norm(module: Any, what: str) -> tuple[Tensor, float]:
    """Return weight (float32) and epsilon of an RMSNorm."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        weight is None
        or not isinstance(epsilon, float)
        or getattr(module, "bias", None) is not None
    ):
        raise _NotKnownError(f"{what} is a {type(module).__name__}, which is no RMSNorm")
    own = weight.detach().float().clone()
    x = torch.linspace(-1, 3, own.numel())
    plain = own * x * torch.rsqrt(x.square().mean() + epsilon)
    _check_equal(module(x).float(), plain, f"{what} computes something else than RMSNorm")
    return own, epsilon


def _linear(module: Any, what: str, dtype: torch.dtype) -> Weights:
    """Return a linear map for activations of `dtype`."""
    if type(module) is nn.Linear:
        if module.weight.dtype != dtype:
            raise _NotKnownError(f"{what} is {module.weight.dtype}, and activations are {dtype}")
        return dense(module.weight.detach(), module.bias)
    if not isinstance(module, InC):
        raise _NotKnownError(f"{what} is a {type(module).__name__}, which the C code cannot read")
    found = module.in_c(dtype)
    if isinstance(found, str):
        raise _NotKnownError(f"{what}: {found}")
    return found


def _check_blocks(layers: Any, blocks: Sequence[Block], shape: Shape) -> None:
    """Refuse blocks that differ in shape, or in how they attend."""
    sizes = {tuple(getattr(b, n).matrix.rows for n in ("query", "key", "gate")) for b in blocks}
    settings = {(layer.self_attn.head_dim, layer.self_attn.scaling) for layer in layers}
    if len(sizes) > 1 or len(settings) > 1:
        raise _NotKnownError("decoder blocks differ in shape")
    if shape.heads % shape.kv_heads or shape.head_size % 2:
        raise _NotKnownError(
            f"{shape.heads} heads of size {shape.head_size} over {shape.kv_heads} key heads"
        )


def _check_rotation(decoder: Any, attention: Any) -> None:
    """Refuse another rotary embedding than that of whole heads by halves."""
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise _NotKnownError("attention has no rotary embedding of the kind that the C code has")
    size = attention.head_dim
    positions = torch.arange(5, 8)[None]
    cos, sin = decoder.rotary_emb(torch.zeros(1, 3, size), positions)
    if cos.shape != (1, 3, size) or not hasattr(decoder.rotary_emb, "rope_type"):
        raise _NotKnownError("the rotary embedding turns only a part of each head")
    heads = torch.linspace(-1, 2, 3 * size).reshape(1, 1, 3, size)
    first, second = heads.chunk(2, dim=-1)
    turned = heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    found = rotate(heads, heads, cos, sin)
    for one in found:
        _check_equal(one, turned, "the rotary embedding does not turn a head by its halves")


def _check_equal(found: Tensor, expected: Tensor, sentence: str) -> None:
    if found.shape != expected.shape:
        raise _NotKnownError(sentence)
    if not float((found - expected).norm()) <= EXACT * float(expected.norm()):
        raise _NotKnownError(sentence)
