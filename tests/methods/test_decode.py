"""The decode step in C against the model itself, and the models it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kernels.decode_step import DecodeStep
from kernels.host_build import unavailable
from methods import decode as decoding
from methods.decode import MOST_SEQUENCES, NAME, TOLERANCES, c_decode
from methods.engine import BY_MODEL, TorchEngine
from methods.kv_cache import ROOM
from methods.rtn import RTN
from methods.unquantized import Unquantized
from tests.architectures import tiny, tiny_ids
from tests.methods.forks import check_fork, drawn
from tests.methods.machine import Machine

needs_c = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

BASE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "one_key_head": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 10},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


def model_of(kind: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    config = CONFIG_MAPPING[kind["model_type"]].from_dict({**BASE, **kind})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval().to(dtype)


def engines(model: Any) -> tuple[TorchEngine, TorchEngine]:
    """Return an engine that decodes in C and one whose model decodes."""
    fast, remark = c_decode(model)
    assert fast is not None, remark
    return TorchEngine(model, "cpu", [], fast=fast), TorchEngine(model, "cpu", [])


def decoded(engine: TorchEngine, ids: Tensor, prompt: int) -> Tensor:
    logits, cache = engine.prefill(ids[:, :prompt], last=1)
    steps = [logits]
    for at in range(prompt, ids.shape[1]):
        logits, cache = engine.decode(ids[:, at : at + 1], cache)
        steps.append(logits)
    return torch.cat(steps, 1)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_logits_are_the_models(kind: str, dtype: torch.dtype) -> None:
    fast, plain = engines(model_of(KINDS[kind], dtype))
    assert fast.decoding == NAME
    ids = tiny_ids(3, 30)
    found, expected = decoded(fast, ids, 6), decoded(plain, ids, 6)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert difference(found, expected) < (1e-5 if dtype == torch.float32 else 0.03)


@needs_c
def test_a_context_grows_beyond_its_buffers() -> None:
    fast, plain = engines(model_of(KINDS["llama"]))
    ids = tiny_ids(1, 3 * ROOM)
    assert difference(decoded(fast, ids, 2), decoded(plain, ids, 2)) < 1e-5


@needs_c
def test_prefill_decode_prefill() -> None:
    fast, plain = engines(model_of(KINDS["qwen2"]))
    ids = tiny_ids(2, 20)
    expected, _ = plain.prefill(ids)
    first, cache = fast.prefill(ids[:, :5])
    second, cache = fast.decode(ids[:, 5:6], cache)
    third, cache = fast.prefill(ids[:, 6:18], cache)
    fourth, cache = fast.decode(ids[:, 18:19], cache)
    fifth, cache = fast.prefill(ids[:, 19:], cache)
    found = torch.cat([first, second, third, fourth, fifth], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 20


@needs_c
def test_forks_are_decoded_apart() -> None:
    fast, _ = engines(model_of(KINDS["llama"]))
    check_fork(fast, drawn(4, 320))
    ids = tiny_ids(1, 8)
    _, cache = fast.prefill(ids)
    fork = fast.fork(cache, [0])
    one, cache = fast.decode(ids[:, :1], cache)
    fast.decode(ids[:, 1:2], fork)
    again, _ = fast.decode(ids[:, :1], fast.prefill(ids)[1])
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    following, _ = fast.decode(ids[:, 2:3], cache)
    expected, _ = fast.prefill(torch.cat([ids, ids[:, :1], ids[:, 2:3]], 1), last=1)
    torch.testing.assert_close(following, expected, rtol=1e-4, atol=1e-4)


@needs_c
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["one_key_head", "qwen3"])
def test_threads_and_neighbours_do_not_change_a_bit(kind: str) -> None:
    fast, _ = engines(model_of(KINDS[kind]))
    ids = tiny_ids(3, 12)
    _, cache = fast.prefill(ids[:, :11])
    together, _ = fast.decode(ids[:, 11:], fast.fork(cache, [0, 1, 2]))
    row, _ = fast.decode(ids[1:2, 11:], fast.fork(cache, [1]))
    torch.testing.assert_close(row, together[1:2], rtol=0, atol=0)
    torch.set_num_threads(1)
    alone, _ = fast.decode(ids[:, 11:], cache)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@needs_c
def test_greedy_text_is_the_models() -> None:
    fast, plain = engines(model_of(KINDS["qwen3"]))
    texts = []
    for engine in (fast, plain):
        logits, cache = engine.prefill(tiny_ids(4, 5), last=1)
        text = []
        for _ in range(40):
            token = logits[:, -1:].argmax(-1)
            text += token.flatten().tolist()
            logits, cache = engine.decode(token, cache)
        texts.append(text)
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 8


@needs_c
def test_a_large_batch_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = engines(model_of(KINDS["llama"]))
    calls: list[int] = []
    inner = DecodeStep.__call__

    def counted(self: DecodeStep, x: Tensor, *rest: Any) -> Tensor:
        calls.append(x.shape[0])
        return inner(self, x, *rest)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    for rows in (MOST_SEQUENCES, MOST_SEQUENCES + 1):
        ids = tiny_ids(rows, 8)
        assert difference(decoded(fast, ids, 6), decoded(plain, ids, 6)) < 1e-5
    assert calls == [MOST_SEQUENCES] * 2


def refusal(model: Any) -> str:
    fast, remark = c_decode(model)
    assert fast is None
    engine = TorchEngine(model, "cpu", [], fast=fast, remark=remark)
    assert engine.decoding == f"{BY_MODEL}: {remark}"
    return remark


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("gpt2", "the model has no part named model"),
        ("opt", "the decoder has no part named embed_tokens, layers, norm, rotary_emb"),
        ("gpt_neox", "the model has no part named model"),
        ("mixtral", "the model has settings that the C code lacks: num_experts, num_experts"),
    ],
)
def test_other_decoders_are_refused(kind: str, sentence: str) -> None:
    assert sentence in refusal(tiny(kind))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, "DynamicSlidingWindowLayer"),
        ({"model_type": "gemma"}, "the last norm computes something else than RMSNorm"),
        ({"model_type": "gemma2"}, "caps its scores or logits (attn_logit_softcapping)"),
        ({"model_type": "smollm3"}, "settings that the C code lacks: use_rope"),
        ({"model_type": "granite"}, "settings that the C code lacks: embedding_multiplier"),
        ({"model_type": "helium"}, "does not turn a head by its halves"),
        ({"model_type": "arcee"}, "the MLP has no part named gate_proj"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "the activation of the MLP is not SiLU"),
        ({"model_type": "olmo"}, "the last norm is a OlmoLayerNorm, which is no RMSNorm"),
    ],
)
def test_what_the_c_code_lacks_is_named(kind: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(model_of({**kind, "head_dim": 12}))


def test_hooks_are_refused() -> None:
    model = model_of(KINDS["llama"])
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert refusal(model) == "model.layers.1.mlp has a hook, which the C code would pass by"


def test_a_linear_map_of_another_class_is_refused() -> None:
    model = model_of(KINDS["llama"])

    class Other(nn.Linear):
        pass

    model.lm_head = Other(48, 320, bias=False)
    assert refusal(model) == "the head is a Other, which the C code cannot read"


@needs_c
def test_a_step_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(KINDS["llama"])
    inner = decoding._norm
    monkeypatch.setattr(decoding, "_norm", lambda *a: (inner(*a)[0].roll(1), inner(*a)[1]))
    assert "differ from the model's by" in refusal(model)
    monkeypatch.setattr(decoding, "_norm", lambda *a: (inner(*a)[0] * torch.nan, inner(*a)[1]))
    assert f"by nan of their size, and {TOLERANCES[torch.float32]:.2g}" in refusal(model)


def test_the_model_decodes_where_that_is_asked_for(tmp_path: Path) -> None:
    method = Unquantized("fp32", "float32")
    method.quantize(tiny("llama"), None, None, tmp_path)
    engine = method.load(tmp_path, Machine(decode="model"))
    assert isinstance(engine, TorchEngine)
    assert engine.decoding == f"{BY_MODEL}: hardware.decode=model"


@needs_c
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_unquantized_models_decode_in_c(dtype: str, tmp_path: Path) -> None:
    method = Unquantized(dtype, dtype)
    method.quantize(tiny("llama"), None, None, tmp_path)
    compute = "bfloat16" if dtype == "bfloat16" else "float32"
    engine = method.load(tmp_path, Machine(compute_dtype=compute))
    assert isinstance(engine, TorchEngine)
    assert engine.decoding == NAME
    plain = TorchEngine(engine.model, "cpu", [])
    ids = tiny_ids(2, 16)
    found, expected = decoded(engine, ids, 8), decoded(plain, ids, 8)
    assert difference(found, expected) < (0.03 if dtype == "bfloat16" else 1e-5)


@needs_c
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(8, -1, True), (4, 32, False), (3, 32, True), (2, 32, False)],
)
def test_packed_models_decode_in_c(
    bits: int, group_size: int, symmetric: bool, dtype: str, tmp_path: Path
) -> None:
    method = RTN("rtn", bits, group_size, symmetric=symmetric, head=bits == 4)
    method.quantize(tiny("qwen2"), None, None, tmp_path)
    machine = Machine(compute_dtype=dtype)
    engine, plain = method.load(tmp_path, machine), method.load_dequantized(tmp_path, machine)
    assert isinstance(engine, TorchEngine)
    assert isinstance(plain, TorchEngine)
    assert engine.decoding == NAME
    assert plain.decoding.startswith(BY_MODEL)
    ids = tiny_ids(2, 16)
    assert difference(decoded(engine, ids, 8), decoded(plain, ids, 8)) < 0.03


@needs_c
def test_rounded_activations_may_flip_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(compute_dtype="bfloat16")
    # Between what the types allow by themselves and what int8 codes may add to it.
    difference = 2 * TOLERANCES[torch.bfloat16]
    monkeypatch.setattr(decoding, "_difference", lambda model, decode: difference)
    for activation_bits, decoder in ((8, NAME), (None, BY_MODEL)):
        method = RTN("rtn", 8, -1, activation_bits=activation_bits)
        folder = tmp_path / str(activation_bits)
        method.quantize(model_of(KINDS["llama"]), None, None, folder)
        assert method.load(folder, machine).decoding.startswith(decoder)  # type: ignore[attr-defined]
