"""Training: the schedule, the order of the crops, resuming after a kill, and what diverges."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.errors import ConfigError
from methods import training
from methods.training import STATE, Schedule, batch_at, divergence_loss, fit, next_token_loss
from tests.architectures import tiny, tiny_ids

CROPS = tiny_ids(samples=10, length=12)


def schedule(steps: int = 6, **changed: Any) -> Schedule:
    options = {"batch": 4, "learning_rate": 1e-2, "warmup": 2, "weight_decay": 0.1, "clip": 1.0}
    return Schedule(steps, **{**options, **changed})


def quiet(text: str) -> None:
    """Say nothing."""


def tiny_loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def loss(ids: Tensor) -> Tensor:
        return next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)

    return loss


def trained(state: Path, plan: Schedule, die_at: int | None = None) -> tuple[Any, training.Fit]:
    """Train the tiny model; where `die_at` is given the process kills itself in that step."""
    torch.set_num_threads(1)
    model, calls = tiny("llama_tied"), 0
    plain = tiny_loss(model)

    def loss(ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        value = plain(ids)
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    done = fit(dict(model.named_parameters()), loss, CROPS, plan, state, quiet, "tiny")
    return model, done


def die(state: Path, step: int) -> None:
    training.KEEP_SECONDS = 0.0
    trained(state, schedule(), step)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_it_lowers_the_loss_and_says_what_it_did(tmp_path: Path) -> None:
    said: list[str] = []
    model = tiny("llama")
    plan = schedule(steps=8, learning_rate=5e-3)
    parameters = dict(model.named_parameters())
    done = fit(parameters, tiny_loss(model), CROPS, plan, tmp_path, said.append, "tiny")
    assert [step for step, _ in done.curve] == list(range(1, 9))
    assert done.curve[-1][1] < done.curve[0][1] - 0.1
    assert done.tokens_seen == 8 * 4 * 12
    assert done.resumed_at == []
    assert said[-1].startswith("training: step 8 of 8, loss ")
    details = done.details("qat", "quantbench", plan, 12)
    assert details["steps"] == 8
    assert details["equality"] is None


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, straight = trained(tmp_path / "none", schedule_in(tmp_path / "none"))
    (tmp_path / "killed").mkdir()
    child = multiprocessing.get_context("spawn").Process(target=die, args=(tmp_path / "killed", 4))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    again, resumed = trained(tmp_path / "killed", schedule())
    assert resumed.resumed_at == [3]
    assert resumed.curve == straight.curve
    assert same(whole, again)


def schedule_in(folder: Path) -> Schedule:
    folder.mkdir()
    return schedule()


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model, first = trained(tmp_path, schedule())
    again, second = trained(tmp_path, schedule(), die_at=1)
    assert same(model, again)
    assert second.curve == first.curve
    assert second.resumed_at == [6]


@pytest.mark.parametrize("damage", ["cut", "changed", "text", "other run"])
def test_a_state_that_cannot_be_used_is_said_and_left(damage: str, tmp_path: Path) -> None:
    model, _ = trained(tmp_path, schedule())
    path, plan = tmp_path / STATE, schedule()
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "changed":
        path.write_bytes(whole[:-100] + bytes(byte ^ 1 for byte in whole[-100:]))
    elif damage == "text":
        path.write_text("nothing of the kind")
    else:
        plan = schedule(steps=5)
    said: list[str] = []
    again = tiny("llama_tied")
    parameters = dict(again.named_parameters())
    done = fit(parameters, tiny_loss(again), CROPS, plan, tmp_path, said.append, "tiny")
    assert said[0].startswith("training: the state in state.safetensors is damaged or of another")
    assert done.resumed_at == []
    assert same(model, again) == (damage != "other run")


def test_every_crop_is_read_once_a_round() -> None:
    crops = torch.arange(10).reshape(10, 1)
    read = torch.cat([batch_at(step, crops, 4) for step in range(5)]).flatten()
    assert sorted(read[:10].tolist()) == sorted(read[10:].tolist()) == list(range(10))
    assert read[:10].tolist() != read[10:].tolist()
    assert torch.equal(batch_at(2, crops, 4).flatten(), read[8:12])


def test_the_rate_rises_and_falls_to_zero() -> None:
    plan = schedule(steps=10, warmup=4, learning_rate=0.8)
    rates = [plan.rate(step) for step in range(10)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[7] == pytest.approx(0.4)
    assert plan.rate(10) == pytest.approx(0.0)


def test_a_step_is_that_of_adamw(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    plan = schedule(steps=1, warmup=0, learning_rate=0.1, clip=1e9)
    fit({"w": weight}, lambda ids: (weight * 3).sum(), CROPS, plan, tmp_path, quiet, "tiny")
    # Decay of rate * weight_decay, then a first step of the rate against the sign.
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.1) - 0.1
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize(
    ("value", "what"), [(float("nan"), "loss"), (float("inf"), "loss"), (0.0, "gradient")]
)
def test_what_diverges_is_one_sentence(value: float, what: str, tmp_path: Path) -> None:
    weight, calls = nn.Parameter(torch.ones(2)), 0

    def loss(ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        broken = weight.sum() * value if what == "loss" else (weight - weight.detach()).sqrt().sum()
        return weight.sum() if calls < 3 else broken

    with pytest.raises(ConfigError) as error:
        fit({"w": weight}, loss, CROPS, schedule(), tmp_path, quiet, "qat")
    assert str(error.value).startswith(f"training of qat diverged: the {what} of step 3 of 6 is ")
    assert "set method.training.learning_rate below 0.01" in str(error.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"warmup": -1}, "warmup is -1"),
        ({"warmup": 6}, "warmup is 6 steps of 6"),
        ({"weight_decay": 2.0}, "weight_decay is 2.0"),
        ({"clip": 0.0}, "clip is 0.0"),
    ],
)
def test_schedules_that_make_no_sense(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"method.training.{says}"):
        schedule(**changed)


@pytest.mark.parametrize(
    ("crops", "says"),
    [(CROPS[:3], "only 3 crops"), (CROPS[:, :1], "seq_len is 1"), (CROPS[:0], "only 0 crops")],
)
def test_crops_that_cannot_be_trained_on(crops: Tensor, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        fit({"w": nn.Parameter(torch.ones(1))}, torch.mean, crops, schedule(), tmp_path, quiet, "q")


def test_losses_against_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 2, 5, 7, generator=generator)
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    chosen = functional.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(next_token_loss(logits, ids), -chosen.mean())
    p, q = functional.softmax(teacher, -1), functional.softmax(logits, -1)
    kl = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence_loss(logits, teacher), kl)
