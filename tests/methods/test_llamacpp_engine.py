"""llama.cpp behind the Engine protocol: against transformers, caches, growth, refusals."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from kernels.errors import ConfigError
from methods import llamacpp_engine
from methods.base import SizedCache
from methods.gguf_export import export
from methods.llamacpp_engine import LlamaCppEngine, open_engine
from tests.architectures import BOS_ID, VOCABULARY, logits_of, tiny, tiny_tokenizer
from tests.methods.forks import check_fork, drawn
from tests.methods.gguf_models import mean_kl
from tests.methods.machine import Machine

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

LENGTH = 1200
"""Beyond one call's 512 tokens and beyond the room of a fresh cache."""

LOGITS = 2e-4
"""Largest difference of a logit of the F32 file from transformers' (seen: 2e-5)."""

KV_ERRORS = {"float32": 1e-10, "float16": 1e-5, "bfloat16": 1e-3}
"""Largest mean KL by the type of keys and values (seen: 2e-13, 4e-8, 5e-6)."""


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama whose context takes more than one call; no two of its parameters are alike."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + (parameter.ndim == 1))
    return model


@pytest.fixture(scope="module")
def path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.gguf"
    export(model, tiny_tokenizer(), path, "float32")
    return path


@pytest.fixture
def engine(path: Path) -> Iterator[LlamaCppEngine]:
    engine = open_engine(path, Machine(), [])
    yield engine
    engine.close()


