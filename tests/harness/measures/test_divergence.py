"""Divergence from the unquantized model against direct float64 computations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

from harness.context import Context, ReferenceMissingError
from harness.hardware import Hardware
from harness.measures import windows
from harness.measures.divergence import Divergence, token_divergence
from harness.measures.kept_logits import WINDOW_KIND
from harness.measures.perplexity import Perplexity
from kernels.errors import ConfigError
from tests.architectures import VOCABULARY, logits_of, tiny
from tests.harness.measures.surroundings import (
    BigramEngine,
    by_metric,
    drawn_ids,
    drawn_table,
    engine_of,
    make_context,
)

LENGTH = 20
MEASURE = Divergence(seq_len=LENGTH)


def perturbed(model: Any, scale: float = 0.02) -> Any:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return changed


def direct(reference: Any, engine: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return per window [n] of each metric, by the definitions, in float64."""
    parts = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    expected, found = (logits_of(m, parts)[:, :-1].double() for m in (reference, engine))
    p, q = expected.softmax(-1), found.softmax(-1)
    targets = parts[:, 1:, None]
    delta = (q.gather(-1, targets) - p.gather(-1, targets))[..., 0]
    return {
        "kl_mean": (p * (p.log() - q.log())).sum(-1).mean(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(-1),
        "delta_p_mean": delta.mean(-1),
        "mean_absolute_logit_difference": (expected - found).abs().mean((-1, -2)),
        "delta_p_rms": delta.square().mean().sqrt(),
        "kl": (p * (p.log() - q.log())).sum(-1).flatten(),
    }


def prepared(folder: Path, model: Any, ids: Tensor, hardware: Hardware | None = None) -> Context:
    context = make_context(folder, ids)
    context.hardware = hardware or context.hardware
    MEASURE.prepare(engine_of(model), context)
    return context


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
def test_equals_the_definitions_in_float64(tmp_path: Path, kind: str) -> None:
    model, ids = tiny(kind), drawn_ids(4 * LENGTH + 3, VOCABULARY)
    changed = perturbed(model)
    context = prepared(tmp_path, model, ids)
    found = by_metric(MEASURE.run(engine_of(changed), context))
    expected = direct(model, changed, ids)
    for metric in (
        "kl_mean",
        "top1_agreement",
        "delta_p_mean",
        "mean_absolute_logit_difference",
    ):
        assert found[metric].samples == pytest.approx(expected[metric].tolist(), rel=1e-4, abs=1e-8)
        assert found[metric].value == pytest.approx(
            float(expected[metric].mean()), rel=1e-4, abs=1e-8
        )
        assert found[metric].protocol == "text_gptq_20"
    assert found["delta_p_rms"].value == pytest.approx(float(expected["delta_p_rms"]), rel=1e-4)
    ordered = expected["kl"].sort().values
    for metric, share in (("kl_median", 0.5), ("kl_p90", 0.9), ("kl_p99", 0.99)):
        rank = math.ceil(share * len(ordered)) - 1
        assert found[metric].value == pytest.approx(float(ordered[rank]), rel=1e-3)
    assert found["nonfinite_logits"].value == 0


def test_the_model_itself_has_no_divergence(tmp_path: Path) -> None:
    model, ids = tiny("llama"), drawn_ids(3 * LENGTH, VOCABULARY)
    found = by_metric(MEASURE.run(engine_of(model), prepared(tmp_path, model, ids)))
    assert found["kl_mean"].value == pytest.approx(0.0, abs=1e-9)
    assert found["kl_p99"].value == pytest.approx(0.0, abs=1e-9)
    assert found["top1_agreement"].value == 1.0
    assert found["delta_p_rms"].value == pytest.approx(0.0, abs=1e-6)
    assert found["kl_noise_floor"].value == pytest.approx(0.0, abs=1e-9)


def test_hidden_states_are_kept_and_the_head_once(tmp_path: Path) -> None:
    model, ids = tiny("llama"), drawn_ids(2 * LENGTH, VOCABULARY)
    context = prepared(tmp_path, model, ids)
    key = [context.texts.tokens("gptq").digest, LENGTH, 1]
    entry = context.reference(WINDOW_KIND, key)
    assert set(entry) == {"hidden"}
    assert entry["hidden"].shape == (LENGTH, 32)
    assert len(list((context.cache.folder / "reference" / "head").iterdir())) == 1


def test_logits_are_kept_where_the_head_does_not_rebuild_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = GraniteConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        logits_scaling=4.0,
        **sizes,
    )
    model, ids = GraniteForCausalLM(config).eval(), drawn_ids(2 * LENGTH, VOCABULARY)
    changed = perturbed(model, 0.1)
    context = prepared(tmp_path, model, ids)
    key = [context.texts.tokens("gptq").digest, LENGTH, 0]
    assert set(context.reference(WINDOW_KIND, key)) == {"logits"}
    found = by_metric(MEASURE.run(engine_of(changed), context))
    expected = direct(model, changed, ids)
    assert found["kl_mean"].samples == pytest.approx(expected["kl_mean"].tolist(), rel=1e-3)


