"""The launches of the ops on the host's build of the kernels: plans, arguments, scratch, regimes.

What a card would run is run lane by lane on the processor, through the same functions that launch
on a card; only loading and launching are replaced.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import device_launch, plans
from kernels.device_launch import Card, Defines
from kernels.device_reference import op_words
from kernels.device_reference import quantize_pack as quantize_pack_reference
from kernels.device_reference import w8a8_linear as w8a8_reference
from kernels.errors import ConfigError
from kernels.fragments import Fragments, pack_fragments
from kernels.pack import pack
from tests.kernels.emulate import Argument, Emulated
from tests.kernels.test_fragments import dense, random_matrix

SMALL = Card(0, 16, plans.shared_limit("sm_86"))
"""So few multiprocessors that small shapes fill them; some splits of K, some not."""


class Launched:
    """A kernel that is launched on the processor."""

    def __init__(self, emulated: Emulated, name: str, names: list[str]) -> None:
        self.emulated, self.name, self.names = emulated, name, names

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        *arguments: Argument,
    ) -> None:
        assert block == (plans.THREADS, 1, 1)
        self.names.append(self.name)
        self.emulated.launch(grid, block[0], shared_bytes, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def launched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched, in order."""
    names: list[str] = []

    def load(index: int | None, file: str, function: str, defines: Defines) -> Launched:
        return Launched(Emulated(folder, file, function, dict(defines)), function, names)

    monkeypatch.setattr(device_launch, "loaded", load)
    monkeypatch.setattr(device_launch, "card", lambda index: SMALL)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return names


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def matrix(bits: int, group: int, zeros: bool, out: int, width: int) -> tuple[Fragments, Tensor]:
    codes, scale, zero_point = random_matrix(out, width, bits, group, zeros)
    packed = pack_fragments(codes, scale, zero_point, bits, group)
    return packed, dense(codes, scale, zero_point, bits, group)


@pytest.mark.parametrize(
    ("bits", "group", "zeros", "dtype", "shape", "names"),
    [
        (4, 64, True, torch.bfloat16, (1, 70, 2100), ["decode"]),
        (8, -1, True, torch.float16, (7, 33, 264), ["decode"]),
        (3, 128, False, torch.float16, (9, 70, 2048), ["batch"]),
        (4, 32, True, torch.bfloat16, (20, 130, 264), ["prepare", "batch"]),
        (2, -1, False, torch.float16, (33, 20, 301), ["prepare", "batch"]),
        (4, 128, False, torch.bfloat16, (65, 20, 256), ["prepare", "prefill"]),
        (3, 64, True, torch.float16, (1024, 20, 141), ["dequantize"]),
    ],
)
def test_packed(
    launched: list[str],
    bits: int,
    group: int,
    zeros: bool,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    names: list[str],
) -> None:
    m, out, width = shape
    packed, weight = matrix(bits, group, zeros, out, width)
    x = normal(m, width).to(dtype)
    bias = normal(out).to(dtype) if out < 70 else None
    counters = torch.zeros(plans.most_counters((out, width)), dtype=torch.int32)
    # One place more in front: what is not aligned is copied.
    given = torch.cat([x[:1, :1].flatten(), x.flatten()])[1:].view(1, m, width)
    row_scale = packed.row_scale[:out].clone()
    buffers = (op_words(packed), row_scale, packed.scale, packed.zero_point)
    found = device_launch.fragment_linear(given, *buffers, bias, counters)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert launched == names
    assert found.shape == (1, m, out)
    assert found.dtype == dtype
    assert not counters.any()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    assert float((found[0] - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_what_does_not_fit_is_refused(launched: list[str]) -> None:
    packed, _ = matrix(4, 64, False, 20, 256)
    buffers = [op_words(packed), packed.row_scale[:20].clone(), packed.scale, None]
    counters = torch.zeros(1, dtype=torch.int32)
    multiply = device_launch.fragment_linear
    with pytest.raises(ConfigError, match=r"activations of torch\.float32"):
        multiply(normal(1, 256), *buffers, None, counters)
    with pytest.raises(ValueError, match="hold no rows of 512 weights"):
        multiply(normal(1, 512).half(), *buffers, None, counters)
    with pytest.raises(ValueError, match=r"a bias of torch\.float32"):
        multiply(normal(1, 256).half(), *buffers, normal(20), counters)
    buffers[1] = packed.row_scale.new_ones(100)
    with pytest.raises(ValueError, match="do not hold 100 rows"):
        multiply(normal(1, 256).half(), *buffers, None, counters)
    assert not launched
    assert multiply(
        normal(0, 256).half(), buffers[0], normal(20), *buffers[2:], None, counters
    ).shape == (0, 20)


@pytest.mark.parametrize(
    ("m", "names"),
    [
        (1, ["quantize_tokens", "w8a8"]),
        (16, ["quantize_tokens", "w8a8"]),
        (17, ["quantize_tokens", "rescale"]),
    ],
)
def test_int8_activations(launched: list[str], m: int, names: list[str]) -> None:
    weight = torch.randint(-127, 128, (48, 1040), generator=torch.Generator().manual_seed(0))
    x, scale = normal(m, 1037).bfloat16(), normal(45).abs()
    bias = normal(45).bfloat16()
    given = (x, weight.to(torch.int8), scale, bias)
    torch.testing.assert_close(device_launch.w8a8_linear(*given), w8a8_reference(*given))
    assert launched == names


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, False), (3, -1, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantizing(
    launched: list[str], bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = normal(9, 75).to(dtype)
    found = device_launch.quantize_pack(weight, bits, group, symmetric)
    for got, wanted in zip(
        found, quantize_pack_reference(weight, bits, group, symmetric), strict=True
    ):
        assert torch.equal(got, wanted)
    assert launched == ["quantize"]


def test_unpacking(launched: list[str]) -> None:
    codes = torch.arange(2 * 5 * 40).reshape(2, 5, 40).to(torch.uint8) % 8
    assert torch.equal(device_launch.unpack(pack(codes, 3), 3, 37), codes[..., :37])
    assert launched == ["unpack"]


def test_the_small_card_splits_some() -> None:
    """So that the cases above go through scratch and counters as well as past them."""
    plan = device_launch.linear_plan
    packed = device_launch.Format(4, 64, True, 70, 2100)
    assert plan(packed, 1, SMALL)[1].partial > 0
    assert plan(device_launch.Format(3, 128, False, 70, 2048), 9, SMALL)[1].partial > 0
    assert plan(device_launch.Format(8, 0, True, 33, 264), 7, SMALL)[1].partial == 0
