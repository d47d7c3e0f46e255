"""The vocabulary of a GGUF file, from a tokenizer of transformers, held against llama.cpp's own.

llama.cpp has two tokenizers that matter here: SentencePiece's (`llama`: neighbours are merged that
give the piece of highest score) and byte-level BPE (`gpt2`: merges by rank, after a pre-tokenizer
named in the file). Which one a tokenizer is follows from the structure of its tokenizer.json, never
from a model's name, and the result is verified by splitting texts with llama.cpp itself.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernels.errors import ConfigError
from methods.gguf_names import family_of
from methods.gguf_splitting import (
    CHECK_TEXTS,
    SPLITTINGS,
    candidates,
    differing,
    parts,
    splitting_of,
)

NO_MERGE = "<none> <none>"
"""A merge of nothing: llama.cpp refuses a file without merges, and no text has such a symbol."""

# The same as gguf.TokenType, which is not imported for this.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"  # U+2581, what SentencePiece writes for a space


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: `llama` (SentencePiece) or `gpt2` (byte-level BPE).
        tokens, types: text and kind of each id, padded to the width of the model's logits.
        special: ids by the key they have in the file (`bos`, `eos`, `unknown`, `padding`).
        pre: llama.cpp's name of the pre-tokenizer, for `gpt2`.
        scores: order of merging for `llama`, highest first.
        merges: pairs for `gpt2`, first first.
        add_bos, add_eos: what the tokenizer puts around a text by itself.
        space_prefix: whether SentencePiece puts a space before a text.
        chat_template: Jinja text, or None.
    """

    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    special: Mapping[str, int]
    pre: str = "default"
    scores: Sequence[float] | None = None
    merges: Sequence[str] | None = None
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool = False
    chat_template: str | None = None

    def write(self, writer: Any) -> None:
        """Add everything to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        if self.model == "gpt2":
            writer.add_tokenizer_pre(self.pre)
        else:
            writer.add_add_space_prefix(self.space_prefix)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for kind, number in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def add_tokenizer(writer: Any, tokenizer: Any, config: Any) -> list[str]:
    """Add the vocabulary of `tokenizer` (None: placeholders) to `writer`; return notes.

    `config` is the model's configuration: its vocab_size is the number of ids written.

    Raises:
        ConfigError: the tokenizer is of a kind that a GGUF file cannot hold.
    """
    if tokenizer is None:
        placeholders(config).write(writer)
        return [
            "the model has no tokenizer: the GGUF file has placeholders for its tokens, and "
            "llama.cpp can be given token ids but no text"
        ]
    arch = family_of(config.model_type).arch
    vocabulary = vocabulary_of(tokenizer, config)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        _write_alone(vocabulary, path, arch)
        if vocabulary.model == "gpt2":
            pre, wrong = _nearest(path, tokenizer, candidates(splitting_of(state)))
            vocabulary = replace(vocabulary, pre=pre)
        else:
            wrong = differing(path, tokenizer)
    vocabulary.write(writer)
    return _notes(vocabulary, state, wrong)


def agrees(path: Path, tokenizer: Any) -> bool:
    """Whether llama.cpp splits every check text with the file `path` as `tokenizer` does."""
    return not differing(path, tokenizer)


def _write_alone(vocabulary: Vocabulary, path: Path, arch: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    try:
        vocabulary.write(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _nearest(path: Path, tokenizer: Any, names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the first name that splits as `tokenizer`, or the nearest; and the texts it misses."""
    best, fewest = names[0], list(CHECK_TEXTS)
    for name in names:
        wrong = differing(path, tokenizer, name)
        if len(wrong) < len(fewest):
            best, fewest = name, wrong
        if not wrong:
            break
    return best, fewest


def _notes(vocabulary: Vocabulary, state: Mapping[str, Any], wrong: Sequence[str]) -> list[str]:
    effect = "figures are taken on the model's own token ids, only text given to llama.cpp differs"
    if wrong:
        kind = f"with its pre-tokenizer {vocabulary.pre!r}, the nearest; "
        return [
            f"llama.cpp splits {len(wrong)} of {len(CHECK_TEXTS)} check texts otherwise than the "
            f"model's own tokenizer ({kind if vocabulary.model == 'gpt2' else ''}{effect})"
        ]
    if vocabulary.model == "gpt2" and splitting_of(state) != SPLITTINGS.get(vocabulary.pre):
        return [
            f"llama.cpp has no pre-tokenizer of this tokenizer's structure; its {vocabulary.pre!r} "
            f"splits all {len(CHECK_TEXTS)} check texts alike, other texts may differ ({effect})"
        ]
    normalizers = [part["type"] for part in parts(state["normalizer"], "normalizers")]
    unknown = [name for name in normalizers if name not in ("Prepend", "Replace")]
    if unknown:
        return [
            f"the model's tokenizer normalizes text ({', '.join(unknown)}) and llama.cpp does not "
            f"({effect})"
        ]
    return []


def placeholders(config: Any) -> Vocabulary:
    """Return a vocabulary of as many placeholders as the model has ids, for one without text."""
    return Vocabulary(
        model="gpt2",
        tokens=[f"[{number}]" for number in range(config.vocab_size)],
        types=[NORMAL] * config.vocab_size,
        special=_special(None, config),
        merges=[NO_MERGE],
    )


