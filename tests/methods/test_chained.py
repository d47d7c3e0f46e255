"""What methods with a `then` share: what they can do, reports put together, text handed on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.base import (
    Calibration,
    ForeseeingMethod,
    LoadingMethod,
    QuantizeReport,
    TwoPathMethod,
)
from methods.bitnet import BitNet
from methods.chained import Chained, calibration_of, hand_on, merged
from methods.gguf import Gguf
from methods.gptq import GPTQ
from methods.prune_quant import PruneQuant
from methods.rtn import RTN
from tests.architectures import tiny


@dataclass(frozen=True)
class Training(BitNet):
    """Stands for a method that trains."""

    def train(self, *arguments: Any) -> QuantizeReport:
        folder: Path = arguments[4]
        return QuantizeReport([], 0, [], [f"trained in {folder.name}"])


def report(**details: Any) -> QuantizeReport:
    return QuantizeReport([], 8, [], ["inner"], unquantized="float16", details=details)


def test_a_chain_can_what_its_last_method_can_and_no_more() -> None:
    gguf = Chained("chain", Gguf("gguf_Q4_0", "Q4_0"))
    assert isinstance(gguf, TwoPathMethod)
    assert isinstance(gguf, LoadingMethod)
    assert isinstance(gguf, ForeseeingMethod)
    assert gguf.foresee(tiny("gpt2")) == Gguf("gguf_Q4_0", "Q4_0").foresee(tiny("gpt2"))
    ternary: Any = Chained("chain", BitNet("bitnet"))
    for protocol in (TwoPathMethod, LoadingMethod, ForeseeingMethod):
        assert not isinstance(ternary, protocol)
    assert (ternary.bits, ternary.group_size, ternary.needs_calibration) == (1.58, None, False)
    assert isinstance(Chained("outer", PruneQuant("inner", RTN("rtn", 4, 32))), TwoPathMethod)


def test_what_was_done_before_comes_first() -> None:
    found = merged(report(allocation=1), ["outer"], {"pruning": 2})
    assert found.notes == ["outer", "inner"]
    assert found.details == {"pruning": 2, "allocation": 1}
    assert found.unquantized is None
    assert found.stored_bits == 8
    both = merged(report(training="inner"), [], {"training": "outer"})
    assert both.details == {"training": "outer", "then": {"training": "inner"}}


def test_a_method_that_trains_is_given_a_folder_of_its_own(tmp_path: Path) -> None:
    said: list[str] = []
    crops = torch.zeros(1, 4, dtype=torch.int64)
    then = Training("bitnet")
    found = hand_on(then, nn.Module(), None, crops, tmp_path / "a", tmp_path, said.append)
    assert found.notes == ["trained in then"]
    assert (tmp_path / "then").is_dir()
    plain = hand_on(then, tiny("llama"), None, None, tmp_path / "b", None, said.append)
    assert plain.quantized
    assert said == ["quantizing: bitnet"]


def test_text_for_the_last_method_is_taken_from_what_is_trained_on() -> None:
    crops: Tensor = torch.arange(60).view(6, 10)
    gptq = GPTQ("gptq", bits=4, group_size=32, calibration=Calibration(2, 8, 0))
    shown = calibration_of(gptq, crops, "distill_quant")
    assert shown is not None
    assert torch.equal(shown, crops[:2, :8])
    assert calibration_of(BitNet("bitnet"), crops, "distill_quant") is None
    longer = GPTQ("gptq", bits=4, group_size=32, calibration=Calibration(2, 11, 0))
    with pytest.raises(ConfigError, match=r"then.calibration.seq_len is 11, but distill_quant has"):
        calibration_of(longer, crops, "distill_quant")


def test_what_is_no_method_is_refused() -> None:
    nothing: Any = None
    with pytest.raises(ConfigError, match=r"method.then of chain is None; it is chosen among"):
        Chained("chain", nothing)
