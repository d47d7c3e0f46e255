"""Tiny seeded encoders of several architectures, with tokenizer and checkpoint, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from methods.encoders import auto_class

CONTEXT, VOCABULARY = 64, 96
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, CLS, SEP, MASK = 0, 2, 3, 4

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": PAD,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_BERT, "model_type": "bert", "architectures": ["BertModel"]},
    "bert_masked": {**_BERT, "model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "roberta": {**_BERT, "model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
    "distilbert": {
        "model_type": "distilbert",
        "architectures": ["DistilBertForMaskedLM"],
        "vocab_size": VOCABULARY,
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD,
    },
}


def tiny_encoder(kind: str) -> Any:
    """Return the model in float32, every parameter drawn so that no two are alike."""
    config = dict(CONFIGS[kind])
    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = auto_class(made).from_config(made)
    model.config.dtype = torch.float32
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer of letters and a few endings, with BERT's special tokens."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *".,!?0123456789"]
    tokenizer = Tokenizer(
        models.WordPiece(
            vocab={piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def write_encoder(folder: Path, kind: str = "bert", pooling: str | None = None) -> Any:
    """Write model and tokenizer into `folder`; return the model.

    `pooling` is the flag that sentence-transformers' file has true (`cls_token`), None: no file.
    """
    model = tiny_encoder(kind)
    model.save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    if pooling is not None:
        flags = {f"pooling_mode_{flag}": False for flag in ("cls_token", "mean_tokens")}
        (folder / "1_Pooling").mkdir()
        path = folder / "1_Pooling" / "config.json"
        path.write_text(json.dumps({**flags, f"pooling_mode_{pooling}": True}))
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and mask, int64 [3, 12], of three sequences of 12, 7 and 9 tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(len(SPECIAL), VOCABULARY, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 7, 9)):
        ids[row, length:], mask[row, length:] = PAD, 0
    return ids, mask
