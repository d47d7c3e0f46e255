"""The CUDA kernels on whole bytes, lane by lane on the processor: int8 products, unpacking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from kernels import plans
from kernels.pack import pack
from tests.kernels.emulate import Emulated
from tests.kernels.test_cuda_emulation import DTYPES, nan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.mark.parametrize(
    ("dtype", "m", "out", "width", "splits"),
    [
        (torch.float16, 3, 50, 1111, 1),
        (torch.bfloat16, 16, 50, 1111, 3),
        (torch.bfloat16, 9, 16, 129, 1),
        (torch.float16, 1, 1, 7, 1),
    ],
)
def test_int8_activations(
    folder: Path, dtype: torch.dtype, m: int, out: int, width: int, splits: int
) -> None:
    generator = torch.Generator().manual_seed(m)
    weight = torch.randint(-127, 128, (out, width), generator=generator).to(torch.int8)
    row_scale, bias = torch.rand(out, generator=generator), torch.randn(out, generator=generator)
    x, bias = torch.randn(m, width, generator=generator).to(dtype), bias.to(dtype)
    x[0] *= 0 if m > 8 else 1
    pitch = -(-width // 16) * 16
    # What a row is filled up with does not count.
    stored = functional.pad(weight, (0, pitch - width), value=77)
    defines = {"DTYPE": DTYPES[dtype], "TOKEN_TILES": 1 if m <= 8 else 2}
    codes, scale = torch.full((m, pitch), 99, dtype=torch.int8), nan(m)
    quantizer = Emulated(folder, "w8a8.cu", "quantize_tokens", defines)
    rows = -(-out // 16) * 16
    arrived = torch.full((rows // 16,), 7, dtype=torch.int32)
    sizes = (width, pitch, rows // 16)
    quantizer.launch((m,), plans.THREADS, 16, x, codes, scale, arrived, *sizes)
    assert not arrived.any()
    step = x.float().abs().amax(-1, keepdim=True) / 127
    step = torch.where(step == 0, 1, step)
    assert torch.equal(scale, step.squeeze(-1))
    assert torch.equal(codes[:, :width], (x.float() / step).round().to(torch.int8))
    assert not codes[:, width:].any()
    partial = torch.zeros((splits, m, rows), dtype=torch.int32)
    kernel, found = Emulated(folder, "w8a8.cu", "w8a8", defines), []
    steps = -(-pitch // plans.W8A8_STEP)
    shared = plans.w8a8_shared(m, -(-steps // splits) * plans.W8A8_STEP)
    for backwards in (False, True):
        y = nan(m, out, dtype=dtype)
        tensors = (codes, scale, stored, row_scale, bias, y, partial, arrived.zero_())
        kernel.launch(
            (rows // 16, splits), 256, shared, *tensors, m, out, pitch, backwards=backwards
        )
        found.append(y)
    sums = codes[:, :width].double() @ weight.double().T
    expected = (sums.float() * row_scale * step + bias.float()).to(dtype)
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[0], found[1])
    # The same from the sums of torch._int_mm, whose rows are filled up.
    padded = functional.pad(sums.int(), (0, 8), value=5)
    y = nan(m, out, dtype=dtype)
    numbers = (out, out + 8)
    Emulated(folder, "w8a8.cu", "rescale", defines).launch(
        (m, -(-out // 256)), 256, 0, padded, scale, row_scale, bias, y, *numbers
    )
    assert torch.equal(y, found[0])


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("stored", "width"), [(64, 64), (64, 61), (37, 37), (1, 1)])
def test_unpack_is_the_reference(folder: Path, bits: int, stored: int, width: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (70, stored), generator=generator).to(torch.uint8)
    packed = pack(codes, bits)
    found = torch.full((70, width), 0xEE, dtype=torch.uint8)
    grid = (-(-70 * -(-width // 8) // plans.THREADS),)
    Emulated(folder, "unpack.cu", "unpack", {"BITS": bits}).launch(
        grid, plans.THREADS, 0, packed, found, 70, packed.shape[1], width
    )
    assert torch.equal(found, codes[:, :width])
