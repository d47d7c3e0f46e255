"""The machine of a cell: what its options may say."""

from __future__ import annotations

import pytest

from harness.hardware import Hardware
from kernels.errors import ConfigError


@pytest.mark.parametrize(("device", "layers"), [("cpu", 0), ("cpu", 4), ("cuda", -1)])
def test_layers_on_a_card_need_a_card(device: str, layers: int) -> None:
    with pytest.raises(ConfigError, match=f"gpu_layers is {layers} with device {device}"):
        Hardware("h", device, gpu_layers=layers)


def test_layers_on_a_card_are_a_number_or_all() -> None:
    assert Hardware("h", "cuda", gpu_layers=0).gpu_layers == 0
    assert Hardware("h", "cuda").gpu_layers is None


def test_decoding_is_automatic_or_the_models() -> None:
    assert Hardware("h", "cpu", decode="model").decode == "model"
    with pytest.raises(ConfigError, match=r"hardware\.decode is 'c'; it must be 'auto' or 'model'"):
        Hardware("h", "cpu", decode="c")
