"""A candidate run from kept states says what the whole model with that weight in it says."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from methods.base import Matrix
from methods.layers import stack_is_transposed, weight_of
from methods.prefix import Prefixed, dense
from methods.rtn import RTN
from methods.sensitivity import kl_of, measure
from tests.architectures import CONFIGS, logits_of, tiny, tiny_ids

EVERYTHING = RTN("rtn", 2, 16, head=True, embeddings=True)
IDS = tiny_ids(3, 16)

TOLERANCE = 1e-7
"""Of a KL in nats: the log-probabilities of the plain way are float32 and summed in float64."""


def packed(model: Any, method: RTN = EVERYTHING) -> tuple[list[Matrix], dict[str, nn.Module]]:
    matrices, _ = method.select(model)
    return matrices, dict(method.modules(model, matrices, None))


def changed(model: Any, replaced: dict[str, nn.Module]) -> Any:
    """Return a copy of `model` that simply has the dequantized weights."""
    twin = copy.deepcopy(model)
    head = twin.get_output_embeddings()
    # Replacing one of a tied pair leaves the other as it was.
    head.weight = nn.Parameter(head.weight.detach().clone())
    for matrix in EVERYTHING.select(model)[0]:
        if matrix.name in replaced:
            with torch.no_grad():
                weight_of(twin, matrix).copy_(dense(replaced[matrix.name]))
    return twin


def plain(model: Any, replaced: dict[str, nn.Module]) -> tuple[Tensor, Tensor]:
    """Return KL and loss change of each window, from two whole forwards, in float64."""
    expected = logits_of(model, IDS)[:, :-1].double().log_softmax(-1)
    found = logits_of(changed(model, replaced), IDS)[:, :-1].double().log_softmax(-1)
    kl = functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean(1)
    targets = IDS[:, 1:, None]
    loss = (expected.gather(2, targets) - found.gather(2, targets)).mean((1, 2))
    return kl, loss


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_untouched(model: Any, before: dict[str, Tensor], owned: dict[str, int]) -> None:
    assert {name: id(p) for name, p in model.named_parameters()} == owned
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("kind", CONFIGS)
def test_kept_states_give_the_divergence_of_whole_forwards(kind: str) -> None:
    model = tiny(kind)
    matrices, modules = packed(model)
    before = state_of(model)
    owned = {name: id(p) for name, p in model.named_parameters()}
    table = measure(model, matrices, {"2 bits": modules}, IDS)
    check_untouched(model, before, owned)
    assert table.names == tuple(matrix.name for matrix in matrices)
    assert table.noise_floor == 0
    assert table.batch_floor < TOLERANCE
    for row, matrix in enumerate(matrices):
        kl, loss = plain(model, {matrix.name: modules[matrix.name]})
        assert float(table.kl[row, 0]) == pytest.approx(float(kl.mean()), rel=1e-4, abs=TOLERANCE)
        assert float(table.loss[row, 0]) == pytest.approx(float(loss.mean()), abs=2e-6)
        error = float(kl.std() / math.sqrt(len(kl)))
        assert float(table.kl_stderr[row, 0]) == pytest.approx(error, rel=1e-3, abs=TOLERANCE)
    assert {m.role for m in matrices} == {"block", "head", "embedding"}
    assert float(table.kl.min()) > 0


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "opt", "mixtral"])
def test_so_does_any_mix(kind: str) -> None:
    model = tiny(kind)
    _, modules = packed(model)
    some = {name: module for number, (name, module) in enumerate(modules.items()) if number % 3}
    for replaced in (modules, some):
        kl, loss = plain(model, replaced)
        found = kl_of(model, replaced, IDS)
        assert found[0] == pytest.approx(float(kl.mean()), rel=1e-4)
        assert found[1] == pytest.approx(float(kl.std() / math.sqrt(len(kl))), rel=1e-3)
        assert found[2] == pytest.approx(float(loss.mean()), abs=2e-6)


def test_only_the_blocks_from_the_replaced_one_on_are_run() -> None:
    model = tiny("llama")
    matrices, modules = packed(model)
    runner = Prefixed(model)
    blocks = runner.blocks
    entries = [runner.entry([matrix.name]) for matrix in matrices]
    expected = [
        {"embedding": 0, "head": blocks}.get(m.role, runner.block_of(m.name)) for m in matrices
    ]
    assert entries == expected
    called: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, number=number: called.append(number))
    table = measure(model, matrices, {"2 bits": modules}, IDS)
    cost = table.cost
    # Beside the candidates: the reference, its second run from the middle, and the floor's three.
    spent = blocks + sum(blocks - entry for entry in entries) + blocks - blocks // 2
    assert cost["candidates"] == len(matrices)
    assert cost["block_forwards"] == spent * len(IDS)
    assert cost["block_forwards_without_prefixes"] == (len(matrices) + 2) * blocks * len(IDS)
    assert len(called) == spent * len(IDS) + 2 * blocks


def test_the_model_is_as_it_was_after_an_exception() -> None:
    model = tiny("gpt2")
    matrices, modules = packed(model)
    before = state_of(model)
    owned = {name: id(p) for name, p in model.named_parameters()}
    last = model.transformer.h[-1].mlp.c_proj
    assert isinstance(last, Conv1D)
    broken = modules[next(m.name for m in matrices if m.name.endswith("1.mlp.c_proj"))]
    broken.packed = None  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="stored weights were dropped"):
        measure(model, matrices, {"2 bits": modules}, IDS)
    check_untouched(model, before, owned)


def test_a_candidate_that_is_not_finite_counts_as_infinitely_far() -> None:
    model = tiny("llama")
    _, modules = packed(model)
    name = next(iter(modules))
    scale = modules[name].scale
    assert isinstance(scale, Tensor)
    scale[0] = torch.nan
    assert kl_of(model, {name: modules[name]}, IDS)[0] == math.inf


def test_a_matrix_outside_a_scheme_has_no_figure_there() -> None:
    model = tiny("llama")
    matrices, modules = packed(model)
    few = {name: modules[name] for name in list(modules)[:2]}
    table = measure(model, matrices[:3], {"all": modules, "two": few}, IDS[:1])
    assert table.schemes == ("all", "two")
    assert table.kl[:, 1].isnan().tolist() == [False, False, True]
    assert torch.equal(table.kl[:2, 0], table.kl[:2, 1])
    assert table.kl_stderr.isnan().all()
    assert table.cost["candidates"] == 5


def test_a_stack_of_experts_is_given_as_the_model_stores_it() -> None:
    model = tiny("mixtral")
    matrices, modules = packed(model)
    stack = next(matrix for matrix in matrices if matrix.count > 1)
    owner = model.get_submodule(stack.name.rpartition(".")[0])
    assert dense(modules[stack.name]).shape == (stack.count, stack.out_features, stack.in_features)
    stored = getattr(owner, stack.name.rpartition(".")[2]).shape
    assert stack_is_transposed(owner) == (stored[1:] != (stack.out_features, stack.in_features))


def test_what_has_no_packed_weight_is_named() -> None:
    with pytest.raises(TypeError, match="a Linear has no packed weight"):
        dense(nn.Linear(2, 2))
