"""Texts: where they come from, what their identity is, and the tokens and windows cut from them."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Tokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from harness.cache import Cache
from harness.data import (
    EmbeddedData,
    LocalData,
    TextFile,
    Tokens,
    encode,
    leading_token,
    tokenizer_digest,
    windows,
)
from harness.load import load_tokenizer
from harness.rows import read_rows
from kernels.errors import ConfigError
from tests.architectures import BOS_ID, tiny_tokenizer
from tests.harness.hub_server import CLOSED, Hub, ask, serve
from tests.harness.task_folders import write as write_rows

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("QUANTBENCH_SHARED", str(ROOT.parent / "shared")))
ROWS = ["", " = A Title = \n", "", " First line , of text . \n", " Second . \n"]


def local(root: Path, **changes: Any) -> LocalData:
    fields = {
        "name": "local",
        "text": "wikitext2",
        "path": str(root),
        "dataset": "Salesforce/wikitext",
        "subset": "wikitext-2-raw-v1",
        "split": "test",
        "column": "text",
    }
    return LocalData(**{**fields, **changes})


def text_file(folder: Path, content: str, **changes: Any) -> TextFile:
    path = folder / "text.txt"
    path.write_text(content, encoding="utf-8")
    return TextFile(**{"name": "text", "text": "text", "path": str(path), **changes})


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


LAYOUTS = (
    "wikitext/wikitext-2-raw-v1/test.jsonl.gz",
    "wikitext/wikitext-2-raw-v1/test.jsonl",
    "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet",
    "Salesforce/wikitext/wikitext-2-raw-v1/test.parquet",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_read_in_every_layout_of_the_hub(layout: str, tmp_path: Path) -> None:
    write_rows(tmp_path / layout, [{"text": row} for row in ROWS])
    assert local(tmp_path).rows() == ROWS


def test_rows_become_text_in_two_ways(tmp_path: Path) -> None:
    write_rows(tmp_path / LAYOUTS[0], [{"text": row} for row in ROWS])
    data = local(tmp_path)
    assert data.joined_text() == "\n\n".join(ROWS)
    assert data.raw_text() == (" \n = A Title = \n \n First line , of text . \n Second . \n")
    single = text_file(tmp_path, "one text\nwithout an end")
    assert single.joined_text() == single.raw_text() == "one text\nwithout an end"


def test_the_digest_is_that_of_the_text_and_not_of_its_place(tmp_path: Path) -> None:
    for layout in LAYOUTS[1:3]:
        write_rows(tmp_path / layout.replace("/", "_") / layout, [{"text": row} for row in ROWS])
    first, second = (local(tmp_path / layout.replace("/", "_")) for layout in LAYOUTS[1:3])
    assert first.evaluation_digest() == second.evaluation_digest()
    write_rows(tmp_path / "other" / LAYOUTS[0], [{"text": row} for row in ROWS[1:]])
    assert local(tmp_path / "other").evaluation_digest() != first.evaluation_digest()


def test_calibration_text_is_another_file(tmp_path: Path) -> None:
    write_rows(tmp_path / LAYOUTS[0], [{"text": row} for row in ROWS])
    write_rows(tmp_path / "calibration/c4.jsonl.gz", [{"text": "calibrate on this"}])
    write_rows(tmp_path / "calibration/code.jsonl", [{"text": "int main"}, {"text": "return"}])
    assert local(tmp_path).calibration_text() == "calibrate on this"
    assert local(tmp_path, calibration="code").calibration_text() == "int main\n\nreturn"
    (tmp_path / "own.txt").write_text("my own text")
    own = str(tmp_path / "own.txt")
    assert local(tmp_path, calibration=own).calibration_text() == "my own text"
    embedded = EmbeddedData("embedded", "embedded").calibration_text()
    assert local(tmp_path, calibration="embedded").calibration_text() == embedded
    with pytest.raises(ConfigError, match=r"no calibration/pile .* data\.calibration=NAME"):
        local(tmp_path, calibration="pile").calibration_text()


def test_calibrating_on_what_is_scored_is_said(tmp_path: Path) -> None:
    lines = [
        f"line {i} of the scored text, " + "long enough to be told apart, " * 3 for i in "abcd"
    ]
    write_rows(tmp_path / LAYOUTS[0], [{"text": "short"}, *({"text": line} for line in lines)])
    write_rows(tmp_path / "calibration/c4.jsonl", [{"text": "short, but no line of it"}])
    write_rows(tmp_path / "calibration/half.jsonl", [{"text": "\n".join(["a", *lines[1:3]])}])
    write_rows(tmp_path / LAYOUTS[0].replace("test", "train"), [{"text": "other articles"}])
    assert local(tmp_path).contamination() is None
    assert local(tmp_path, calibration="half").contamination() == (
        "contaminated: 2 of 4 lines of the scored text stand in the calibration text (half)"
    )
    same_set = local(tmp_path, calibration="wikitext2")
    assert same_set.calibration_text() == "other articles"
    said = same_set.contamination()
    assert said is not None
    assert "another part of wikitext2" in said


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=.*nowhere: there is no folder"):
        local(tmp_path / "nowhere").rows()
    with pytest.raises(ConfigError, match=r"has no wikitext/wikitext-2-raw-v1/test \(\.jsonl\.gz"):
        local(tmp_path).evaluation_digest()
    path = tmp_path / LAYOUTS[0]
    write_rows(path, [{"line": "x", "page": "y"}])
    with pytest.raises(ConfigError, match="has no text column 'text'; its columns are line, page"):
        local(tmp_path).rows()
    write_rows(path, [{"text": " "}])
    with pytest.raises(ConfigError, match="holds no text in column 'text'"):
        local(tmp_path).rows()
    write_rows(path, [{"text": "word " * 1000}])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"test\.jsonl\.gz cannot be read"):
        local(tmp_path).rows()


@pytest.mark.parametrize("name", ["broken.jsonl", "broken.jsonl.gz", "broken.parquet"])
@pytest.mark.parametrize("content", [b"no rows", b"[1, 2]\n", b"\xff\xfe\n"])
def test_a_damaged_file_of_rows_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read: .*; copy or download it again"):
        list(read_rows(tmp_path / name))


def test_a_text_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    data = text_file(tmp_path, " \n")
    with pytest.raises(ConfigError, match=r"text\.txt holds no text"):
        data.rows()
    Path(data.path).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"text\.txt is not UTF-8 text"):
        data.rows()
    Path(data.path).unlink()
    with pytest.raises(ConfigError, match=r"text\.txt cannot be read \(No such file"):
        data.rows()
    with pytest.raises(ConfigError, match=r"none of its own; give one: data\.calibration=FILE"):
        data.calibration_digest()
    with pytest.raises(ConfigError, match=r"data\.calibration=c4: data\.source=text has no such"):
        text_file(tmp_path, "scored", calibration="c4").calibration_text()


@pytest.mark.parametrize("text", ["Wiki Text", "", "a-b"])
def test_a_text_whose_name_cannot_stand_in_a_column_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.text is .* a-z, 0-9 and _"):
        EmbeddedData("embedded", text)


def test_embedded_texts_are_there_and_apart(cache: Cache) -> None:
    data = EmbeddedData("embedded", "embedded")
    assert len(data.joined_text()) > 100_000
    assert len(data.calibration_text()) > 100_000
    assert data.evaluation_digest() != data.calibration_digest()
    said = data.contamination()
    assert said is not None
    assert "another part of embedded" in said
    with pytest.raises(ConfigError, match=r"data\.calibration=c4: data\.source=embedded has no"):
        EmbeddedData("embedded", "embedded", "c4").calibration_text()
    assert data.texts(None, cache).name == "embedded"


def test_tokens_begin_with_bos_once_and_are_made_once(tmp_path: Path, cache: Cache) -> None:
    content = "Some text: é, ü.\n" * 20
    data = text_file(tmp_path, content)
    tokenizer = tiny_tokenizer()
    tokens = data.texts(tokenizer, cache).tokens("gptq")
    assert tokens.text == "text"
    assert tokens.bos == BOS_ID
    assert tokens.ids.dtype == torch.int64
    assert tokens.ids.tolist() == tokenizer(content).input_ids
    assert len(tokens.ids) == 1 + len(content.encode())
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    before = entry.stat().st_mtime_ns
    again = data.texts(tokenizer, cache).tokens("gptq")
    assert torch.equal(again.ids, tokens.ids)
    assert again.digest == tokens.digest
    assert entry.stat().st_mtime_ns == before
    entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    assert torch.equal(data.texts(tokenizer, cache).tokens("gptq").ids, tokens.ids)
    assert entry.stat().st_mtime_ns != before


def test_another_text_tokenizer_or_protocol_is_another_entry(tmp_path: Path, cache: Cache) -> None:
    write_rows(tmp_path / LAYOUTS[0], [{"text": row} for row in ROWS])
    data = local(tmp_path)
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    other.add_tokens(["Title"])
    found = [
        data.texts(tokenizer, cache).tokens("gptq"),
        data.texts(tokenizer, cache).tokens("llamacpp"),
        data.texts(other, cache).tokens("gptq"),
        text_file(tmp_path, "text").texts(tokenizer, cache).tokens("gptq"),
    ]
    assert len({tokens.digest for tokens in found}) == 4
    assert found[0].ids.tolist() == tokenizer(data.joined_text()).input_ids
    assert found[1].ids.tolist() == tokenizer(data.raw_text()).input_ids
    assert found[2].ids.tolist() == other(data.joined_text()).input_ids


def test_a_tokenizer_is_known_again_after_saving(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(load_tokenizer(tmp_path)) == tokenizer_digest(load_tokenizer(tmp_path))
    bare = GPT2Tokenizer(vocab={"a": 0, "b": 1}, merges=[])
    assert leading_token(bare) is None
    assert leading_token(tokenizer) == BOS_ID


def test_encoding_forgets_truncation_and_padding() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token
    tokenizer("some text", truncation=True, max_length=4, padding="max_length")
    assert (
        encode(tokenizer, "some longer text")
        == tokenizer("some longer text", add_special_tokens=False).input_ids
    )


def test_a_model_without_a_tokenizer_reads_no_text(tmp_path: Path, cache: Cache) -> None:
    texts = text_file(tmp_path, "text").texts(None, cache)
    with pytest.raises(ConfigError, match=r"model\.tokenizer=FOLDER"):
        texts.tokens("gptq")


def some_tokens(count: int) -> Tokens:
    return Tokens("wikitext2", torch.arange(count), None, "digest")


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    assert windows(some_tokens(11), 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert windows(some_tokens(11), 5, 1).tolist() == [[0, 1, 2, 3, 4]]
    assert windows(some_tokens(10), 5, 9).shape == (2, 5)


def test_a_text_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="'wikitext2' has 4 tokens, less than one window of 5"):
        windows(some_tokens(4), 5)


def test_calibration_crops_are_seeded_pieces_of_the_text(tmp_path: Path, cache: Cache) -> None:
    calibration = tmp_path / "calibration.txt"
    content = "".join(chr(32 + i * 7 % 90) for i in range(400))
    calibration.write_text(content)
    data = text_file(tmp_path, "scored", calibration=str(calibration))
    texts = data.texts(tiny_tokenizer(), cache)
    crops = texts.calibration(50, 16, seed=0)
    assert crops.shape == (50, 16)
    assert crops.dtype == torch.int64
    assert BOS_ID not in crops
    whole = tiny_tokenizer()(content, add_special_tokens=False).input_ids
    pieces = {tuple(whole[start : start + 16]) for start in range(400 - 15)}
    assert {tuple(crop) for crop in crops.tolist()} <= pieces
    assert torch.equal(texts.calibration(50, 16, seed=0), crops)
    assert not torch.equal(texts.calibration(50, 16, seed=1), crops)
    assert texts.calibration(3, 400, seed=0).tolist() == [whole] * 3
    with pytest.raises(ConfigError, match=r"calibration\.txt' has 400 tokens"):
        texts.calibration(1, 401, seed=0)


HUB_DATA = (
    "D.HubData('hub', 'wikitext2', 'Salesforce/wikitext', 'wikitext-2-raw-v1', 'test', 'text', "
    "'main', {'c4': {'dataset': 'allenai/c4', 'file': 'en/c4.json.gz', 'column': 'text'}}, %s)"
)


def test_data_of_the_hub_is_what_a_local_folder_would_give(tmp_path: Path) -> None:
    write_rows(tmp_path / LAYOUTS[2], [{"text": row} for row in ROWS])
    shard = (tmp_path / LAYOUTS[2]).read_bytes()
    write_rows(tmp_path / "c4.json.gz", [{"text": "web page"}, {"text": "another"}])
    hub = Hub(
        {
            "datasets/Salesforce/wikitext": {
                "wikitext-2-raw-v1/test-00000-of-00001.parquet": shard,
                "wikitext-2-raw-v1/train-00000-of-00001.parquet": b"not asked for",
            },
            "datasets/allenai/c4": {"en/c4.json.gz": (tmp_path / "c4.json.gz").read_bytes()},
        }
    )
    home = tmp_path / "home"
    expected = local(tmp_path).evaluation_digest()
    with serve(hub) as endpoint:
        assert ask(f"{HUB_DATA % None}.evaluation_digest()", home, endpoint) == expected
        assert ask(f"{HUB_DATA % None}.calibration_text().split()", home, endpoint) == (
            "['web', 'page', 'another']"
        )
        assert not any("train" in path for path in hub.requests)
        assert "knows embedded, wikitext2, c4" in ask(
            f"{HUB_DATA % repr('pile')}.calibration_text()", home, endpoint
        )
    assert ask(f"{HUB_DATA % None}.evaluation_digest()", home, CLOSED, offline=True) == expected
    sentence = ask(f"{HUB_DATA % None}.rows()", tmp_path / "empty", CLOSED)
    assert sentence.startswith("error: dataset Salesforce/wikitext is not")
    assert sentence.endswith(
        "pass data.source=local data.path=FOLDER, or data.source=text data.path=FILE"
    )


needs_shared = pytest.mark.skipif(
    not (SHARED / "datasets" / LAYOUTS[0]).is_file(),
    reason="the real WikiText-2 is not here; QUANTBENCH_SHARED names its folder",
)


@needs_shared
def test_wikitext2_has_the_known_gpt2_tokens(cache: Cache) -> None:
    data = local(SHARED / "datasets")
    folder = SHARED / "tokenizers" / "gpt2"
    tokenizer = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokens = data.texts(tokenizer, cache).tokens("gptq")
    assert len(tokens.ids) == 287_644
    assert tokens.bos is None
    assert len(data.raw_text().encode()) == 1_290_590


@needs_shared
def test_wikitext2_has_the_known_llama_tokens(cache: Cache) -> None:
    data = local(SHARED / "datasets")
    texts = data.texts(llama_tokenizer(SHARED / "tokenizers" / "llama2" / "tokenizer.bin"), cache)
    tokens = texts.tokens("gptq")
    assert len(tokens.ids) == 341_469
    assert tokens.bos == 1
    # The chunks that llama.cpp itself reports for wiki.test.raw with LLaMA's vocabulary.
    assert len(windows(texts.tokens("llamacpp"), 512)) == 655


def llama_tokenizer(path: Path) -> LlamaTokenizer:
    """Read llama2.c's export of the SentencePiece model: length, then (score, size, bytes)."""
    content = path.read_bytes()
    pieces: dict[str, float] = {}
    position = 4
    while position < len(content):
        score, size = struct.unpack_from("<fi", content, position)
        piece = content[position + 8 : position + 8 + size].decode().replace(" ", "▁")
        # llama2.c writes these two between newlines.
        special = piece.strip("\n") in ("<s>", "</s>")
        pieces.setdefault(piece.strip("\n") if special else piece, score)
        position += 8 + size
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, pieces)
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def test_task_data_come_from_their_own_folder_or_that_of_the_texts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    assert local(tmp_path).task_folder() == tmp_path
    assert local(tmp_path, tasks=str(own)).task_folder() == own
    embedded = EmbeddedData("embedded", "embedded")
    assert embedded.task_folder() is None
    assert EmbeddedData("embedded", "embedded", tasks=str(own)).task_folder() == own
    with pytest.raises(ConfigError, match=r"data\.tasks=.*absent: there is no folder"):
        local(tmp_path, tasks=str(tmp_path / "absent")).task_folder()
