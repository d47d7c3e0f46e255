"""Tiny models and tokenizers of the kinds that GGUF files hold; llama.cpp's logits of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from methods.gguf_splitting import CHECK_TEXTS
from tests.architectures import CONFIGS, CONTEXT

_LLAMA = CONFIGS["llama"]

KINDS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_tied": CONFIGS["llama_tied"],
    # Heads wider together than the hidden state, and every bias that llama.cpp's Llama can have.
    "llama_wide": {**_LLAMA, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "llama_linear": {
        **_LLAMA,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    },
    "llama3": {
        **_LLAMA,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 2,
        },
    },
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": None},
    "qwen2": CONFIGS["qwen2"],
    "gpt2": CONFIGS["gpt2"],
}


def tiny_kind(kind: str, changes: Mapping[str, Any] | None = None) -> Any:
    """Return a model of KINDS with some values of its configuration changed, in float32.

    Every parameter is drawn, norms and biases too, so that no two are alike and a mix-up shows.
    """
    config = {**KINDS[kind], **(changes or {})}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            # Norms around 1 keep the hidden state large enough to matter.
            parameter.copy_(drawn * 0.3 + (parameter.ndim == 1))
    return model.eval()


def byte_level_tokenizer(
    patterns: tuple[str, ...], ignore_merges: bool = False, add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on the check texts, which `patterns` cut first."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CHECK_TEXTS * 3, trainer)
    return _wrapped(tokenizer, add_bos)


def sentencepiece_tokenizer(metaspace: bool = False, prefix: bool = True) -> Any:
    """Return a BPE as SentencePiece makes them: byte tokens, every pair that gives a piece.

    `metaspace`: spaces are replaced by the pre-tokenizer, as newer files have it, and not by the
    normalizer; `prefix`: a space is put before the text.
    """
    text = [f"▁{text.replace(' ', '▁')}" for text in CHECK_TEXTS]
    learner = Tokenizer(models.BPE())
    learner.train_from_iterator(
        text * 3, trainers.BpeTrainer(vocab_size=330, show_progress=False, limit_alphabet=60)
    )
    learned = learner.get_vocab()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted((piece for piece in learned if len(piece) > 1), key=learned.__getitem__)
    pieces += sorted((piece for piece in learned if len(piece) == 1), key=learned.__getitem__)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="always" if prefix else "never", split=False
        )
    else:
        prepend: list[Any] = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    return _wrapped(tokenizer, add_bos=True, unknown="<unk>")


def _wrapped(
    tokenizer: Tokenizer, add_bos: bool, unknown: str | None = None
) -> PreTrainedTokenizerFast:
    if add_bos:
        number = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", number)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token=unknown
    )


def llama_cpp_logits(path: Path, ids: Tensor) -> Tensor:
    """Return llama.cpp's float32 logits [B, T, V] of int64 `ids` [B, T]: one thread, F32 cache."""
    from methods.llamacpp_engine import library

    api = library().api
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = ids.shape[1]
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = api.GGML_TYPE_F32
    settings.flash_attn_type = 0  # off: it rounds keys and values
    context = api.llama_init_from_model(model, settings)
    width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    try:
        rows = [_row(api, context, row, width) for row in ids.tolist()]
    finally:
        api.llama_free(context)
        api.llama_model_free(model)
    return torch.stack(rows)


def _row(api: Any, context: Any, row: list[int], width: int) -> Tensor:
    api.llama_memory_clear(api.llama_get_memory(context), True)
    batch = api.llama_batch_init(len(row), 0, 1)
    try:
        batch.n_tokens = len(row)
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = True
        assert api.llama_decode(context, batch) == 0
        logits = np.ctypeslib.as_array(api.llama_get_logits(context), shape=(len(row), width))
        return torch.from_numpy(logits.copy())
    finally:
        api.llama_batch_free(batch)


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence, nats, of logits [..., V] from those of the reference."""
    first, second = (logits.double().log_softmax(-1) for logits in (reference, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


def quantize_with_llama_cpp(source: Path, into: Path, ftype: str) -> None:
    """Write the file `source` as `into` in a type that llama.cpp names, such as `Q8_0`."""
    import ctypes

    from methods.llamacpp_engine import library

    api = library().api
    settings = api.llama_model_quantize_default_params()
    settings.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    settings.nthread = 1
    settings.pure = True
    code = api.llama_model_quantize(
        str(source).encode(), str(into).encode(), ctypes.byref(settings)
    )
    assert code == 0
