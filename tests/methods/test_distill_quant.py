"""Distilling before quantizing: which blocks the student begins as, what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from harness.load import meta_model
from harness.sizes import compute
from kernels.errors import ConfigError
from methods.base import Calibration, Method, TrainingMethod, TwoPathMethod
from methods.distill_quant import DistillQuant, empty_student, evenly, student_of
from methods.gptq import GPTQ
from methods.layers import decoder_blocks
from methods.rtn import RTN
from methods.training import Schedule
from tests.architectures import CONFIGS, logits_of, tiny, tiny_ids
from tests.methods.int8_models import round_trip
from tests.methods.layer_checks import bits_on_disk

CONF = Path(__file__).resolve().parents[2] / "conf"
KINDS = ("llama_tied", "qwen2", "gpt2", "opt", "mixtral", "gpt_neox")
SCHEDULE = Schedule(40, 4, 3e-3, 2, 0.0, 1.0)
CALIBRATION = Calibration(16, 24, 0)


def distill(then: Method | None = None, **options: Any) -> DistillQuant:
    options = {"training": SCHEDULE, "calibration": CALIBRATION, "blocks": 1, **options}
    return DistillQuant("distill_quant", then or RTN("rtn", 8, 32), **options)


def test_blocks_are_taken_evenly_first_and_last_among_them() -> None:
    assert evenly(6, 3) == [0, 2, 5]
    assert evenly(12, 6) == [0, 2, 4, 7, 9, 11]
    assert evenly(4, 2) == [0, 3]
    assert evenly(4, 1) == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_all_blocks_is_the_teacher(kind: str) -> None:
    teacher = tiny(kind)
    same = student_of(teacher, [0, 1])
    assert torch.equal(logits_of(same, tiny_ids()), logits_of(teacher, tiny_ids()))
    last = student_of(teacher, [1])
    name, blocks = decoder_blocks(last)
    assert (name, len(blocks)) == (decoder_blocks(teacher)[0], 1)
    for own, theirs in zip(
        blocks[0].parameters(), decoder_blocks(teacher)[1][1].parameters(), strict=True
    ):
        assert torch.equal(own, theirs)
        assert own.data_ptr() != theirs.data_ptr()
        assert own.requires_grad


def test_the_student_comes_nearer_to_the_teacher_and_the_row_is_its_own(tmp_path: Path) -> None:
    method = distill()
    teacher = tiny("llama_tied")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    report, engine = round_trip(method, teacher, tmp_path, tiny_ids(16, 24))
    facts = report.details["distillation"]
    assert facts["loss_after"] < 0.97 * facts["loss_before"]
    assert facts["layers"] == [0]
    assert facts["teacher_parameters"] == sum(p.numel() for p in teacher.parameters())
    assert facts["student_parameters"] < facts["teacher_parameters"]
    assert report.details["training"]["kind"] == "distillation"
    assert report.details["training"]["steps"] == 40
    assert "a student of" in report.notes[0]
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
    loaded: Any = engine
    assert loaded.model.config.num_hidden_layers == 1
    assert len(decoder_blocks(loaded.model)[1]) == 1
    weights = sum(m.weights for m in report.quantized) + sum(n for _, n, _ in report.left_out)
    assert weights == facts["student_parameters"]


def test_sizes_are_the_students(tmp_path: Path) -> None:
    method = distill()
    sizes = compute(meta_model(CONFIGS["llama_tied"]), method)
    report = method.quantize(tiny("llama_tied"), None, tiny_ids(16, 24), tmp_path)
    assert list(sizes.quantized) == list(report.quantized)
    assert sizes.quantized_bits == report.stored_bits
    facts = report.details["distillation"]
    others = facts["student_parameters"] - sizes.quantized_weights
    assert sizes.total_bytes - sizes.part_bytes["quantized"] == 4 * others


def test_it_is_a_method_that_trains() -> None:
    method: Method = distill(RTN("rtn", 4, 32))
    assert isinstance(method, TrainingMethod)
    assert isinstance(method, TwoPathMethod)
    assert (method.bits, method.group_size, method.needs_calibration) == (4, 32, True)


def test_lists_with_an_entry_for_each_block_are_cut() -> None:
    teacher = tiny("qwen2")
    teacher.config.layer_types = ["full_attention", "sliding_attention"]
    assert empty_student(teacher, [1]).config.layer_types == ["sliding_attention"]


def test_a_structure_that_is_not_understood_is_refused() -> None:
    teacher = tiny("llama")
    teacher.config.num_hidden_layers = 3
    with pytest.raises(ConfigError, match=r"has 2 blocks in model.layers, and its configuration"):
        empty_student(teacher, [0])
    teacher = tiny("llama")
    teacher.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="are not alike"):
        student_of(teacher, [0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"blocks": 0}, "blocks of distill_quant is 0; it must be a whole number, or a share"),
        ({"blocks": 1.5}, "blocks of distill_quant is 1.5"),
        ({"temperature": 0}, "temperature of distill_quant is 0; it must be from 0.1 to 100"),
        ({"alpha": 2}, "alpha of distill_quant is 2; it must be from 0"),
        (
            {"then": GPTQ("gptq", bits=4, group_size=32, calibration=Calibration(99, 8, 0))},
            "then.calibration.samples is 99, but distill_quant has 16",
        ),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        distill(**options)


@pytest.mark.parametrize("blocks", [2, 3, 0.99, 0.1])
def test_a_student_has_fewer_blocks_and_some(blocks: float) -> None:
    with pytest.raises(ConfigError, match="a student has fewer than its teacher, and at least 1"):
        distill(blocks=blocks).select(meta_model(CONFIGS["llama"]))


def test_a_loss_that_is_no_number_is_said(tmp_path: Path) -> None:
    hot = distill(training=Schedule(40, 4, 1.0, 0, 0.0, 1e30), temperature=0.1, alpha=1)
    teacher = tiny("llama")
    with torch.no_grad():
        teacher.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="training of distill_quant diverged"):
        hot.quantize(teacher, None, tiny_ids(16, 24), tmp_path)


def test_the_configuration_holds_every_option_at_its_default() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", ["method=distill_quant"]).method
    method = instantiate(node)
    assert isinstance(method, DistillQuant)
    assert (method.blocks, method.temperature, method.alpha) == (0.5, 2.0, 0.9)
    assert method.then == RTN("rtn", 4, 128)
