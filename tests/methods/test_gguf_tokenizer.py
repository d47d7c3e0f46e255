"""GGUF vocabularies: llama.cpp splits text with them as the tokenizers of transformers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kernels.errors import ConfigError
from methods import llamacpp_engine
from methods.gguf_export import export
from methods.gguf_header import read_header
from methods.gguf_splitting import (
    CHECK_TEXTS,
    DIGIT,
    SPLITTINGS,
    WORDS,
    Splitting,
    candidates,
    differing,
    llama_cpp_splitter,
    splitting_of,
)
from methods.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, agrees
from tests.architectures import tiny_tokenizer
from tests.methods.gguf_models import byte_level_tokenizer, sentencepiece_tokenizer, tiny_kind

pytest.importorskip("gguf", reason="the optional package gguf is not installed")
pytest.importorskip("llama_cpp", reason="the optional package llama-cpp-python is not installed")

EMBEDDED = Path(__file__).resolve().parents[2] / "harness" / "embedded" / "model"
WIDTH = 1100
# llama.cpp writes these expressions without \\p{M}, and cuts at the vowel signs of Hindi.
CASED = ("tekken", "gpt-4o")


def written(tokenizer: Any, folder: Path, width: int = WIDTH) -> tuple[Path, list[str]]:
    path = folder / "model.gguf"
    return path, export(tiny_kind("llama", {"vocab_size": width}), tokenizer, path, "float16")


def field(path: Path, key: str) -> Any:
    return read_header(path).fields[f"tokenizer.ggml.{key}"]


@pytest.mark.parametrize("name", SPLITTINGS)
def test_byte_level_tokenizers_are_split_alike(name: str, tmp_path: Path) -> None:
    splitting = SPLITTINGS[name]
    tokenizer = byte_level_tokenizer(splitting.patterns, splitting.ignore_merges, add_bos=True)
    path, notes = written(tokenizer, tmp_path)
    assert (field(path, "model"), field(path, "pre")) == ("gpt2", name)
    wrong = [text for text in differing(path, tokenizer) if name not in CASED or "हि" not in text]
    assert wrong == []
    assert agrees(path, tokenizer) is (notes == []) is (name not in CASED)
    with llama_cpp_splitter(path) as split:
        assert split is not None
        for text in CHECK_TEXTS[:3]:
            assert split(text) == tokenizer(text).input_ids
            assert len(split(text)) > 3


def test_every_pre_tokenizer_in_the_table_is_told_from_the_others(tmp_path: Path) -> None:
    """The check texts are worth something: no two entries split all of them alike."""
    tokenizer = byte_level_tokenizer((WORDS,))
    path, _ = written(tokenizer, tmp_path)
    for name in SPLITTINGS:
        assert bool(differing(path, tokenizer, name)) is (name != "gpt-2")


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_split_alike(metaspace: bool, prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(metaspace, prefix)
    path, notes = written(tokenizer, tmp_path)
    assert field(path, "model") == "llama"
    assert field(path, "add_space_prefix") is prefix
    # Metaspace puts no space before a text that begins with one; SentencePiece does.
    expected = [text for text in CHECK_TEXTS if metaspace and prefix and text[0] == " "]
    assert differing(path, tokenizer) == expected
    assert agrees(path, tokenizer) is (notes == []) is (not expected)
    with llama_cpp_splitter(path) as split:
        assert split is not None
        ids = split(CHECK_TEXTS[1])
    assert ids == tokenizer(CHECK_TEXTS[1]).input_ids
    assert ids[0] == 1
    assert any(3 <= number < 259 for number in ids)  # characters without a piece, as bytes
    types = field(path, "token_type")
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert types.count(BYTE) == 256
    assert types[-1] == UNUSED


def test_scores_are_the_order_of_merges(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    path, _ = written(tokenizer, tmp_path)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    scores = field(path, "scores")
    made = [tokenizer.convert_tokens_to_ids(piece) for piece in dict.fromkeys(map("".join, merges))]
    assert [scores[number] for number in made] == [-float(rank) for rank in range(len(made))]
    assert max(scores[number] for number in range(3)) == -float(len(made))


def test_unigram_keeps_its_scores(tmp_path: Path) -> None:
    """llama.cpp merges the best pair first, Unigram takes the likeliest whole: mostly the same."""
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256))]
    pieces += [("▁", -1.0), ("t", -9.0), ("h", -9.0), ("e", -9.0), ("th", -3.0), ("he", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    path, notes = written(tokenizer, tmp_path, 300)
    assert field(path, "scores")[: len(pieces)] == [score for _, score in pieces]
    with llama_cpp_splitter(path) as split:
        assert split is not None
        assert split("the") == tokenizer("the").input_ids == [257, 258, 262]
    assert agrees(path, tokenizer) is (notes == [])


def test_a_wrong_order_of_merges_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = sentencepiece_tokenizer()
    monkeypatch.setattr("methods.gguf_tokenizer._scores", lambda model, tokens: [0.0] * len(tokens))
    path, notes = written(tokenizer, tmp_path)
    assert not agrees(path, tokenizer)
    assert "check texts otherwise than the model's own tokenizer" in notes[0]


def test_the_embedded_tokenizer_is_exported_with_its_difference_said(tmp_path: Path) -> None:
    """Its blanks before single letters are known to no pre-tokenizer of llama.cpp."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED, local_files_only=True)
    path, notes = written(tokenizer, tmp_path)
    assert field(path, "pre") == "smollm"  # digits alone, then words: the nearest
    assert not agrees(path, tokenizer)
    assert len(notes) == 1
    assert f"llama.cpp splits 1 of {len(CHECK_TEXTS)} check texts otherwise" in notes[0]
    assert "'smollm'" in notes[0]
    assert "own token ids" in notes[0]
    assert [text for text in differing(path, tokenizer) if " A, B C" not in text] == []


