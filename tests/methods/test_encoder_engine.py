from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import CONFIG_MAPPING

from harness.hardware import Hardware
from kernels.errors import ConfigError
from methods.base import Calibration, Method
from methods.encoder_engine import EncoderEngine, engine_of
from methods.encoders import auto_class, context_length, is_encoder, kind_of, pool
from methods.engine import TorchEngine, relative_difference
from methods.fused import fuse
from methods.int8_dynamic import Int8Dynamic
from methods.int8_static import Int8Static
from methods.layers import Scope, is_tied, select
from methods.rtn import RTN
from methods.unquantized import Unquantized
from tests.architectures import tiny
from tests.encoders import CONFIGS, CONTEXT, batch, encoder_tokenizer, tiny_encoder

CPU = Hardware("cpu", "cpu", threads=1, allow_fallback=True)
KINDS = tuple(CONFIGS)


def config_of(model_type: str, **values: Any) -> Any:
    return CONFIG_MAPPING[model_type].from_dict(dict(values))


@pytest.mark.parametrize(
    ("model_type", "values", "kind"),
    [
        ("bert", {"architectures": ["BertModel"]}, "bare"),
        ("bert", {"architectures": ["BertForMaskedLM"]}, "masked"),
        ("bert", {"architectures": ["BertForPreTraining"]}, "masked"),
        ("bert", {}, "bare"),
        ("bert", {"is_decoder": True}, "causal"),
        ("bert", {"architectures": ["BertLMHeadModel"]}, "causal"),
        ("distilbert", {"architectures": ["DistilBertForMaskedLM"]}, "masked"),
        ("llama", {"architectures": ["LlamaModel"]}, "causal"),
        ("gpt2", {}, "causal"),
        ("t5", {}, None),
    ],
)
def test_kind_is_told_by_the_configuration(
    model_type: str, values: dict[str, Any], kind: str | None
) -> None:
    config = config_of(model_type, **values)
    assert kind_of(config) == kind
    if kind is None:
        with pytest.raises(ConfigError, match="a t5 model is neither a causal"):
            auto_class(config)


