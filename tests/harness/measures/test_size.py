"""Sizes of artefacts against the arithmetic of their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.artefacts import read_manifest
from harness.hardware import Hardware
from harness.measures.size import Size, SizeMismatchError, bytes_read_per_token
from methods.engine import TorchEngine
from methods.unquantized import Unquantized
from tests.architectures import VOCABULARY, tiny_tokenizer
from tests.harness.measures.surroundings import (
    BigramEngine,
    by_metric,
    drawn_ids,
    drawn_table,
    make_context,
    publish_unquantized,
)

HIDDEN, MLP, LAYERS, HEAD_DIM, KV_HEADS = 32, 64, 2, 8, 2
BLOCK_WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 3 * HIDDEN * MLP)


def loaded(folder: Path, dtype: str = "float32") -> TorchEngine:
    engine = Unquantized("plain", dtype).load(folder, Hardware("cpu", "cpu"))
    assert isinstance(engine, TorchEngine)
    return engine


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_equals_the_arithmetic_of_the_files(tmp_path: Path, dtype: str, width: int) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    publish_unquantized(context.artefact, "llama", dtype)
    tiny_tokenizer().save_pretrained(context.artefact)
    values = by_metric(Size().run(loaded(context.artefact, dtype), context))
    names = ("model.safetensors", "layers.json", "config.json", "generation_config.json")
    total = sum((context.artefact / name).stat().st_size for name in names)
    assert values["artefact_bytes"].value == total
    assert values["bits_per_weight"].value == 8 * width
    assert values["quantized_bytes"].value == BLOCK_WEIGHTS * width
    assert values["head_bytes"].value == VOCABULARY * HIDDEN * width
    assert values["embedding_bytes"].value == VOCABULARY * HIDDEN * width
    parts = ("quantized_bytes", "head_bytes", "embedding_bytes", "other_bytes")
    assert sum(values[part].value for part in parts) == total
    assert context.details["size"] == {"tied_embeddings": False}
    assert {value.protocol for value in values.values()} == {"stored"}


def test_tied_embeddings_are_counted_once_and_said(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    publish_unquantized(context.artefact, "llama_tied")
    values = by_metric(Size().run(loaded(context.artefact), context))
    assert values["head_bytes"].value == 0
    assert values["embedding_bytes"].value == VOCABULARY * HIDDEN * 4
    assert context.details["size"] == {"tied_embeddings": True}


def test_biases_are_no_part_of_bits_per_weight(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    publish_unquantized(context.artefact, "qwen2")
    tensors = load_file(context.artefact / "model.safetensors")
    assert any(name.endswith("q_proj.bias") for name in tensors)
    values = by_metric(Size().run(loaded(context.artefact), context))
    assert values["bits_per_weight"].value == 32


def test_a_count_that_differs_from_the_disk_is_an_error(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    publish_unquantized(context.artefact, stored_bits=BLOCK_WEIGHTS * 32 + 8)
    with pytest.raises(SizeMismatchError, match=f"take {BLOCK_WEIGHTS * 32:,} bits on disk"):
        Size().run(loaded(context.artefact), context)


def test_simulated_weights_have_no_size(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    publish_unquantized(context.artefact)
    assert Size().run(BigramEngine(drawn_table(8), execution="simulated"), context) == []


def test_an_artefact_without_safetensors_has_what_its_method_says(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    publish_unquantized(context.artefact)
    (context.artefact / "model.safetensors").rename(context.artefact / "model.other")
    values = by_metric(Size().run(BigramEngine(drawn_table(8)), context))
    assert set(values) == {"artefact_bytes", "bits_per_weight"}
    assert values["bits_per_weight"].value == 32


def test_bytes_read_leave_out_the_embedding_unless_it_is_the_head(tmp_path: Path) -> None:
    for kind in ("llama", "llama_tied"):
        folder = tmp_path / kind
        publish_unquantized(folder, kind)
        norms = (2 * LAYERS + 1) * HIDDEN
        expected = 4 * (BLOCK_WEIGHTS + VOCABULARY * HIDDEN + norms)
        assert bytes_read_per_token(loaded(folder), folder) == expected


def test_bytes_read_count_the_experts_a_token_is_sent_to(tmp_path: Path) -> None:
    folder = tmp_path / "mixtral"
    publish_unquantized(folder, "mixtral")
    engine = loaded(folder)
    stacks = [m for m in read_manifest(folder).matrices if m["count"] > 1]
    experts = sum(4 * m["count"] * m["out_features"] * m["in_features"] for m in stacks)
    tensors = load_file(folder / "model.safetensors")
    everything = sum(t.numel() * t.element_size() for t in tensors.values())
    embedding = VOCABULARY * HIDDEN * 4
    assert experts > 0
    # Two of four experts.
    assert bytes_read_per_token(engine, folder) == everything - embedding - experts // 2
    config = json.loads((folder / "config.json").read_text())
    del config["num_experts_per_tok"]
    (folder / "config.json").write_text(json.dumps(config))
    assert bytes_read_per_token(engine, folder) is None


class TellingEngine(BigramEngine):
    """Says itself what its artefact stores."""

    def __init__(self, stored: dict[str, int]) -> None:
        super().__init__(drawn_table(8))
        self.stored = stored
        self.reads_stored = True

    def stored_bytes(self) -> dict[str, int]:
        return self.stored


def test_a_format_of_its_own_is_read_by_its_engine(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    manifest = publish_unquantized(context.artefact)
    (context.artefact / "model.safetensors").rename(context.artefact / "model.other")
    stored = {
        f"{m['name']}.weight": 4 * m["out_features"] * m["in_features"] for m in manifest.matrices
    }
    stored["lm_head.weight"] = 12
    values = by_metric(Size().run(TellingEngine(stored), context))
    assert values["quantized_bytes"].value == BLOCK_WEIGHTS * 4
    assert values["head_bytes"].value == 12
    stored.popitem()
    stored.popitem()
    with pytest.raises(SizeMismatchError):
        Size().run(TellingEngine(stored), context)


def test_no_bytes_are_stated_where_the_engine_reads_others_than_are_stored(tmp_path: Path) -> None:
    publish_unquantized(tmp_path / "a", "llama")
    engine = TellingEngine({"a.weight": 8})
    assert bytes_read_per_token(engine, tmp_path / "a") == 8
    engine.reads_stored = False
    assert bytes_read_per_token(engine, tmp_path / "a") is None


def test_the_dtype_on_disk_counts_not_the_one_in_memory(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    publish_unquantized(context.artefact, "llama", "float16")
    engine = loaded(context.artefact, "float16")
    assert engine.model.model.norm.weight.dtype == torch.float32
    values = by_metric(Size().run(engine, context))
    assert values["bits_per_weight"].value == 16
    assert values["quantized_bytes"].value == BLOCK_WEIGHTS * 2
