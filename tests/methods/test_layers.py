"""The finder on six architectures: what is covered, what is left out and why, and round trips."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.load import meta_model
from kernels.errors import ConfigError
from methods import artefact
from methods.layers import (
    Scope,
    bias_of,
    check_finite,
    decoder_blocks,
    is_tied,
    replace,
    select,
    weight_of,
)
from methods.unquantized import Unquantized
from tests.architectures import CONFIGS, logits_of, tiny, tiny_ids
from tests.methods.machine import Machine

KINDS = tuple(CONFIGS)
# Matrices of one block: (last parts of the names, out, in, count), by the architecture's own paper
# or code; hidden 32, MLP 64 (GPT-2: 128), 4 heads of 8, 2 key and value heads.
ATTENTION = {
    "self_attn.q_proj": (32, 32, 1),
    "self_attn.k_proj": (16, 32, 1),
    "self_attn.v_proj": (16, 32, 1),
    "self_attn.o_proj": (32, 32, 1),
}
GATED = {"mlp.gate_proj": (64, 32, 1), "mlp.up_proj": (64, 32, 1), "mlp.down_proj": (32, 64, 1)}
BLOCKS: dict[str, tuple[str, dict[str, tuple[int, int, int]]]] = {
    "llama": ("model.layers", {**ATTENTION, **GATED}),
    "llama_tied": ("model.layers", {**ATTENTION, **GATED}),
    "qwen2": ("model.layers", {**ATTENTION, **GATED}),
    "mixtral": (
        "model.layers",
        {
            **ATTENTION,
            "mlp.experts.gate_up_proj": (128, 32, 4),
            "mlp.experts.down_proj": (32, 64, 4),
        },
    ),
    "gpt2": (
        "transformer.h",
        {
            "attn.c_attn": (96, 32, 1),
            "attn.c_proj": (32, 32, 1),
            "mlp.c_fc": (128, 32, 1),
            "mlp.c_proj": (32, 128, 1),
        },
    ),
    "opt": (
        "model.decoder.layers",
        {
            "self_attn.q_proj": (32, 32, 1),
            "self_attn.k_proj": (32, 32, 1),
            "self_attn.v_proj": (32, 32, 1),
            "self_attn.out_proj": (32, 32, 1),
            "fc1": (64, 32, 1),
            "fc2": (32, 64, 1),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {
            "attention.query_key_value": (96, 32, 1),
            "attention.dense": (32, 32, 1),
            "mlp.dense_h_to_4h": (64, 32, 1),
            "mlp.dense_4h_to_h": (32, 64, 1),
        },
    ),
}
TIED = {"llama_tied", "qwen2", "gpt2", "opt"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_of_the_blocks_are_found_and_nothing_else(kind: str) -> None:
    prefix, block = BLOCKS[kind]
    model = tiny(kind)
    assert decoder_blocks(model)[0] == prefix
    expected = {
        f"{prefix}.{number}.{name}": shape for number in range(2) for name, shape in block.items()
    }
    found = select(model, Scope()).matrices
    assert {m.name: (m.out_features, m.in_features, m.count) for m in found} == expected
    assert {m.role for m in found} == {"block"}
    for matrix in found:
        shape = (matrix.out_features, matrix.in_features)
        assert weight_of(model, matrix).shape == (
            (matrix.count, *shape)[-2:] if matrix.count == 1 else (matrix.count, *shape)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_weights_covered_is_the_share_expected(kind: str) -> None:
    model = tiny(kind)
    selection = select(model, Scope())
    covered = sum(matrix.weights for matrix in selection.matrices)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert covered == 2 * sum(o * i * n for o, i, n in BLOCKS[kind][1].values())
    assert covered + sum(count for _, count, _ in selection.left_out) == total
    reasons = Counter[str]()
    for _, count, reason in selection.left_out:
        reasons[reason] += count
    embedding = 320 * 32
    assert reasons["embedding: outside the default scope"] == embedding
    assert reasons["head: outside the default scope"] == (0 if kind in TIED else embedding)
    rest = {name for name, _, reason in selection.left_out if reason.startswith("not a linear map")}
    expected = {
        "mixtral": {"model.layers.*.mlp.gate.weight"},
        "gpt2": {"transformer.wpe.weight"},
        "opt": {"model.decoder.embed_positions.weight"},
    }
    assert rest == expected.get(kind, set())


@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_the_same_on_meta(kind: str) -> None:
    everything = Scope(head=True, embeddings=True)
    assert select(meta_model(CONFIGS[kind]), everything) == select(tiny(kind), everything)


@pytest.mark.parametrize("kind", KINDS)
def test_head_and_embedding_are_covered_where_asked(kind: str) -> None:
    model = tiny(kind)
    assert is_tied(model) == (kind in TIED)
    selection = select(model, Scope(head=True, embeddings=True))
    ends = {m.role: m for m in selection.matrices if m.role != "block"}
    assert set(ends) == {"head", "embedding"}
    for matrix in ends.values():
        assert torch.equal(
            weight_of(model, matrix),
            getattr(
                model, "get_output_embeddings" if matrix.role == "head" else "get_input_embeddings"
            )().weight,
        )
    assert not any("scope" in reason for _, _, reason in selection.left_out)


def test_experts_are_covered_up_to_the_router_alone() -> None:
    selection = select(tiny("mixtral"), Scope(head=True, embeddings=True))
    experts = sum(m.weights for m in selection.matrices if m.count > 1)
    assert experts == 2 * 4 * 3 * 32 * 64
    matrices_left = [name for name, _, reason in selection.left_out if reason != "vector"]
    assert matrices_left == ["model.layers.*.mlp.gate.weight"]


def test_kept_matrices_are_left_out_with_their_reason() -> None:
    model = tiny("llama")
    selection = select(model, Scope(keep=("*.down_proj",)))
    assert not any(m.name.endswith("down_proj") for m in selection.matrices)
    assert len(selection.matrices) == 12
    kept = [entry for entry in selection.left_out if entry[2] == "kept by the configuration"]
    assert kept == [
        ("model.layers.*.mlp.down_proj.weight", 2 * 32 * 64, "kept by the configuration")
    ]
    stacks = select(tiny("mixtral"), Scope(keep=("*.gate_up_proj",))).left_out
    assert (
        "model.layers.*.mlp.experts.gate_up_proj",
        2 * 4 * 128 * 32,
        "kept by the configuration",
    ) in stacks


def test_a_pattern_may_name_the_head_that_is_outside_the_scope() -> None:
    selection = select(tiny("llama"), Scope(keep=("lm_head",)))
    assert len(selection.matrices) == 14


def test_a_pattern_that_matches_nothing_and_one_that_matches_all_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match=r"'\*\.dwn_proj' matches no matrix"):
        select(model, Scope(keep=("*.dwn_proj",)))
    with pytest.raises(ConfigError, match="nothing is left to quantize"):
        select(model, Scope(keep=("*",)))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no list of equal decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(4, 4)))


class Plain(nn.Module):
    """A linear map, or an embedding, of stored values."""

    def __init__(self, weight: Tensor, bias: Tensor | None, lookup: bool) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight.clone())
        self.bias = nn.Buffer(bias.clone()) if bias is not None else None
        self.lookup = lookup

    def forward(self, x: Tensor) -> Tensor:
        if self.lookup:
            return nn.functional.embedding(x, self.weight)
        return nn.functional.linear(x, self.weight, self.bias)


class PlainStack(nn.Module):
    """A stack of experts, indexed."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight.clone())

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index]


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_every_matrix_by_its_own_weight_keeps_the_logits(kind: str) -> None:
    model = tiny(kind)
    model.config._experts_implementation = "eager"
    before = logits_of(model, tiny_ids())
    matrices = select(model, Scope(head=True, embeddings=True)).matrices
    for matrix in matrices:
        weight = weight_of(model, matrix).clone()
        new: nn.Module
        if matrix.count > 1:
            new = PlainStack(weight)
        else:
            new = Plain(weight, bias_of(model, matrix), matrix.role == "embedding")
        replace(model, matrix, new)
    left = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert all(m.name not in name for m in matrices for name in left)
    torch.testing.assert_close(logits_of(model, tiny_ids()), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_artefact_in_float32_gives_the_same_logits_bit_by_bit(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    ids = tiny_ids()
    # Grouped experts add in another order; both sides run them one by one.
    model.config._experts_implementation = "eager"
    expected = logits_of(model, ids)
    method = Unquantized("fp32", "float32")
    report = method.quantize(model, None, None, tmp_path)
    engine = method.load(tmp_path, Machine())
    logits, _ = engine.prefill(ids)
    assert torch.equal(logits, expected)
    assert {use.name for use in engine.kernels()} == {m.name for m in report.quantized}
    assert {use.execution for use in engine.kernels()} == {"packed"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "layers.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_on_a_cpu_is_stored_in_fp16_and_computed_in_float32(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    model.config._experts_implementation = "eager"
    ids = tiny_ids()
    method = Unquantized("fp16", "float16")
    method.quantize(model, None, None, tmp_path)
    engine = method.load(tmp_path, Machine())
    logits, cache = engine.prefill(ids[:, :-1])
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    expected = logits_of(model, ids)
    # Equal up to the order of additions: FP16 arithmetic would be a thousand times further off.
    torch.testing.assert_close(logits, expected[:, :-1], rtol=1e-4, atol=1e-4)
    step, _ = engine.decode(ids[:, -1:], cache)
    torch.testing.assert_close(step, expected[:, -1:], rtol=1e-4, atol=1e-4)
    assert logits.dtype == torch.float32
    assert {use.execution for use in engine.kernels()} == {"dequantized"}
    kept = Counter[torch.dtype]()
    for tensor in engine.model.state_dict().values():  # type: ignore[attr-defined]
        kept[tensor.dtype] += tensor.numel()
    assert kept[torch.float16] > 0.9 * sum(kept.values())


def test_bf16_is_computed_in_bf16(tmp_path: Path) -> None:
    method = Unquantized("bf16", "bfloat16")
    method.quantize(tiny("llama"), None, None, tmp_path)
    engine = method.load(tmp_path, Machine())
    dtypes = {p.dtype for p in engine.model.parameters()}  # type: ignore[attr-defined]
    assert dtypes == {torch.bfloat16}
    assert engine.prefill(tiny_ids())[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2"])
def test_tied_parameters_are_stored_once_and_tied_again(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    artefact.save(model, tmp_path, {})
    stored = (tmp_path / artefact.WEIGHTS).stat().st_size
    parameters = sum(p.numel() for p in model.parameters())
    assert 4 * parameters <= stored < 4 * parameters + 8192
    loaded = artefact.load(tmp_path, lambda name, facts: nn.Identity(), torch.float32)
    assert is_tied(loaded)


def test_the_checkpoints_own_type_is_kept_where_none_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.dtype = torch.float16
    artefact.save(model, tmp_path, {})
    stored = (tmp_path / artefact.WEIGHTS).stat().st_size
    parameters = sum(p.numel() for p in model.parameters())
    assert 2 * parameters <= stored < 2 * parameters + 8192


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(64, 32, dtype=dtype)
    check_finite("fine", weight)
    weight[5, 7] = value
    with pytest.raises(ConfigError, match=r"weight some\.name holds 1 values"):
        check_finite("some.name", weight)


def test_a_weight_too_large_for_fp16_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight overflows in float16"):
        Unquantized("fp16", "float16").quantize(model, None, None, tmp_path)
