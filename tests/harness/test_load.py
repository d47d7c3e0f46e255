"""A model is loaded whole and sound, or refused in one sentence that names what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness.load import load_model, load_tokenizer, meta_model, model_facts, random_model
from harness.models import LocalModel
from harness.shape_model import ShapeModel
from kernels.errors import ConfigError
from tests.architectures import BOS_ID, CONFIGS, VOCABULARY, logits_of, tiny_ids, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WEIGHT = "model.layers.0.mlp.up_proj.weight"

Tensors = dict[str, Tensor]


def source(folder: Path, **options: Any) -> LocalModel:
    return LocalModel("m", str(folder), **options)


def change_weights(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(source(folder, **options))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_is_loaded_in_float32_and_its_type_remembered(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    written = write_checkpoint(tmp_path, kind, dtype).state_dict()
    # What config.json claims does not count; the tensors do.
    change_config(tmp_path, dtype="float64")
    model, tokenizer = load_model(source(tmp_path))
    assert model.config.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not model.training
    assert tokenizer("a").input_ids[0] == BOS_ID
    loaded = model.state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name].float()) for name in written)


def test_buffers_that_old_checkpoints_carry_do_no_harm(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gpt2")
    change_weights(tmp_path, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1)}))
    load_model(source(tmp_path))
    write_checkpoint(tmp_path, "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(tmp_path, lambda t: t.update({name: torch.ones(4)}))
    load_model(source(tmp_path))


def test_shards_are_read_together(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="40kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded, _ = load_model(source(tmp_path))
    assert torch.equal(logits_of(loaded, tiny_ids()), logits_of(model, tiny_ids()))


def test_a_pickle_is_read_only_where_it_is_allowed(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "only with model.allow_pickle=true" in refusal(tmp_path)
    loaded, _ = load_model(source(tmp_path, allow_pickle=True))
    assert torch.equal(logits_of(loaded, tiny_ids()), logits_of(model, tiny_ids()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert "cannot be read" in refusal(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("keep", [0.5, 0.001, 0])
def test_a_truncated_file_is_named(keep: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(keep * len(content))])
    assert f"{weights} is truncated or damaged" in refusal(tmp_path)


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[20:60] = b"\0" * 40
    weights.write_bytes(content)
    assert f"{weights} is truncated or damaged" in refusal(tmp_path)


def test_missing_unknown_and_misfitting_tensors_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    change_weights(tmp_path, lambda t: t.update({WEIGHT: t[WEIGHT][:5].clone()}))
    sentence = refusal(tmp_path)
    assert (
        f"does not fit its config.json in 1 tensor: {WEIGHT} is [5, 32], not [64, 32]" in sentence
    )
    change_weights(tmp_path, without(WEIGHT))
    assert f"lacks 1 tensor: {WEIGHT};" in refusal(tmp_path)
    write_checkpoint(tmp_path)
    change_weights(tmp_path, lambda t: t.update({"model.extra.weight": torch.ones(2)}))
    assert "holds unknown 1 tensor: model.extra.weight;" in refusal(tmp_path)


def test_an_expert_that_is_missing_is_no_fresh_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mixtral")
    names = load_file(tmp_path / "model.safetensors")
    expert = next(name for name in sorted(names) if ".experts.1." in name)
    change_weights(tmp_path, without(expert))
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype=torch.float16)

    def spoil(tensors: Tensors) -> None:
        tensors[WEIGHT][3, 4] = value

    change_weights(tmp_path, spoil)
    assert f"weight {WEIGHT} holds 1 values that are NaN or infinite" in refusal(tmp_path)


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(VOCABULARY - 257)])
    tokenizer.save_pretrained(tmp_path)
    load_model(source(tmp_path))
    tokenizer.add_tokens(["<one too many>"])
    tokenizer.save_pretrained(tmp_path)
    sentence = refusal(tmp_path)
    assert "'<one too many>' has id 320" in sentence
    assert "vocabulary has 320 entries" in sentence


def test_a_missing_and_a_damaged_tokenizer_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    assert f"the tokenizer in {tmp_path} cannot be read" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert f"{tmp_path} holds no tokenizer (tokenizer.json, tokenizer.model" in refusal(tmp_path)
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "nosuch"}, "transformers knows no architecture 'nosuch'"),
        ({"model_type": "t5"}, "holds a t5 model, which is no causal language model"),
        ({"num_attention_heads": 3}, "is not a multiple of the number of attention heads"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already"),
        ({"model_type": None}, "names no model_type"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path)
    change_config(tmp_path, **changes)
    assert expected in refusal(tmp_path)


def test_integer_weights_are_no_checkpoint_to_start_from(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    change_weights(tmp_path, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}))
    assert "are stored as I8" in refusal(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(tmp_path, auto_map=own, model_type="ownmodel")
    trace = tmp_path / "was_run"
    (tmp_path / "own.py").write_text(f"open({str(trace)!r}, 'w')")
    assert "models that bring their own code are not run" in refusal(tmp_path)
    # An architecture that transformers has itself is loaded from there, not from the folder.
    change_config(tmp_path, model_type="llama")
    load_model(source(tmp_path))
    assert not trace.exists()


def test_loading_says_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "whole")
    write_checkpoint(tmp_path / "torn")
    change_weights(tmp_path / "torn", without(WEIGHT))
    code = (
        "import sys\n"
        "from harness.load import load_model, random_model\n"
        "from harness.models import LocalModel\n"
        "from harness.shape_model import ShapeModel\n"
        "from kernels.errors import ConfigError\n"
        f"load_model(LocalModel('m', {str(tmp_path / 'whole')!r}))\n"
        f"load_model(ShapeModel('s', {CONFIGS['llama']!r}))\n"
        f"try: load_model(LocalModel('m', {str(tmp_path / 'torn')!r}))\n"
        "except ConfigError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.stderr) == ("refused\n", "")


@pytest.mark.parametrize("kind", CONFIGS)
def test_random_weights_are_seeded_and_of_the_models_own_scale(kind: str) -> None:
    def made(seed: int) -> Any:
        return random_model(ShapeModel("s", CONFIGS[kind], seed=seed))

    model, same, other = made(0), made(0), made(1)
    expected = meta_model(CONFIGS[kind])
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }
    logits = logits_of(model, tiny_ids())
    assert torch.equal(logits, logits_of(same, tiny_ids()))
    assert not torch.equal(logits, logits_of(other, tiny_ids()))
    assert bool(torch.isfinite(logits).all())
    assert 0 < float(logits.std()) < 10
    matrices = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    assert float(matrices.std()) == pytest.approx(0.02, rel=0.02)
    assert torch.equal(matrices, matrices.bfloat16().float())
    assert model_facts(model)["stored_dtype"] == "bfloat16"
    assert model_facts(model)["tied_embeddings"] == model_facts(expected)["tied_embeddings"]


def test_a_shape_has_the_tokenizer_it_is_given(tmp_path: Path) -> None:
    assert load_model(ShapeModel("s", CONFIGS["llama"]))[1] is None
    write_checkpoint(tmp_path)
    _, tokenizer = load_model(ShapeModel("s", CONFIGS["llama"], tokenizer=str(tmp_path)))
    assert len(tokenizer) == 257
    with pytest.raises(ConfigError, match="does not fit"):
        load_model(ShapeModel("s", {**CONFIGS["llama"], "vocab_size": 99}, tokenizer=str(tmp_path)))


def test_random_weights_are_those_of_the_untouched_global_generator() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    random_model(ShapeModel("s", CONFIGS["llama"]))
    assert torch.equal(torch.rand(3), expected)


def test_facts_of_a_model() -> None:
    facts = model_facts(meta_model({**CONFIGS["llama_tied"], "dtype": "float16"}))
    assert facts == {
        "architecture": "LlamaForCausalLM",
        "parameters": 320 * 32 + 2 * 9216 + 5 * 32,
        "tied_embeddings": True,
        "stored_dtype": "float16",
        "context_length": 64,
        "vocab_size": 320,
        "ends": {"embedding": "model.embed_tokens", "head": "lm_head"},
    }


def test_what_transformers_itself_loads_is_the_same(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2", torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, _ = load_model(source(tmp_path))
    assert torch.equal(logits_of(ours, tiny_ids()), logits_of(theirs, tiny_ids()))
