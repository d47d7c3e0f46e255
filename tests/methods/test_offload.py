"""Blocks that lie on disk compute what they compute in memory, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.hardware import Hardware
from kernels.errors import ConfigError
from methods.unquantized import Unquantized
from tests.architectures import VOCABULARY, tiny

IDS = torch.arange(2, 22)[None] % VOCABULARY


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2"])
def test_offloaded_blocks_give_the_same_logits(
    architecture: str, dtype: str, tmp_path: Path
) -> None:
    method = Unquantized(dtype, dtype)
    artefact = tmp_path / "artefact"
    method.quantize(tiny(architecture), None, None, artefact)
    here = method.load(artefact, Hardware("cpu", "cpu", decode="model"))
    away = method.load(artefact, Hardware("cpu", "cpu", offload="disk"))
    expected, cache = here.prefill(IDS)
    found, other = away.prefill(IDS)
    # Not to the last bit: where a tensor lies in memory decides how its product is summed.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    token = torch.tensor([[7]])
    expected, found = here.decode(token, cache)[0], away.decode(token, other)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(use.kernel.endswith("read from disk at each call") for use in away.kernels())
    assert {path.name for path in tmp_path.iterdir()} > {"artefact"}
    away.close()
    assert [path.name for path in tmp_path.iterdir()] == ["artefact"]


def test_what_fits_stays(tmp_path: Path) -> None:
    method = Unquantized("fp32", "float32")
    model = tiny("llama")
    block = sum(4 * parameter.numel() for parameter in model.model.layers[0].parameters())
    method.quantize(model, None, None, tmp_path / "artefact")
    hardware = Hardware("cpu", "cpu", offload="disk", resident_bytes=block)
    engine = method.load(tmp_path / "artefact", hardware)
    away = {use.name.split(".")[2] for use in engine.kernels() if "disk" in use.kernel}
    assert away == {"1"}
    engine.close()


def test_a_place_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"offload is 'cpu' with device cpu; .* null or disk"):
        Hardware("cpu", "cpu", offload="cpu")
    with pytest.raises(ConfigError, match="resident_bytes is -1"):
        Hardware("cpu", "cpu", offload="disk", resident_bytes=-1)
    with pytest.raises(ConfigError, match=r"resident_bytes is 8, .* set hardware\.offload"):
        Hardware("cpu", "cpu", resident_bytes=8)
