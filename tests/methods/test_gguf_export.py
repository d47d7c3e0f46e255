"""The GGUF exporter: llama.cpp computes from its files what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods import gguf_export
from methods.gguf_export import export
from methods.gguf_header import read_header
from methods.gguf_names import family_of, gguf_name, hf_names
from methods.gguf_read import stored_tensors
from tests.architectures import CONTEXT, VOCABULARY, logits_of, tiny, tiny_ids, tiny_tokenizer
from tests.methods.gguf_models import KINDS, llama_cpp_logits, mean_kl, tiny_kind

pytest.importorskip("gguf", reason="the optional package gguf is not installed")
pytest.importorskip("llama_cpp", reason="the optional package llama-cpp-python is not installed")

# Seen: 3e-12 for the rotary families, 6e-8 for GPT-2, whose GELU llama.cpp looks up in float16.
KL = 1e-6


def exported(model: Any, folder: Path, dtype: str = "float32") -> Path:
    path = folder / "model.gguf"
    export(model, tiny_tokenizer(), path, dtype)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    model, ids = tiny_kind(kind), tiny_ids(2, CONTEXT)
    expected = logits_of(model, ids)
    assert mean_kl(expected, expected[:, torch.randperm(CONTEXT)]) > 1e-2  # logits that say much
    assert mean_kl(expected, llama_cpp_logits(exported(model, tmp_path), ids)) < KL


def test_an_untied_head_of_gpt2_is_exported(tmp_path: Path) -> None:
    model, ids = tiny_kind("gpt2", {"tie_word_embeddings": False}), tiny_ids()
    path = exported(model, tmp_path)
    assert "lm_head.weight" in stored_tensors(path)
    assert mean_kl(logits_of(model, ids), llama_cpp_logits(path, ids)) < KL


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_rows_in_the_wrong_order_are_noticed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_it_is(weight: Tensor, heads: int) -> Tensor:
        return weight

    monkeypatch.setattr(gguf_export, "permute", as_it_is)
    model, ids = tiny_kind(kind), tiny_ids(2, CONTEXT)
    assert mean_kl(logits_of(model, ids), llama_cpp_logits(exported(model, tmp_path), ids)) > 1e-4


def test_unscaled_rotations_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "_frequency_factors", lambda config: None)
    model, ids = tiny_kind("llama3"), tiny_ids(2, CONTEXT)
    assert mean_kl(logits_of(model, ids), llama_cpp_logits(exported(model, tmp_path), ids)) > 1e-5


@pytest.mark.parametrize(
    ("dtype", "name", "divergence"), [("float16", "F16", 1e-5), ("bfloat16", "BF16", 1e-3)]
)
def test_matrices_are_rounded_and_vectors_are_not(
    dtype: str, name: str, divergence: float, tmp_path: Path
) -> None:
    model, ids = tiny_kind("llama"), tiny_ids()
    path = exported(model, tmp_path, dtype)
    tensors = stored_tensors(path)
    assert {tensor.type for tensor in tensors.values() if len(tensor.shape) == 2} == {name}
    assert {tensor.type for tensor in tensors.values() if len(tensor.shape) == 1} == {"F32"}
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    # llama.cpp rounds the activations to the matrix's type too: seen 2e-6 and 1e-4.
    assert mean_kl(logits_of(model, ids), llama_cpp_logits(path, ids)) < divergence


def test_position_embeddings_stay_float32(tmp_path: Path) -> None:
    tensors = stored_tensors(exported(tiny("gpt2"), tmp_path, "float16"))
    assert tensors["transformer.wpe.weight"].type == "F32"
    assert tensors["transformer.wte.weight"].type == "F16"


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    for kind, tied in (("llama", False), ("llama_tied", True), ("gpt2", True)):
        names = stored_tensors(exported(tiny(kind), tmp_path))
        assert ("lm_head.weight" in names) is not tied


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_the_same_model_gives_the_same_bytes_and_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    model = tiny_kind(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = exported(model, tmp_path, "bfloat16").read_bytes()
    assert exported(model, tmp_path, "bfloat16").read_bytes() == first
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_metadata_are_those_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    import gguf

    path = exported(tiny_kind("llama_wide"), tmp_path, "float16")
    fields = gguf.GGUFReader(path).fields  # not the reader of this project
    found = {key: field.contents() for key, field in fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.MOSTLY_F16,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert str(tmp_path) not in repr(found)


def test_a_model_without_tokenizer_runs(tmp_path: Path) -> None:
    model, ids, path = tiny("llama"), tiny_ids(), tmp_path / "model.gguf"
    notes = export(model, None, path, "float32")
    assert len(notes) == 1
    assert "no tokenizer" in notes[0]
    assert mean_kl(logits_of(model, ids), llama_cpp_logits(path, ids)) < KL


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_the_gguf_package(kind: str) -> None:
    import gguf

    model = tiny_kind(kind)
    model_type = model.config.model_type
    number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(number[family_of(model_type).arch], 2)
    for parameter in model.state_dict():
        tensor = gguf_name(model_type, parameter)
        assert tensor == names.get_name(parameter, (".weight", ".bias"))
        assert hf_names(model_type, tensor) == [parameter]


def test_a_table_of_frequencies_is_no_parameter() -> None:
    assert hf_names("llama", "rope_freqs.weight") == []
    for model_type, tensor in (
        ("gpt2", "rope_freqs.weight"),
        ("llama", "blk.0.attn_qkv.weight"),
        ("llama", "blk.x.attn_q.weight"),
        ("llama", "attn_q.weight"),
    ):
        with pytest.raises(ConfigError, match="can be read here"):
            hf_names(model_type, tensor)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("mistral", {"sliding_window": 32}, "slides over 32 of 64 tokens"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "slides over 8",
        ),
        ("qwen2", {"num_attention_heads": 4, "head_dim": 16}, "heads are 64 wide together"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'yarn'",
        ),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gpt2", {"scale_attn_weights": False}, "does not scale its attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "by layer"),
    ],
)
def test_structures_that_llama_cpp_lacks_are_refused(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=said):
        export(tiny_kind(kind, changes), tiny_tokenizer(), path, "float32")
    assert not path.exists()


def test_a_window_that_no_context_fills_is_none(tmp_path: Path) -> None:
    model, ids = tiny_kind("mistral", {"sliding_window": CONTEXT}), tiny_ids(1, CONTEXT)
    path = exported(model, tmp_path)
    assert mean_kl(logits_of(model, ids), llama_cpp_logits(path, ids)) < KL


@pytest.mark.parametrize("kind", ["mixtral", "opt", "gpt_neox"])
def test_other_families_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{kind}.* the types that can are llama, mistral, qwen2"):
        exported(tiny(kind), tmp_path)


def test_a_parameter_without_a_place_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ConfigError, match=r"'model\.layers\.0\.extra' has no place"):
        exported(model, tmp_path)


def test_values_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ConfigError, match=r"1.mlp.up_proj.weight .* too large for float16"):
        exported(model, tmp_path, "float16")
    assert list(tmp_path.iterdir()) == []
    assert stored_tensors(exported(model, tmp_path, "bfloat16"))


def test_unknown_types_and_a_missing_package_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="float32, float16, bfloat16, not 'int8'"):
        exported(tiny("llama"), tmp_path, "int8")
    monkeypatch.setattr("methods.library.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package gguf"):
        exported(tiny("llama"), tmp_path)


def test_ids_without_a_token_are_filled(tmp_path: Path) -> None:
    tokens = read_header(exported(tiny("llama"), tmp_path)).fields["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == VOCABULARY
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]"
