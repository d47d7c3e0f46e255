"""Tiny seeded models of several architectures, and their checkpoints, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320
CONTEXT = 64
BOS, BOS_ID = "<s>", 256

_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": BOS_ID,
    "pad_token_id": None,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_tied": {**_LLAMA, "tie_word_embeddings": True},
    "qwen2": {**_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "mixtral": {
        **_LLAMA,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "bos_token_id": BOS_ID,
        "eos_token_id": BOS_ID,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 1,
        "bos_token_id": BOS_ID,
        "eos_token_id": BOS_ID,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS_ID,
        "eos_token_id": BOS_ID,
        "tie_word_embeddings": False,
    },
}


def tiny(kind: str) -> Any:
    """Return the model in float32, every parameter drawn so that no two are alike."""
    config = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: fresh ones are all 1 or 0 and hide a mix-up.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes and `<s>`, which it puts before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, BOS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)


def write_checkpoint(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """Write model and tokenizer into `folder`, stored in `dtype`; return the model."""
    model = tiny(kind).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def tiny_ids(samples: int = 2, length: int = 24) -> Tensor:
    """Return int64 [samples, length]."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (samples, length), generator=generator)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return float32 logits [B, T, V]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()