def ids_of(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def same(logits: Tensor, expected: Tensor) -> bool:
    return logits.shape == expected.shape and bool((logits - expected).abs().max() < LOGITS)


def test_it_says_what_it_is(engine: LlamaCppEngine) -> None:
    assert engine.runtime == "llama.cpp"
    assert engine.capabilities == {"logits", "cache", "fork", "generate", "logprobs", "memory"}
    assert (engine.vocab_size, engine.context_length) == (VOCABULARY, LENGTH)
    assert engine.kernels() == []


@pytest.mark.parametrize("dtype", KV_ERRORS)
def test_prefill_is_transformers(path: Path, model: Any, dtype: str) -> None:
    ids = ids_of(2, 40)
    engine = open_engine(path, Machine(compute_dtype=dtype), [])
    logits, cache = engine.prefill(ids)
    assert logits.dtype == torch.float32
    assert mean_kl(logits_of(model, ids), logits) < KV_ERRORS[dtype]
    width = 4 if dtype == "float32" else 2
    # Two layers, two heads of 16 for keys and as many for values.
    assert isinstance(cache, SizedCache)
    assert cache.nbytes == 2 * 40 * (2 * 2 * 2 * 16) * width
    engine.close()


def test_a_batch_longer_than_one_call_is_read_in_pieces(engine: LlamaCppEngine, model: Any) -> None:
    ids = ids_of(3, 700)
    expected = logits_of(model, ids)
    assert same(engine.prefill(ids)[0], expected)
    assert same(engine.prefill(ids, last=400)[0], expected[:, -400:])
    assert same(engine.prefill(ids, last=1)[0], expected[:, -1:])


def test_one_sequence_fills_the_context(engine: LlamaCppEngine, model: Any) -> None:
    ids = ids_of(1, LENGTH)
    logits, cache = engine.prefill(ids)
    assert same(logits, logits_of(model, ids))
    with pytest.raises(ConfigError, match=r"reads at most 1200 tokens; 1201 were given"):
        engine.decode(ids[:, :1], cache)


def test_decoding_is_prefill_one_token_at_a_time(engine: LlamaCppEngine, model: Any) -> None:
    ids = ids_of(2, 12)
    _, cache = engine.prefill(ids[:, :5], last=1)
    steps = []
    for place in range(5, 12):
        logits, cache = engine.decode(ids[:, place : place + 1], cache)
        assert logits.shape == (2, 1, VOCABULARY)
        steps.append(logits)
    assert same(torch.cat(steps, dim=1), logits_of(model, ids)[:, 5:])


def test_a_cache_is_read_on_with_several_tokens(engine: LlamaCppEngine, model: Any) -> None:
    ids = ids_of(2, 30)
    _, cache = engine.prefill(ids[:, :10], last=1)
    # More logits than the cache was made for.
    logits, same_cache = engine.prefill(ids[:, 10:], cache)
    assert same_cache is cache
    assert same(logits, logits_of(model, ids)[:, 10:])


def test_a_cache_grows_beyond_its_first_room(engine: LlamaCppEngine, model: Any) -> None:
    ids = ids_of(2, 900)
    _, cache = engine.prefill(ids[:, :20], last=1)
    first = cache.context.capacity
    logits, cache = engine.prefill(ids[:, 20:], cache, last=5)
    assert first < 900 <= cache.context.capacity
    assert same(logits, logits_of(model, ids)[:, -5:])


def test_two_caches_live_side_by_side(engine: LlamaCppEngine, model: Any) -> None:
    one, other = ids_of(2, 20), ids_of(2, 20).flip(1)
    _, first = engine.prefill(one[:, :10], last=1)
    _, second = engine.prefill(other[:, :10], last=1)
    assert same(engine.prefill(one[:, 10:], first)[0], logits_of(model, one)[:, 10:])
    assert same(engine.prefill(other[:, 10:], second)[0], logits_of(model, other)[:, 10:])


def test_the_context_of_a_dropped_cache_serves_the_next_one(
    engine: LlamaCppEngine, model: Any
) -> None:
    ids = ids_of(2, 30)
    _, cache = engine.prefill(ids, last=1)
    context = cache.context
    del cache
    gc.collect()
    logits, cache = engine.prefill(ids.flip(1))
    assert cache.context is context
    assert cache.length == 30
    assert same(logits, logits_of(model, ids.flip(1)))
    del cache
    # The same context, now too small for what is read.
    longer = ids_of(2, 900)
    logits, cache = engine.prefill(longer)
    assert cache.context is context
    assert same(logits, logits_of(model, longer))
    _, other = engine.prefill(ids[:1], last=1)
    assert other.context is not context


def test_a_cache_of_one_sequence_goes_on_in_several_ways(engine: LlamaCppEngine) -> None:
    assert "fork" in engine.capabilities
    check_fork(engine, drawn(4, VOCABULARY))
    _, cache = engine.prefill(ids_of(2, 20), last=1)
    with pytest.raises(ValueError, match="caches of one sequence only"):
        engine.fork(cache, [0, 0])


def test_keys_and_values_take_what_is_said(engine: LlamaCppEngine) -> None:
    _, cache = engine.prefill(ids_of(1, 100), last=1)
    state = len(cache.context._state(0))
    # llama.cpp's own state adds position and sequence of each token, and a header.
    assert cache.nbytes < state < cache.nbytes + 100 * 16 + 500


def test_what_cannot_be_read_is_refused(engine: LlamaCppEngine) -> None:
    with pytest.raises(ConfigError, match=r"at most 1200 tokens; 1300 were given"):
        engine.prefill(ids_of(1, 1300))
    with pytest.raises(ConfigError, match=r"vocabulary of 320: 0 to 320 were given"):
        engine.prefill(torch.tensor([[0, 320]]))
    with pytest.raises(ConfigError, match=r"at most 256 sequences at once, not 300"):
        engine.prefill(ids_of(300, 1))
    _, cache = engine.prefill(ids_of(2, 3))
    with pytest.raises(ConfigError, match=r"holds 2 sequences, but 1 are to be read on"):
        engine.decode(torch.tensor([[0]]), cache)


def test_a_closed_engine_keeps_nothing(path: Path) -> None:
    engine = open_engine(path, Machine(), [])
    _, cache = engine.prefill(ids_of(2, 3))
    kept = engine.prefill(ids_of(1, 3))
    del kept
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.prefill(ids_of(1, 2))
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.decode(torch.zeros(2, 1, dtype=torch.int64), cache)
    del cache
    gc.collect()


def test_a_mapped_and_a_read_file_give_the_same(path: Path) -> None:
    ids = ids_of(2, 20)
    mapped, read = (open_engine(path, Machine(), [], use_mmap=way) for way in (True, False))
    assert torch.equal(mapped.prefill(ids)[0], read.prefill(ids)[0])
    assert "model.gguf" in Path("/proc/self/maps").read_text()
    mapped.close()
    assert "model.gguf" not in Path("/proc/self/maps").read_text()
    read.close()


def test_positions_that_are_embedded_end_with_the_context(tmp_path: Path) -> None:
    model = tiny("gpt2")
    export(model, tiny_tokenizer(), tmp_path / "gpt2.gguf", "float32")
    engine = open_engine(tmp_path / "gpt2.gguf", Machine(), [])
    ids = ids_of(2, 64)
    # llama.cpp looks its GELU up in a table of float16.
    assert mean_kl(logits_of(model, ids), engine.prefill(ids)[0]) < 1e-6
    with pytest.raises(ConfigError, match="at most 64 tokens"):
        engine.prefill(ids_of(1, 65))
    engine.close()


def test_a_file_that_is_none_is_one_sentence(
    tmp_path: Path, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        ConfigError, match=r"^llama\.cpp cannot load broken\.gguf: [^\n]*key-value pairs$"
    ):
        open_engine(broken, Machine(), [])
    assert "llama" in capfd.readouterr().err


def test_its_log_is_short(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = open_engine(path, Machine(), [])
    engine.prefill(ids_of(3, 20))
    engine.close()
    written = capfd.readouterr()
    assert written.out == ""
    assert len(written.err.splitlines()) <= 1


def test_a_card_needs_a_build_for_cards() -> None:
    if llamacpp_engine.library().api.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp is built for cards")
    with pytest.raises(ConfigError, match=r"built for the CPU only.*GGML_CUDA=on"):
        llamacpp_engine.check_device(Machine(device="cuda"))
