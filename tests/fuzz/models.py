"""Readers of models from elsewhere: GGUF, nanoGPT, folders in Hugging Face layout, rows of text."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from harness import folders, nanogpt_convert, nanogpt_vocabulary, rows
from kernels.errors import ConfigError
from methods import gguf_read, gguf_vocabulary
from tests.fuzz.bundle import packed, unpacked
from tests.fuzz.mutation import json_changes, spliced, words
from tests.fuzz.target import Target

FILES = ("config.json", "quantize_config.json", "model.safetensors.index.json")
WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
POOLING = "1_Pooling/config.json"


def _gguf(folder: Path, architecture: str, tensors: Mapping[str, Sequence[int]]) -> bytes:
    import gguf
    import numpy as np

    path = folder / "seed.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(4)
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv([2])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_bos_token_id(1)
    writer.add_token_list(["a", "b", "<s>", "▁c"])
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _gguf_seeds(folder: Path) -> Sequence[bytes]:
    matrices = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (4, 4))
    matrices |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), (4, 4))
    blocks = {f"blk.0.{name}.weight": shape for name, shape in matrices.items()}
    norms = dict.fromkeys(("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"), (4,))
    ends = {"token_embd.weight": (4, 4), "output_norm.weight": (4,)}
    llama = {**ends, **norms, **blocks}
    return [
        _gguf(folder, "llama", llama),
        _gguf(folder, "llama", {**llama, "rope_freqs.weight": (1,)}),
    ]


def _read_gguf(data: bytes, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(data)
    json.dumps(gguf_read.read_config(path))
    gguf_read.stored_tensors(path)


def _vocabulary_seeds(folder: Path) -> Sequence[bytes]:
    tokens = ["<unk>", "<s>", "a", "b", "ab", "▁a"]
    common = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [2, 3, 1, 1, 1, 1]}
    common |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.chat_template": "x"}
    pieces = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [0.0, 0.0, -1.0, -2.0, -3.0, 0.5],
    }
    bytelevel = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"]}
    bytelevel |= {"tokenizer.ggml.pre": "gpt-2"}
    return [json.dumps({**common, **kind}).encode() for kind in (pieces, bytelevel)]


def _read_vocabulary(data: bytes, folder: Path) -> None:
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("a header is a mapping")
    gguf_vocabulary.check_vocabulary(folder / "model.gguf", fields)
    gguf_vocabulary._settings(fields)
    list(gguf_vocabulary._states(fields, (0, None)))


PICKLED: tuple[bytes, ...] = (
    *(b"cposix\nsystem\n", b"cbuiltins\neval\n", b"(X\x02\x00\x00\x00lstR", b"\x93", b"R", b"b"),
    *(b"i", b"\x81", b"\x92", b"Q", b"P0\n", b"\x82\x01", b"}", b"]", b"(", b"t", b"\x85", b"\x94"),
    *(
        b"r\xff\xff\xff\x7f",
        b"j\xff\xff\xff\x7f",
        b"\x96\xff\xff\xff\xff\xff\xff\x00\x00",
        b"s",
        b"u",
    ),
    *(b"\x8e\xff\xff\xff\xff\xff\x00\x00\x00", b"\x8a\x03abc", b"\x8b\xff\xff\xff\x7f", b"L9L\n"),
    *(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"I1\n", b"Va\n", b"F1.5\n", b"h\x00", b"2", b"0"),
    *(
        b"q\x00h\x00a",
        b"K\x01",
        b"\x8c\x01a",
        b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
        b".",
        b"S'a'\n",
    ),
)
"""Instructions of pickles: what names and calls, what asks for memory, what makes plain data."""


def _meta_seeds(folder: Path) -> Sequence[bytes]:
    path = folder / "meta.pkl"
    nanogpt_vocabulary.write_meta(["\n", "a", "é"], path)
    meta = {"vocab_size": 1, "stoi": {"a": 0}, "itos": {0: "a"}}
    return [path.read_bytes(), *(pickle.dumps(meta, protocol) for protocol in (0, 1, 2, 5))]


def _read_meta(data: bytes, folder: Path) -> None:
    path = folder / "meta.pkl"
    path.write_bytes(data)
    nanogpt_vocabulary.read_meta(path)


def _nanogpt_seeds(folder: Path) -> Sequence[bytes]:
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 2, "vocab_size": 3}
    shapes = nanogpt_convert._shapes(sizes)
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    made = io.BytesIO()
    torch.save({"model": state, "model_args": {**sizes, "bias": True, "dropout": 0.1}}, made)
    return [made.getvalue()]


def _change_archive(data: bytes, generator: random.Random) -> bytes:
    """Change one member of an archive and write it again, with the right checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # noqa: BLE001  # whatever is wrong with it
        return words(data, generator)
    if not parts:
        return data
    pickled = [name for name in parts if name.endswith(".pkl")]
    name = generator.choice(pickled if pickled and generator.random() < 0.8 else list(parts))
    parts[name] = spliced(PICKLED)(parts[name], generator)
    made = io.BytesIO()
    packing = zipfile.ZIP_STORED if generator.random() < 0.97 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(made, "w", packing) as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    return made.getvalue()