def test_structure_decides_which_are_tried_first() -> None:
    for name, splitting in SPLITTINGS.items():
        assert candidates(splitting) == [name]
    assert candidates(Splitting((DIGIT, "of its own", WORDS)))[0] == "smollm"
    assert set(SPLITTINGS) <= set(candidates(None))
    for tokenizer, expected in (
        (pre_tokenizers.ByteLevel(add_prefix_space=False), Splitting((WORDS,))),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Whitespace(), None),
    ):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = tokenizer
        assert splitting_of(json.loads(backend.to_str())) == expected


def test_a_structure_of_its_own_that_splits_alike_is_said(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer((r"(?=never in a check text)", WORDS))
    path, notes = written(tokenizer, tmp_path)
    assert agrees(path, tokenizer)
    assert "no pre-tokenizer of this tokenizer's structure" in notes[0]


def test_normalization_is_said(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer((WORDS,))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    path, notes = written(tokenizer, tmp_path)
    assert agrees(path, tokenizer)
    assert "normalizes text (NFC) and llama.cpp does not" in notes[0]


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_first_token_is_added_where_the_tokenizer_adds_it(add_bos: bool, tmp_path: Path) -> None:
    path, _ = written(byte_level_tokenizer((WORDS,), add_bos=add_bos), tmp_path)
    assert field(path, "add_bos_token") is add_bos
    with llama_cpp_splitter(path) as split:
        assert split is not None
        assert split.around() == (0 if add_bos else None, None)


def test_added_tokens_keep_their_kind_and_their_text(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer((WORDS,))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    path, _ = written(tokenizer, tmp_path)
    kinds = dict(zip(field(path, "tokens"), field(path, "token_type"), strict=True))
    assert (kinds["<tool>"], kinds["<|turn|>"], kinds["<s>"]) == (USER_DEFINED, CONTROL, CONTROL)
    assert read_header(path).fields["tokenizer.chat_template"] == tokenizer.chat_template
    text = "one<tool>two<|turn|>three"
    with llama_cpp_splitter(path) as split:
        assert split is not None
        assert split(text) == tokenizer(text).input_ids


def test_a_tokenizer_without_merges_is_exported(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path, notes = written(tokenizer, tmp_path, 320)
    assert notes == []
    assert agrees(path, tokenizer)


def test_placeholders_load_and_split_nothing(tmp_path: Path) -> None:
    path, notes = written(None, tmp_path)
    assert "no tokenizer" in notes[0]
    assert len(set(field(path, "tokens"))) == WIDTH
    with llama_cpp_splitter(path) as split:
        assert split is not None
        assert split("Hello") == []


def test_a_token_that_is_called_like_a_filler_does_not_clash(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[PAD300]"])
    tokens = field(written(tokenizer, tmp_path, 320)[0], "tokens")
    assert len(set(tokens)) == 320


def _without_bytes() -> PreTrainedTokenizerFast:
    model = models.BPE({"a": 0, "<0x00>": 1}, [], byte_fallback=True)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def _words() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))


class _Slow:
    """A tokenizer without a backend of the tokenizers library."""


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (_without_bytes(), "has 1 of the 256 byte tokens"),
        (_words(), "WordLevel without bytes; a GGUF file holds byte-level BPE or SentencePiece"),
        (_Slow(), "_Slow has no tokenizer.json"),
        (byte_level_tokenizer((WORDS,)), "has an id [0-9]+ and the model only 100"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        written(tokenizer, tmp_path, 100)


def test_without_llama_cpp_one_sentence_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str, owner: str, distribution: str | None = None) -> None:
        raise ConfigError(f"{owner} needs the package {distribution or package}")

    path, _ = written(tiny_tokenizer(), tmp_path, 320)
    # Not the one that has loaded llama.cpp already.
    monkeypatch.setattr(llamacpp_engine, "library", llamacpp_engine.library.__wrapped__)
    monkeypatch.setattr("methods.llamacpp_engine.require", missing)
    with pytest.raises(ConfigError, match="llama-cpp-python"):
        agrees(path, tiny_tokenizer())
