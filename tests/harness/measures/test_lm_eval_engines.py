"""One adapter for every engine: the same model gives the same answers on each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from torch import Tensor

from harness.measures.lm_eval_model import EngineModel
from harness.measures.reading import write_greedily
from methods.base import Engine
from methods.engine import TorchEngine
from tests.architectures import tiny, tiny_tokenizer
from tests.methods.machine import Machine

TOLERANCE = 2e-4
"""Of a log-likelihood in nats: sums of some twenty tokens (seen: 3e-5)."""

SHOTS = "Question: one? Answer: two. "


def asked() -> list[Any]:
    pairs = [(SHOTS + end, rest) for end in ("three?", "four?") for rest in (" a", " bcd", " bce")]
    pairs += [("", "no context"), ("short", " text"), ("short", " texts and more")]
    return [SimpleNamespace(args=pair) for pair in pairs]


def prompts() -> list[Any]:
    options = {"until": ["z"], "max_gen_toks": 8}
    return [SimpleNamespace(args=(text, options)) for text in ("one", SHOTS, SHOTS + "three?")]


def check(engine: Engine) -> None:
    expected = EngineModel(TorchEngine(tiny("llama"), "cpu", []), tiny_tokenizer(), 1, [])
    wanted = expected.loglikelihood(asked())
    for batch_size in (1, 3):
        ours = EngineModel(engine, tiny_tokenizer(), batch_size, [])
        found = ours.loglikelihood(asked())
        assert [score for score, _ in found] == pytest.approx(
            [score for score, _ in wanted], abs=TOLERANCE
        )
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        assert ours.generate_until(prompts()) == expected.generate_until(prompts())


class Served(TorchEngine):
    """Scores and writes like a server, and shows no logits."""

    capabilities = frozenset({"serve", "generate", "logprobs"})  # type: ignore[assignment]

    def token_log_likelihoods(self, input_ids: Tensor) -> Tensor:
        return self.token_scores(input_ids)[0]

    def token_scores(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = TorchEngine.prefill(self, input_ids[:, :-1])[0]
        targets = input_ids[:, 1:]
        found = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
        return found, logits.argmax(-1) == targets

    def write(self, prompts: Sequence[Sequence[int]], most: int, stops: Sequence[str]) -> list[str]:
        # It goes on behind a stop string, as a server may.
        written = [
            write_greedily(
                TorchEngine(self.model, "cpu", []), [prompt], most, lambda tokens: False, 16
            )
            for prompt in prompts
        ]
        return [tiny_tokenizer().decode(tokens[0], skip_special_tokens=True) for tokens in written]

    def prefill(self, *_: Any, **__: Any) -> NoReturn:
        pytest.fail("a server shows no logits")


def test_an_engine_without_logits() -> None:
    check(Served(tiny("llama"), "cpu", []))


def test_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from methods.gguf_export import export
    from methods.llamacpp_engine import open_engine

    path = tmp_path / "model.gguf"
    export(tiny("llama"), tiny_tokenizer(), path, "float32")
    engine = open_engine(path, Machine(), [])
    check(engine)
    engine.close()


def test_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from methods.onnx_unquantized import OnnxUnquantized

    method = OnnxUnquantized("onnx_fp32", "float32")
    method.quantize(tiny("llama"), tiny_tokenizer(), None, tmp_path)
    engine = method.load(tmp_path, Machine())
    check(engine)
    engine.close()