def test_pieces_and_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), drawn_ids(5 * LENGTH, VOCABULARY)
    changed = engine_of(perturbed(model))
    whole = by_metric(MEASURE.run(changed, prepared(tmp_path / "whole", model, ids)))
    monkeypatch.setattr(windows, "LOGITS_BYTES", 2 * 7 * VOCABULARY * 4)
    monkeypatch.setattr(windows, "PIECE_BYTES", 3 * VOCABULARY * 4)
    measure = Divergence(seq_len=LENGTH, batch_size=2)
    context = make_context(tmp_path / "pieces", ids)
    measure.prepare(engine_of(model), context)
    pieces = by_metric(measure.run(changed, context))
    for metric in ("kl_mean", "delta_p_mean", "top1_agreement"):
        assert pieces[metric].samples == pytest.approx(whole[metric].samples, rel=1e-3, abs=1e-8)


def test_the_noise_floor_is_the_model_in_the_cells_type(tmp_path: Path) -> None:
    model, ids = tiny("llama_tied"), drawn_ids(2 * LENGTH, VOCABULARY)
    hardware = Hardware("cpu", "cpu", compute_dtype="bfloat16")
    context = prepared(tmp_path, model, ids, hardware)
    found = by_metric(MEASURE.run(engine_of(model), context))
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = direct(model, half, ids)["kl_mean"]
    assert found["kl_noise_floor"].samples == pytest.approx(expected.tolist(), rel=1e-3)
    assert found["kl_noise_floor"].value > 1e-6
    assert next(model.parameters()).dtype == torch.float32


def test_the_noise_floor_of_fp16_on_a_cpu_is_computed_in_fp32(tmp_path: Path) -> None:
    model, ids = tiny("llama"), drawn_ids(2 * LENGTH, VOCABULARY)
    hardware = Hardware("cpu", "cpu", compute_dtype="float16")
    context = prepared(tmp_path, model, ids, hardware)
    found = by_metric(MEASURE.run(engine_of(model), context))
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.half().float()
    expected = direct(model, rounded, ids)["kl_mean"]
    assert found["kl_noise_floor"].samples == pytest.approx(expected.tolist(), rel=1e-2)


def test_nonfinite_logits_are_counted_and_never_dropped() -> None:
    reference = drawn_table(6)[:4]
    logits = reference.clone()
    logits[1, 2], logits[1, 3], logits[3, 0] = math.nan, math.inf, -math.inf
    found = token_divergence(reference, logits, torch.tensor([0, 1, 2, 3]))
    assert found.nonfinite == 3
    assert found.kl.tolist() == [0.0, math.inf, 0.0, math.inf]
    assert found.difference.tolist() == [0.0, math.inf, 0.0, math.inf]
    assert found.agree.tolist() == [1.0, 0.0, 1.0, 0.0]
    p = reference.softmax(-1)
    assert found.delta_p.tolist() == pytest.approx([0.0, -float(p[1, 1]), 0.0, -float(p[3, 3])])


def test_a_broken_engine_has_infinite_divergence(tmp_path: Path) -> None:
    ids, table = drawn_ids(4 * LENGTH, 8), drawn_table(8)
    context = make_context(tmp_path, ids)
    model = tiny("llama")
    MEASURE.prepare(engine_of(model), make_context(tmp_path, ids))
    wide = torch.zeros(8, VOCABULARY)
    wide[:, :8] = table
    wide[5, 0] = math.nan
    found = by_metric(MEASURE.run(BigramEngine(wide), context))
    tokens = ids.view(-1, LENGTH)[:, :-1]
    assert found["nonfinite_logits"].value == int((tokens == 5).sum()) > 0
    assert found["kl_mean"].value == math.inf
    assert found["kl_mean"].stderr is None
    assert math.isfinite(found["kl_median"].value)


def test_what_is_not_prepared_is_missing(tmp_path: Path) -> None:
    model, ids = tiny("llama"), drawn_ids(2 * LENGTH, VOCABULARY)
    with pytest.raises(ReferenceMissingError):
        MEASURE.run(engine_of(model), make_context(tmp_path, ids))


def test_the_reference_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), drawn_ids(2 * LENGTH, VOCABULARY)
    context = prepared(tmp_path, model, ids)
    engine = engine_of(model)
    calls: list[int] = []
    monkeypatch.setattr(engine, "prefill", lambda *_, **__: calls.append(1))
    MEASURE.prepare(engine, context)
    assert not calls


def test_a_reference_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model, ids = tiny("llama"), drawn_ids(2 * LENGTH, VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ConfigError, match="the unquantized model's logits hold NaN"):
        MEASURE.prepare(engine_of(model), make_context(tmp_path, ids))


@pytest.mark.parametrize(("size", "known"), [(1, 3), (2, 2)])
def test_it_leaves_the_losses_that_perplexity_would_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, known: int
) -> None:
    model, ids = tiny("llama"), drawn_ids(5 * LENGTH + 3, VOCABULARY)
    engine, other = engine_of(perturbed(model)), engine_of(perturbed(model, 0.5))
    measure = Perplexity("gptq", LENGTH, batch_size=size)
    expected = [measure.run(one, make_context(tmp_path, ids)) for one in (engine, other)]
    context, divergence = make_context(tmp_path, ids), Divergence(LENGTH, 3, size)
    divergence.prepare(engine_of(model), context)
    divergence.run(engine, context)
    reads: list[int] = []
    read = engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda rows, **options: reads.append(len(rows)) or read(rows, **options)
    )
    assert measure.run(engine, context) == expected[0]
    # Of batches of two only the first was read as it is here: the other one had one window.
    assert sum(reads) == 5 - known
    assert measure.run(other, context) == expected[1]
