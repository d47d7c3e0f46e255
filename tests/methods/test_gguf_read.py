"""Reading GGUF files: what was exported comes back, and nothing in a damaged file does harm."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kernels.errors import ConfigError
from methods import gguf_header
from methods.gguf_export import export
from methods.gguf_header import read_header
from methods.gguf_read import load_dequantized, read_config, stored_tensors, tokenizer_files
from methods.gguf_splitting import CHECK_TEXTS, SPLITTINGS, WORDS, differing
from tests.architectures import CONTEXT, logits_of, tiny_ids, tiny_tokenizer
from tests.methods.gguf_models import (
    KINDS,
    byte_level_tokenizer,
    llama_cpp_logits,
    mean_kl,
    quantize_with_llama_cpp,
    sentencepiece_tokenizer,
    tiny_kind,
)

pytest.importorskip("gguf", reason="the optional package gguf is not installed")
pytest.importorskip("llama_cpp", reason="the optional package llama-cpp-python is not installed")

ROOT = Path(__file__).resolve().parents[2]
# In GGUF these are written as another thing of the same effect.
CHANGED = {
    "mistral": {"model_type", "architectures", "attention_bias", "mlp_bias"},
    "llama3": {"rope_parameters"},
}


def exported(kind: str, folder: Path, dtype: str = "float32") -> tuple[Any, Path]:
    model, path = tiny_kind(kind), folder / f"{kind}.gguf"
    export(model, tiny_tokenizer(), path, dtype)
    return model, path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported("llama", tmp_path_factory.mktemp("gguf"))[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_comes_back(kind: str, tmp_path: Path) -> None:
    model, path = exported(kind, tmp_path, "bfloat16")
    found = read_config(path)
    original = model.config.to_dict() | {"architectures": [type(model).__name__]}
    # The exporter writes the width that GPT-2 leaves to be four times the other.
    original |= {"dtype": "bfloat16"} | ({"n_inner": 128} if kind == "gpt2" else {})
    different = {key for key, value in found.items() if original.get(key) != value}
    assert different == CHANGED.get(kind, set())
    assert found["model_type"] == ("llama" if kind == "mistral" else model.config.model_type)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_come_back(kind: str, tmp_path: Path) -> None:
    model, path = exported(kind, tmp_path)
    loaded, ids = load_dequantized(path), tiny_ids(2, CONTEXT)
    expected = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not loaded.training
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("ftype", "steps", "bytes_per_32"), [("Q8_0", 127, 34), ("Q4_0", 8, 18), ("F16", 2048, 64)]
)
def test_quantized_weights_are_near_and_are_what_llama_cpp_runs(
    kind: str, ftype: str, steps: int, bytes_per_32: int, tmp_path: Path
) -> None:
    """Each weight lies within a step of its block of 32; the logits are those of llama.cpp."""
    model, path = exported(kind, tmp_path)
    quantized = tmp_path / "quantized.gguf"
    quantize_with_llama_cpp(path, quantized, ftype)
    tensors, loaded = stored_tensors(quantized), load_dequantized(quantized)
    changed = 0
    for name, tensor in tensors.items():
        weight, found = model.state_dict()[name], loaded.state_dict()[name]
        if tensor.type == "F32":
            assert torch.equal(found, weight)
            continue
        changed += not torch.equal(found, weight)
        assert (tensor.type, tensor.bytes) == (ftype, weight.numel() // 32 * bytes_per_32)
        if kind == "gpt2" and "transformer.h" in name:
            weight, found = weight.T, found.T
        assert tensor.shape == tuple(weight.shape)
        blocks, decoded = weight.reshape(-1, 32), found.reshape(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / steps
        assert bool(((blocks - decoded).abs() <= step * 1.01).all())
    assert changed >= 8
    ids = tiny_ids()
    own = mean_kl(logits_of(model, ids), logits_of(loaded, ids))
    against = mean_kl(logits_of(loaded, ids), llama_cpp_logits(quantized, ids))
    # Activations are rounded to eight bits there, and to float16 for F16: less than the weights.
    assert against < {"Q8_0": 2e-2, "Q4_0": 2e-2, "F16": 1e-4}[ftype]
    assert own > 0


def test_sizes_are_those_that_the_gguf_package_reads(tmp_path: Path) -> None:
    import gguf

    _, path = exported("gpt2", tmp_path)
    quantized = tmp_path / "quantized.gguf"
    quantize_with_llama_cpp(path, quantized, "Q5_1")
    header = read_header(quantized)
    reader = gguf.GGUFReader(quantized)
    assert len(reader.tensors) == len(header.tensors) == len(stored_tensors(quantized))
    for tensor in reader.tensors:
        own, offset = header.tensors[tensor.name]
        assert own.type == tensor.tensor_type.name
        assert own.shape == tuple(reversed(tensor.shape.tolist()))
        assert (own.bytes, offset) == (tensor.n_bytes, tensor.data_offset)
    keys = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert {key: reader.fields[key].contents() for key in keys} == header.fields


def test_reading_a_header_imports_neither_torch_nor_transformers(sample: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from methods.gguf_read import read_config;"
        "read_config(Path(sys.argv[1])); print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, sample], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_every_truncated_file_is_refused(sample: Path, tmp_path: Path) -> None:
    content, path = sample.read_bytes(), tmp_path / "short.gguf"
    header = max(offset for _, offset in read_header(sample).tensors.values())
    for length in [*range(0, 600, 7), *range(600, header, 911), len(content) - 33]:
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError, match=r"is no GGUF file|truncated"):
            read_config(path)


def test_damaged_bytes_are_refused_or_harmless(sample: Path, tmp_path: Path) -> None:
    """Whatever stands in the header: a configuration or one sentence, and no memory taken."""
    content, path = sample.read_bytes(), tmp_path / "damaged.gguf"
    start = min(offset for _, offset in read_header(sample).tensors.values())
    # Not the vocabulary, where most bytes are free.
    vocabulary = content.index(b"tokenizer.ggml.tokens"), content.index(b"tokenizer.ggml.bos")
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        place = int(random.integers(0, start))
        if vocabulary[0] + 40 < place < vocabulary[1]:
            place = int(random.integers(0, vocabulary[0] + 40))
        damaged[place] = int(random.integers(0, 256))
        path.write_bytes(damaged)
        try:
            read_config(path)
            stored_tensors(path)
        except ConfigError:
            refused += 1
    assert 100 < refused < 300


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _file(
    tensors: int = 0, values: int = 0, body: bytes = b"", version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values) + body + bytes(64)


HUGE = 1 << 60
ONE = _text("a") + struct.pack("<I", 4) + struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04" + bytes(100), "does not begin with the letters GGUF"),
        (_file(version=1), "its version is 1"),
        (_file(version=3 << 24), "little endian"),
        (_file(tensors=HUGE), f"states {HUGE} tensors"),
        (_file(values=HUGE), f"states {HUGE} values"),
        (_file(values=1, body=struct.pack("<Q", HUGE)), "ends inside its header"),
        (_file(values=1, body=_text("a") + struct.pack("<I", 99)), "unknown type 99"),
        (
            _file(values=1, body=_text("a") + struct.pack("<IIQ", 9, 0, HUGE)),
            f"states {HUGE} numbers",
        ),
        (_file(values=1, body=_text("a") + struct.pack("<IIQ", 9, 8, HUGE)), f"{HUGE} texts"),
        (_file(values=1, body=_text("a") + struct.pack("<IIQ", 9, 9, 1)), "an array of type 9"),
        (_file(values=2, body=ONE + ONE), "states 'a' twice"),
        (_file(values=1, body=struct.pack("<Q", 1) + b"\xff"), "not UTF-8"),
        (_file(1, body=_text("t") + struct.pack("<I", 1 << 30)), "has 1073741824 dimensions"),
        (_file(1, body=_text("t") + struct.pack("<IQIQ", 1, 8, 77, 0)), "unknown type, number 77"),
        (_file(1, body=_text("t") + struct.pack("<IQIQ", 1, 8, 8, 0)), "8 wide, which Q8_0 is not"),
        (
            _file(1, body=_text("t") + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0)),
            "'t' ends behind the end",
        ),
        (_file(1, body=_text("t") + struct.pack("<IQIQ", 1, 8, 0, HUGE)), "'t' ends behind"),
        (
            _file(values=1, body=_text("general.alignment") + struct.pack("<II", 4, 3)),
            "alignment is 3",
        ),
        (_file(values=1, body=_text("split.count") + struct.pack("<IH", 2, 4)), "several parts"),
        (_file(values=1, body=ONE), "does not say which architecture"),
    ],
)
def test_hostile_headers_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_config(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.gguf cannot be read: No such file"):
        read_config(tmp_path / "nothing.gguf")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config(tmp_path)


def _changed(source: Path, path: Path, key: str, value: Any, drop: str = "") -> Path:
    """Write a file again with one value of its metadata changed (None: left out).

    The tensor `drop` is left out.
    """
    import gguf

    kinds = {int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    reader = gguf.GGUFReader(source)
    fields = {
        name: (field.contents(), field.types[0], field.types[-1])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    if isinstance(value, list):
        fields[key] = (value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    elif value is not None:
        fields[key] = (value, kinds[type(value)], kinds[type(value)])
    else:
        del fields[key]
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture")[0])
    for name, (content, kind, inner) in fields.items():
        array = kind == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, content, kind, inner if array else None)
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("general.architecture", "mamba", "'mamba' cannot be read here; .* llama, qwen2, gpt2"),
        ("llama.block_count", None, "does not state llama.block_count"),
        ("llama.block_count", 1 << 31, "states llama.block_count as 2147483648, and its tensors"),
        ("llama.embedding_length", 64, "embedding_length as 64, and its tensors are for 32"),
        ("llama.feed_forward_length", [64, 32], r"as \[64, 32\]; one int is known here"),
        ("llama.rope.dimension_count", 4, "heads of several widths"),
        ("llama.rope.scaling.type", "yarn", "scales its rotations by 'yarn'"),
        ("llama.expert_count", 8, "has experts"),
        ("llama.context_length", "many", "as 'many'; one int is known here"),
    ],
)
def test_other_structures_are_refused(
    key: str, value: Any, said: str, sample: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        read_config(_changed(sample, tmp_path / "changed.gguf", key, value))


def test_values_alike_for_every_block_are_one(sample: Path, tmp_path: Path) -> None:
    path = _changed(sample, tmp_path / "c.gguf", "llama.feed_forward_length", [64, 64])
    assert read_config(path) == read_config(sample)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"), ("output_norm.weight", "norm")],
)
def test_a_missing_tensor_is_named(name: str, parameter: str, sample: Path, tmp_path: Path) -> None:
    path = _changed(sample, tmp_path / "changed.gguf", "general.name", "x", drop=name)
    with pytest.raises(ConfigError, match=f"{parameter}.* is None, and .* is needed"):
        load_dequantized(path)


def test_without_the_package_one_sentence_says_so(
    sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_header, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package gguf, which is not installed here"):
        read_config(sample)


def _written(tokenizer: Any, folder: Path) -> Path:
    path = folder / "model.gguf"
    export(tiny_kind("llama", {"vocab_size": 700}), tokenizer, path, "float16")
    return path


@pytest.mark.parametrize(
    "tokenizer",
    [
        # Those of which llama.cpp splits every check text alike.
        *(
            byte_level_tokenizer(
                splitting.patterns, splitting.ignore_merges, add_bos=bool(place % 2)
            )
            for place, splitting in enumerate(list(SPLITTINGS.values())[:5])
        ),
        sentencepiece_tokenizer(),
        sentencepiece_tokenizer(prefix=False),
        tiny_tokenizer(),
    ],
)
def test_a_tokenizer_comes_back(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    path = _written(tokenizer, tmp_path)
    tokenizer_files(path, tmp_path / "tokenizer")
    found = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    assert differing(path, found) == []
    for text in (*CHECK_TEXTS, "a<s>b</s>"):
        ids = tokenizer(text).input_ids
        assert found(text).input_ids == ids
        assert found.decode(ids) == tokenizer.decode(ids) or "▁" in text
    for name in ("bos_token", "eos_token", "unk_token", "chat_template"):
        assert getattr(found, name) == getattr(tokenizer, name)


def test_tokenizers_that_cannot_be_rebuilt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without text; .* model\.reference"):
        tokenizer_files(_written(None, tmp_path), tmp_path / "tokenizer")
    path = _written(byte_level_tokenizer((WORDS,)), tmp_path)
    other = _changed(path, tmp_path / "o.gguf", "tokenizer.ggml.pre", "deepseek-coder")
    with pytest.raises(ConfigError, match=r"\(deepseek-coder\) .* model\.reference"):
        tokenizer_files(other, tmp_path / "tokenizer")
    assert list((tmp_path / "tokenizer").iterdir()) == []
    broken = _changed(path, tmp_path / "b.gguf", "tokenizer.ggml.pre", "unheard-of")
    with pytest.raises(ConfigError, match=r"that llama\.cpp does not load"):
        tokenizer_files(broken, tmp_path / "tokenizer")
