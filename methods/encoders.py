"""Encoders: models that read a whole text in both directions and answer with vectors.

What a model is stands in its configuration. A type for which transformers has a masked-language
head, and that is set up neither as a decoder nor as an encoder with a decoder, reads both ways:
it is loaded with that head where `architectures` names it (or the class of the pre-training that
had it), and bare otherwise. Every other model is a causal language model, as far as there is one.

A sentence's embedding is made of the last hidden states of its tokens. How stands in
`config.sentence_pooling` (the loader takes it from the file that sentence-transformers writes,
`1_Pooling/config.json`); without it, the mean over the tokens that are no padding.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
)

from kernels.errors import ConfigError

Kind = Literal["causal", "masked", "bare"]

MEAN, CLS, MAX = "mean", "cls", "max"
POOLING = "sentence_pooling"

EMBED, FILL, MEMORY = "embed", "fill", "memory"


@runtime_checkable
class Encoding(Protocol):
    """An engine of capability `embed`; `input_ids` and `attention_mask` are int64 [B, T].

    The mask is 1 for tokens and 0 for the padding behind them.
    """

    @property
    def couples_rows(self) -> bool:
        """Whether what is read beside a sequence changes its result."""
        ...

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden states, float32 [B, T, H]."""
        ...

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one vector a sequence, float32 [B, H], of any length."""
        ...


@runtime_checkable
class Filling(Encoding, Protocol):
    """An engine of capability `fill`: it says what stands at a masked position."""

    def fill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return float32 logits [B, T, V]."""
        ...


def kind_of(config: Any) -> Kind | None:
    """Return what a transformers configuration describes; None for neither of the kinds."""
    named = (getattr(config, "architectures", None) or [None])[0]
    both_ways = not (
        getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    )
    causal = _class_name(AutoModelForCausalLM, config)
    masked = _class_name(AutoModelForMaskedLM, config)
    if both_ways and masked is not None and (named is None or named != causal):
        with_head = (masked, _class_name(AutoModelForPreTraining, config))
        return "masked" if named in with_head else "bare"
    return None if causal is None else "causal"


def _class_name(auto: Any, config: Any) -> str | None:
    """Return the class that `auto` makes of `config`, or None."""
    if type(config) not in auto._model_mapping:
        return None
    found = auto._model_mapping[type(config)]
    return str((found[0] if isinstance(found, tuple) else found).__name__)


def auto_class(config: Any) -> Any:
    """Return the Auto class of transformers that builds the model of `config`.

    Raises:
        ConfigError: it is neither a causal language model nor an encoder.
    """
    kind = kind_of(config)
    if kind is None:
        raise ConfigError(
            f"a {config.model_type} model is neither a causal language model nor an encoder with a "
            "masked-language head in transformers, so nothing here can measure it"
        )
    classes = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "bare": AutoModel}
    return classes[kind]


def is_encoder(model: Any) -> bool:
    """Whether `model` (may be on meta) is an encoder."""
    return kind_of(model.config) in ("masked", "bare")


def context_length(model: Any) -> int:
    """Return the most tokens that an encoder reads at once.

    Where positions count from behind the padding's own (RoBERTa), those before are no places.
    """
    places = int(model.config.max_position_embeddings)
    words = model.get_input_embeddings()
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is words:
            continue
        if module.num_embeddings == places and module.padding_idx is not None:
            return places - module.padding_idx - 1
    return places


def other_heads(config: Any) -> set[str]:
    """Return the tensors of an encoder's checkpoint that belong to heads which are not used.

    BERT's published weights hold those of next-sentence prediction, for which nobody asks.
    """
    names: set[str] = set()
    with torch.device("meta"):
        if _class_name(AutoModelForPreTraining, config) is not None:
            names |= set(AutoModelForPreTraining.from_config(config).state_dict())
        base = AutoModel.from_config(config)
    names |= {f"{base.base_model_prefix}.{name}" for name in base.state_dict()}
    return names


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Return one vector a sequence, float32 [B, H], of `hidden` [B, T, H] and int64 [B, T]."""
    mask = attention_mask.to(hidden.device)[..., None].bool()
    hidden = hidden.float()
    if pooling == CLS:
        return hidden[:, 0]
    if pooling == MAX:
        return hidden.masked_fill(~mask, -torch.inf).amax(1)
    return hidden.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)