def vocabulary_of(tokenizer: Any, config: Any) -> Vocabulary:
    """Return the vocabulary of a tokenizer of transformers, its pre-tokenizer not yet chosen.

    Raises:
        ConfigError: it is neither SentencePiece with byte tokens nor byte-level BPE, or has more
            ids than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, from which GGUF "
            "vocabularies are written; save it as one of the tokenizers library's"
        )
    state = json.loads(backend.to_str())
    model = state["model"]
    byte_level = any(
        part["type"] == "ByteLevel" for part in parts(state["pre_tokenizer"], "pretokenizers")
    )
    tokens, types = _tokens(state, config.vocab_size)
    special = _special(tokenizer, config)
    before, after = _around(tokenizer)
    common = Vocabulary(
        model="gpt2",
        tokens=tokens,
        types=types,
        special=special
        | ({"bos": before} if before is not None else {})
        | ({"eos": after} if after is not None else {}),
        add_bos=before is not None,
        add_eos=after is not None,
        chat_template=_chat_template(tokenizer),
    )
    if model["type"] == "BPE" and byte_level:
        merges = [" ".join(pair) for pair in model["merges"]]
        return replace(common, merges=merges or [NO_MERGE])
    if model["type"] in ("BPE", "Unigram") and model.get("byte_fallback"):
        return _sentencepiece(common, state)
    raise ConfigError(
        f"the tokenizer is {model['type']} without bytes; a GGUF file holds byte-level BPE or "
        "SentencePiece (BPE or Unigram with byte_fallback)"
    )


def _tokens(state: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return text and kind of each id below `size`; those without a token are unused."""
    known = state["model"]["vocab"]
    numbers = known if isinstance(known, dict) else {row[0]: i for i, row in enumerate(known)}
    found = {number: (text, NORMAL) for text, number in numbers.items()}
    for added in state["added_tokens"]:
        found[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(found, default=-1) >= size:
        raise ConfigError(
            f"the tokenizer has an id {max(found)} and the model only {size}; "
            "give the model's own tokenizer"
        )
    taken = {text for text, _ in found.values()}
    if len(taken) != len(found):
        # llama.cpp finds ids by their text, and stops the whole process where two are alike.
        raise ConfigError("the tokenizer has two tokens of the same text, which GGUF cannot hold")
    for number in range(size):
        if number not in found:
            text = f"[PAD{number}]"
            found[number] = (text if text not in taken else f"[PAD{number} unused]", UNUSED)
    return [found[i][0] for i in range(size)], [found[i][1] for i in range(size)]


def _special(tokenizer: Any, config: Any) -> dict[str, int]:
    """Return the ids of bos, eos, unk and pad: the tokenizer's, else the model's own."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {}
    for name, key in keys.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is None:
            number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, list):
            number = number[0]  # some models end at several tokens; the file names one
        if number is not None and 0 <= number < config.vocab_size:
            found[key] = int(number)
    return found


def _around(tokenizer: Any) -> tuple[int | None, int | None]:
    """Return the ids that the tokenizer puts before and after a text by itself."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            before, after = whole[:start], whole[start + len(bare) :]
            return (before[-1] if before else None), (after[0] if after else None)
    return None, None


def _chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def _sentencepiece(vocabulary: Vocabulary, state: Mapping[str, Any]) -> Vocabulary:
    """Return `vocabulary` as SentencePiece's."""
    model, types = state["model"], list(vocabulary.types)
    for number, text in enumerate(vocabulary.tokens):
        if types[number] == NORMAL and BYTE_TOKEN.fullmatch(text):
            types[number] = BYTE
    if types.count(BYTE) != 256:
        # llama.cpp stops the whole process at a character without token or bytes.
        raise ConfigError(
            f"the tokenizer has {types.count(BYTE)} of the 256 byte tokens <0x00> to <0xFF>, and "
            "llama.cpp needs them all"
        )
    unknown = vocabulary.special.get("unknown")
    if unknown is not None:
        types[unknown] = UNKNOWN
    scores = _scores(model, vocabulary.tokens)
    return replace(
        vocabulary, model="llama", types=types, scores=scores, space_prefix=_space_prefix(state)
    )


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Return the order in which llama.cpp merges: neighbours whose joined text scores highest.

    For BPE that is the text which the earliest merge makes: minus its rank, as SentencePiece has.
    """
    if model["type"] == "Unigram":
        scores = [float(row[1]) for row in model["vocab"]]
        return scores + [0.0] * (len(tokens) - len(scores))
    made = dict.fromkeys(left + right for left, right in model["merges"])
    ranks = {text: rank for rank, text in enumerate(made)}
    # What no merge makes comes after all that one does.
    return [float(-ranks.get(text, len(ranks))) for text in tokens]


def _space_prefix(state: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front: by the normalizer, or by the pre-tokenizer."""
    prepends = any(
        part["type"] == "Prepend" and part["prepend"] == SPACE
        for part in parts(state["normalizer"], "normalizers")
    )
    return prepends or any(
        part["type"] == "Metaspace" and part["prepend_scheme"] != "never"
        for part in parts(state["pre_tokenizer"], "pretokenizers")
    )
