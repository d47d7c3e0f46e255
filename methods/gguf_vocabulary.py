"""A tokenizer of transformers from the vocabulary that a GGUF file carries.

llama.cpp's pre-tokenizers are compiled into it, so the file has a name where tokenizer.json has an
expression; the expressions known here are tried and the result is held against llama.cpp's own
splitting of the check texts. SentencePiece's scores become ranks of merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels.errors import ConfigError
from methods.gguf_header import read_header
from methods.gguf_splitting import CHECK_TEXTS, SPLITTINGS, Splitting, llama_cpp_splitter
from methods.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED

LONGEST_TOKEN = 4096
"""Characters; SentencePiece's pieces are cut at every place, which takes the square of them."""
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def write_tokenizer(path: Path, into: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of the GGUF file `path` into folder `into`.

    Raises:
        ConfigError: the file has no vocabulary, or one that is not split here as llama.cpp does.
    """
    from transformers import AutoTokenizer

    fields = read_header(path).fields
    check_vocabulary(path, fields)
    around, expected = _llama_cpp(path)
    into.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(_settings(fields), indent=1)
    for state in _states(fields, around):
        (into / "tokenizer_config.json").write_text(settings)
        (into / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False))
        tokenizer = AutoTokenizer.from_pretrained(into, local_files_only=True)
        if [tokenizer(text).input_ids for text in CHECK_TEXTS] == expected:
            return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (into / name).unlink(missing_ok=True)
    kind = fields.get("tokenizer.ggml.pre", fields.get("tokenizer.ggml.model"))
    raise ConfigError(
        f"{path} has a tokenizer ({kind}) that cannot be rebuilt here as llama.cpp has it; name "
        "the model it was made from with model.reference"
    )


def check_vocabulary(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise ConfigError where the parts of the vocabulary in the header `fields` do not fit."""

    def listed(key: str, kind: type[Any], length: int | None) -> bool:
        found = fields.get(f"tokenizer.ggml.{key}")
        return found is None or (
            isinstance(found, list)
            and all(type(one) is kind for one in found)
            and length in (None, len(found))
        )

    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not listed("tokens", str, None):
        raise ConfigError(f"{path} has no vocabulary")
    count = len(tokens)
    fits = listed("token_type", int, count) and listed("scores", float, count)
    if not fits or not listed("merges", str, None) or max(map(len, tokens)) > LONGEST_TOKEN:
        raise ConfigError(f"{path} has a vocabulary whose parts do not fit together")


def _llama_cpp(path: Path) -> tuple[tuple[int | None, int | None], list[list[int]]]:
    """Return what llama.cpp puts around a text, and how it splits the check texts."""
    with llama_cpp_splitter(path) as split:
        if split is None:
            raise ConfigError(f"{path} has a vocabulary that llama.cpp does not load")
        ids = [split(text) for text in CHECK_TEXTS]
        if not any(len(found) > 2 for found in ids):
            raise ConfigError(
                f"{path} has a vocabulary without text; name the model it was made from with "
                "model.reference"
            )
        return split.around(), ids


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for key, name in SPECIAL.items():
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            settings[f"{name}_token"] = tokens[number]
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return settings


def _states(
    fields: Mapping[str, Any], around: tuple[int | None, int | None]
) -> Iterator[dict[str, Any]]:
    """Yield contents of tokenizer.json that may split as llama.cpp does, likeliest first."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    # Of tokens with the same text the last one counts in llama.cpp.
    vocabulary = {text: number for number, text in enumerate(tokens)}
    base = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(number, text, types[number] != USER_DEFINED)
            for text, number in vocabulary.items()
            if types[number] in (CONTROL, USER_DEFINED, UNKNOWN)
        ],
        "post_processor": _template(tokens, around),
    }
    if fields.get("tokenizer.ggml.model") == "llama":
        yield base | _sentencepiece(fields, vocabulary, types)
    if fields.get("tokenizer.ggml.model") == "gpt2":
        merges = _known_merges(fields.get("tokenizer.ggml.merges") or [], vocabulary)
        named = fields.get("tokenizer.ggml.pre")
        for name in sorted(SPLITTINGS, key=lambda name: name != named):
            yield base | _byte_level(vocabulary, merges, SPLITTINGS[name])


def _added(number: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": special}


def _template(tokens: list[str], around: tuple[int | None, int | None]) -> dict[str, Any]:
    before, after = (
        [{"SpecialToken": {"id": tokens[number], "type_id": 0}}] if number is not None else []
        for number in around
    )
    text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    second: list[dict[str, Any]] = [{"Sequence": {"id": "B", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": before + text + after,
        "pair": before + text + second + after,
        "special_tokens": {
            tokens[number]: {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]}
            for number in around
            if number is not None
        },
    }


def _bpe(vocabulary: Mapping[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _known_merges(pairs: list[str], vocabulary: Mapping[str, int]) -> list[list[str]]:
    split = [pair.partition(" ") for pair in pairs]
    return [
        [left, right]
        for left, _, right in split
        if left in vocabulary and right in vocabulary and left + right in vocabulary
    ]


def _byte_level(
    vocabulary: Mapping[str, int], merges: list[list[str]], splitting: Splitting
) -> dict[str, Any]:
    cuts: list[dict[str, Any]] = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in splitting.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cuts.append({**byte_level, "use_regex": False})
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "decoder": {**byte_level, "use_regex": True},
        "model": _bpe(vocabulary, merges) | {"ignore_merges": splitting.ignore_merges},
    }


def _sentencepiece(
    fields: Mapping[str, Any], vocabulary: Mapping[str, int], types: list[int]
) -> dict[str, Any]:
    """Return SentencePiece as merges: every pair of pieces that makes a piece, best score first."""
    scores = fields.get("tokenizer.ggml.scores") or [0.0] * len(types)
    ranked = []
    for text, number in vocabulary.items():
        if types[number] in (NORMAL, USER_DEFINED, UNUSED):
            for cut in range(1, len(text)):
                if text[:cut] in vocabulary and text[cut:] in vocabulary:
                    ranked.append((-scores[number], number, cut, text))
    merges = [[text[:cut], text[cut:]] for _, _, cut, text in sorted(ranked)]
    unknown = next((text for text, number in vocabulary.items() if types[number] == UNKNOWN), None)
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    ]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    flags = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": BYTE in types}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, merges) | flags,
    }