def test_engine_fits_the_model() -> None:
    assert isinstance(engine_of(tiny("llama"), "cpu", []), TorchEngine)
    bare = engine_of(tiny_encoder("bert"), "cpu", [])
    assert isinstance(bare, EncoderEngine)
    assert bare.capabilities == {"embed", "memory"}
    headed = engine_of(tiny_encoder("distilbert"), "cpu", [])
    assert headed.capabilities == {"embed", "fill", "memory"}
    with pytest.raises(ConfigError, match="predicts no next token; use suite=encoder"):
        bare.prefill(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match="predicts no next token"):
        bare.decode(torch.zeros(1, 1, dtype=torch.int64), None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_gives_what_its_rows_give_alone(kind: str) -> None:
    engine = engine_of(tiny_encoder(kind), "cpu", [])
    assert isinstance(engine, EncoderEngine)
    ids, mask = batch()
    together = engine.embed(ids, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        own = (ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(together[row], engine.embed(*own)[0], rtol=1e-4, atol=1e-5)
        if "fill" in engine.capabilities:
            filled = engine.fill(ids, mask)[row, :length]
            torch.testing.assert_close(filled, engine.fill(*own)[0], rtol=1e-4, atol=1e-4)
    unmasked = engine.embed(ids, torch.ones_like(ids))
    assert float((unmasked[1] - together[1]).abs().max()) > 1e-3


def test_pooling() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 8.0], [50.0, 90.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 5.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 2.0]]
    assert pool(hidden, mask, "max").tolist() == [[3.0, 8.0]]
    broken = torch.where(mask[..., None].bool(), hidden, torch.nan)
    assert pool(broken, mask, "mean").tolist() == [[2.0, 5.0]]


@pytest.mark.parametrize(
    ("kind", "places"), [("bert", CONTEXT), ("roberta", CONTEXT - 1), ("distilbert", CONTEXT)]
)
def test_context_has_no_place_for_paddings_positions(kind: str, places: int) -> None:
    model = tiny_encoder(kind)
    assert context_length(model) == places
    ids = torch.full((1, places), 7)
    found = engine_of(model, "cpu", [])
    assert isinstance(found, EncoderEngine)
    assert bool(torch.isfinite(found.embed(ids, torch.ones_like(ids))).all())


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_the_blocks_are_found(kind: str) -> None:
    model = tiny_encoder(kind)
    assert is_encoder(model)
    matrices = select(model, Scope()).matrices
    assert len(matrices) == 12
    assert sum(matrix.weights for matrix in matrices) == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    ends = {m.role for m in select(model, Scope(head=True, embeddings=True)).matrices}
    assert ends == ({"block", "embedding"} if kind == "bert" else {"block", "embedding", "head"})
    assert is_tied(model) == (kind != "bert")


def test_maps_of_one_input_are_fused() -> None:
    model = tiny_encoder("bert")
    ids, mask = batch()
    before = EncoderEngine(model, "cpu", []).embed(ids, mask)
    groups = fuse(model)
    assert [len(group.names) for group in groups] == [3, 3]
    torch.testing.assert_close(EncoderEngine(model, "cpu", []).embed(ids, mask), before)


STATIC = Int8Static("int8_static", Calibration(4, 24, 0))
METHODS: list[tuple[Method, float]] = [
    (Unquantized("fp32", "float32"), 0.0),
    (Unquantized("fp16", "float16"), 0.005),
    (RTN("rtn", 8, 32), 0.02),
    (RTN("rtn", 4, 32), 0.4),
    (RTN("rtn_ends", 8, 32, head=True, embeddings=True), 0.03),
    (Int8Dynamic("int8_dynamic"), 0.08),
    (STATIC, 0.08),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "worst"), METHODS, ids=[m.name + str(m.bits) for m, _ in METHODS]
)
def test_a_method_goes_through_its_artefact(
    method: Method, worst: float, kind: str, tmp_path: Path
) -> None:
    model = tiny_encoder(kind)
    ids, mask = batch()
    reference = EncoderEngine(model, "cpu", [])
    hidden = reference.encode(ids, mask)
    calibration = torch.randint(5, 96, (4, 24), generator=torch.Generator().manual_seed(1))
    filled = reference.fill(ids, mask) if kind != "bert" else None
    shown = calibration if method.needs_calibration else None
    method.quantize(model, encoder_tokenizer(), shown, tmp_path)
    engine = method.load(tmp_path, CPU)
    assert isinstance(engine, EncoderEngine)
    assert type(engine.model) is type(tiny_encoder(kind))
    assert len(engine.kernels()) == 12 + (method.name == "rtn_ends") * (1 if kind == "bert" else 2)
    kept = mask.bool()
    assert relative_difference(engine.encode(ids, mask)[kept], hidden[kept]) <= worst
    if filled is not None:
        difference = relative_difference(engine.fill(ids, mask)[kept], filled[kept])
        assert difference <= max(2 * worst, 1e-6)
    again = getattr(method, "load_dequantized", None)
    if again is not None:
        found = again(tmp_path, CPU).encode(ids, mask)
        assert relative_difference(engine.encode(ids, mask)[kept], found[kept]) <= 0.05


def test_int8_dynamic_says_that_rows_influence_each_other(tmp_path: Path) -> None:
    method = Int8Dynamic("int8_dynamic")
    method.quantize(tiny_encoder("bert"), None, None, tmp_path)
    engine = method.load(tmp_path, CPU)
    assert isinstance(engine, EncoderEngine)
    assert engine.couples_rows
    ids, mask = batch()
    alone = engine.embed(ids[:1], mask[:1])
    assert float(functional.cosine_similarity(alone, engine.embed(ids, mask)[:1])) > 0.99