def _read_nanogpt(data: bytes, folder: Path) -> None:
    path = folder / "ckpt.pt"
    path.write_bytes(data)
    nanogpt_convert.hugging_face(nanogpt_convert.read_checkpoint(path), path)


def _weights(folder: Path) -> None:
    for name in WEIGHTS:
        (folder / name).write_bytes(b"")
    (folder / "1_Pooling").mkdir(exist_ok=True)


def _folder_seeds(folder: Path) -> Sequence[bytes]:
    _weights(folder)
    table = {"weight_map": {"a": WEIGHTS[0], "b": WEIGHTS[1]}, "metadata": {"total_size": 8}}
    contents = {
        "config.json": {"model_type": "llama", "hidden_size": 4, "architectures": ["X"]},
        "quantize_config.json": {"bits": 4},
        "model.safetensors.index.json": table,
        POOLING: {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return [packed(folder, (*FILES, POOLING))]


def _read_folder(data: bytes, folder: Path) -> None:
    unpacked(data, folder, (*FILES, POOLING))
    folders.read_config(folder)
    folders.read_pooling(folder)
    folders.folder_digest(folder, False, folder / "digests.json")


def _row_seeds(folder: Path) -> Sequence[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    made = io.BytesIO()
    parquet.write_table(pa.table({"text": ["a b", "c"], "n": [1, 2]}), made)
    lines = "".join(json.dumps({"text": text, "n": [1, None]}) + "\n" for text in ("a b", "é"))
    return [lines.encode(), made.getvalue()]


def _read_rows(data: bytes, folder: Path) -> None:
    path = folder / ("rows.parquet" if data[:4] == b"PAR1" else "rows.jsonl")
    path.write_bytes(data)
    rows.column([path], "text")


def _change_rows(data: bytes, generator: random.Random) -> bytes:
    if data[:4] == b"PAR1":
        return words(data, generator)
    lines = data.splitlines(keepends=True) or [b"{}"]
    number = generator.randrange(len(lines))
    lines[number] = json_changes()(lines[number], generator) + b"\n"
    return b"".join(lines)


TARGETS = (
    Target("gguf", _read_gguf, (ConfigError,), _gguf_seeds, words),
    Target(
        "gguf_vocabulary",
        _read_vocabulary,
        (ConfigError, ValueError),
        _vocabulary_seeds,
        json_changes(),
    ),
    Target("nanogpt_meta", _read_meta, (ConfigError,), _meta_seeds, spliced(PICKLED)),
    Target(
        "nanogpt_checkpoint", _read_nanogpt, (ConfigError,), _nanogpt_seeds, _change_archive, 16384
    ),
    Target("folder", _read_folder, (ConfigError,), _folder_seeds, json_changes(), setup=_weights),
    Target("rows", _read_rows, (ConfigError,), _row_seeds, _change_rows),
)
