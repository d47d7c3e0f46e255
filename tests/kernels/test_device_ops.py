"""The ops that cards have kernels for: references, schemas, graphs; on a card, the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import compiler, device_launch, plans
from kernels.device_ops import fragment_linear, quantize_pack, unpack, w8a8_linear
from kernels.errors import ConfigError
from kernels.gpu import INT8_ACTIVATION_LINEARS, PACKED_LINEARS, linear_of
from kernels.pack import pack
from kernels.reference import dequantize_packed, packed_linear
from kernels.stored import Stored
from kernels.variants import variants
from methods.affine import Affine, quantize

BITS = (8, 4, 3, 2)
on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(bits: int, group: int, symmetric: bool, out: int, width: int) -> Stored:
    packed, scale, zeros = quantize_pack(random(out, width, seed=bits), bits, group, symmetric)
    zero_point = None if symmetric else pack(zeros.flatten(), bits)
    return Stored(packed, scale, zero_point, bits, group, width)


def to(matrix: Stored, device: str) -> Stored:
    zeros = None if matrix.zero_point is None else matrix.zero_point.to(device)
    return Stored(
        matrix.packed.to(device),
        matrix.scale.to(device),
        zeros,
        matrix.bits,
        matrix.group_size,
        matrix.columns,
    )


def weight_of(matrix: Stored) -> Tensor:
    zeros, bits, group = matrix.zero_point, matrix.bits, matrix.group_size
    return dequantize_packed(matrix.packed, matrix.scale, zeros, bits, group, matrix.columns)


def fragment_arguments(bits: int, group: int, symmetric: bool, bias: bool) -> tuple[Any, ...]:
    module = PACKED_LINEARS[bits](stored(bits, group, symmetric, 20, 150))
    added = random(20).bfloat16() if bias else None
    buffers = (module.words, module.row_scale, module.scale, module.zero_point)
    return random(2, 3, 150).bfloat16(), *buffers, added, module.counters


def int8_arguments(bias: bool) -> tuple[Any, ...]:
    weight = torch.randint(-127, 128, (24, 48), generator=torch.Generator().manual_seed(0))
    added = random(20).half() if bias else None
    return random(3, 40).half(), weight.to(torch.int8), random(20).abs() + 0.1, added


CALLS: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
    ("packed 8", fragment_linear, fragment_arguments(8, -1, True, True)),
    ("packed 4", fragment_linear, fragment_arguments(4, 64, False, False)),
    ("packed 3", fragment_linear, fragment_arguments(3, 128, True, False)),
    ("packed 2", fragment_linear, fragment_arguments(2, 32, False, True)),
    ("int8", w8a8_linear, int8_arguments(True)),
    ("int8 without bias", w8a8_linear, int8_arguments(False)),
    ("quantize", quantize_pack, (random(5, 40), 4, 16, False)),
    ("quantize symmetric", quantize_pack, (random(5, 37), 3, -1, True)),
    ("unpack", unpack, (pack(torch.arange(24).to(torch.uint8).reshape(2, 12) % 8, 3), 3, 11)),
    ("unpack bytes", unpack, (torch.arange(24).to(torch.uint8).reshape(2, 12), 8, 12)),
]
IDS = [name for name, _, _ in CALLS]


@pytest.mark.parametrize(("name", "op", "given"), CALLS, ids=IDS)
def test_opcheck(name: str, op: Any, given: tuple[Any, ...]) -> None:
    assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("name", "op", "given"), CALLS, ids=IDS)
def test_compiled_whole(name: str, op: Any, given: tuple[Any, ...]) -> None:
    torch.compiler.reset()
    backend = "eager" if given[0].dtype == torch.uint8 else "aot_eager"
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*given), op(*given), rtol=0, atol=0)


@pytest.mark.parametrize("linears", [PACKED_LINEARS, INT8_ACTIVATION_LINEARS])
def test_a_module_compiles_whole(linears: dict[int, Any]) -> None:
    torch.compiler.reset()
    module = linears[8](stored(8, -1, True, 20, 150))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x in (random(3, 150).half(), random(3, 150)):
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group", "width"), [(-1, 150), (32, 150), (64, 64), (128, 300), (256, 300)]
)
def test_packed_modules_are_the_stored_weights(
    bits: int, symmetric: bool, group: int, width: int
) -> None:
    matrix = stored(bits, group, symmetric, 30, width)
    assert PACKED_LINEARS[bits].refusal(group) is None
    module = PACKED_LINEARS[bits](matrix)
    x, bias = random(2, 5, width), random(30)
    expected = x.double() @ weight_of(matrix).double().T
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 2e-2)):
        found = module(x.to(dtype), bias.to(dtype))
        assert found.dtype == dtype
        assert float((found - bias - expected).abs().max()) < tolerance * float(
            expected.abs().max()
        )


def test_one_scale_a_matrix() -> None:
    codes = torch.arange(6 * 40).reshape(6, 40).to(torch.uint8) % 16
    matrix = Stored(pack(codes, 4), torch.full((1, 1), 0.5).half(), None, 4, -1, 40)
    x = random(2, 40)
    args = (matrix.packed, matrix.scale, None, None, 4, -1)
    expected = packed_linear(x.bfloat16().float(), *args)
    found = PACKED_LINEARS[4](matrix)(x.bfloat16())
    torch.testing.assert_close(found, expected.bfloat16())


def test_groups_without_a_kernel_are_refused_in_a_sentence() -> None:
    refusal = PACKED_LINEARS[4].refusal(16)
    assert refusal is not None
    assert refusal.startswith("takes no groups of 16 inputs")
    assert INT8_ACTIVATION_LINEARS[8].refusal(128) is not None
    with pytest.raises(ConfigError, match="takes symmetric weights of 8 bits"):
        INT8_ACTIVATION_LINEARS[8](stored(8, -1, False, 8, 16))


def test_without_a_compiler_there_is_no_map_but_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "unavailable", lambda: None)
    assert linear_of(4) == (PACKED_LINEARS[4], "")
    assert linear_of(5) == (None, "")
    monkeypatch.setattr(compiler, "unavailable", lambda: "no compiler")
    assert linear_of(4) == (None, "no compiler")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_int8_activations_are_the_formula(dtype: torch.dtype) -> None:
    matrix = stored(8, -1, True, 20, 150)
    x, bias = random(4, 150).to(dtype), random(20).to(dtype)
    x[2] = 0
    found = INT8_ACTIVATION_LINEARS[8](matrix)(x, bias)
    assert found.dtype == dtype
    taken = x.bfloat16() if dtype == torch.float32 else x
    step = (taken.double().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    rounded = (taken.float() / step.float()).round().double() * step
    expected = rounded @ weight_of(matrix).double().T + bias.double()
    tolerance = 1e-3 if dtype == torch.float16 else 1e-2
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())
    assert torch.equal(found[2], bias.bfloat16().to(dtype) if dtype == torch.float32 else bias)


def test_what_is_not_finite_stays_in_its_token() -> None:
    x = random(3, 150).half()
    x[1, 3] = float("inf")
    found = INT8_ACTIVATION_LINEARS[8](stored(8, -1, True, 20, 150))(x)
    assert not torch.isfinite(found[1]).any()
    assert torch.isfinite(found[[0, 2]]).all()


def odd_weights(dtype: torch.dtype) -> Tensor:
    weight = random(13, 301, seed=5).to(dtype)
    weight[2] = 0
    weight[3] *= 1e-6
    weight[4] = weight[4].abs() + 1
    return weight


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [-1, 32, 40, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_card)])
def test_quantize_pack_is_the_method(bits: int, group: int, symmetric: bool, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = odd_weights(dtype)
        expected = quantize("w", weight, Affine(bits, group, symmetric))
        packed, scale, zeros = quantize_pack(weight.to(device), bits, group, symmetric)
        assert torch.equal(packed.cpu(), pack(expected.codes, bits))
        assert torch.equal(scale.cpu(), expected.scale)
        if expected.zero_point is None:
            assert zeros.shape == (0, scale.shape[1])
        else:
            assert torch.equal(zeros.cpu(), expected.zero_point)


def test_formats_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 bits"):
        quantize_pack(random(2, 8), 5, -1, True)
    with pytest.raises(ConfigError, match="groups of 12 inputs"):
        quantize_pack(random(2, 8), 4, 12, True)
    with pytest.raises(ValueError, match="hold no 9 codes"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)


def test_words_of_another_width_are_refused() -> None:
    given = list(fragment_arguments(4, 64, False, False))
    given[0] = random(2, 400).bfloat16()
    with pytest.raises(ValueError, match="hold no rows of 400 weights"):
        fragment_linear(*given)


def test_the_plan_names_a_compiled_kernel() -> None:
    known = {(v.file, v.function, tuple(v.defines.items())): v.architectures for v in variants()}
    shapes = ((1, 1), (4096, 4096), (100, 11008), (22016, 300))
    for arch, processors in (("sm_80", 108), ("sm_86", 82), ("sm_90", 132), ("sm_100", 148)):
        on = device_launch.Card(0, processors, plans.shared_limit(arch))
        for bits in BITS:
            for shape in shapes:
                packed = device_launch.Format(bits, 32, True, *shape)
                for m in (1, 2, 3, 5, 8, 9, 17, 33, 64, 65, 1023):
                    regime, plan = device_launch.linear_plan(packed, m, on)
                    name = (f"{regime}.cu", regime, packed.defines(1, **plan.defines))
                    assert arch in known[name]
                    assert not plan.partial or plan.arrived <= plans.most_counters(shape)


# What only a card can show

SHAPES = ((64, 128), (100, 300), (33, 1111), (512, 2048))
"""Out and in: whole tiles, odd ones, an odd width, several splits of K."""

TOKENS = (1, 2, 3, 7, 8, 9, 16, 31, 64, 65, 200, 1024)


def close(found: Tensor, expected: Tensor) -> None:
    """Each output within the rounding of its type, and 1e-3 of the result's norm."""
    assert torch.isfinite(found).all()
    half_unit = 2.0**-8 if found.dtype == torch.bfloat16 else 2.0**-11
    norm = float(expected.norm()) / math.sqrt(expected.numel())
    error = (found.double() - expected).abs() - 2 * half_unit * expected.abs()
    assert float(error.max()) < (5 if found.dtype == torch.bfloat16 else 1) * 4e-3 * norm


@on_a_card
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
def test_every_regime(dtype: torch.dtype, bits: int, symmetric: bool, group: int) -> None:
    for out, width in SHAPES:
        matrix = stored(bits, group, symmetric, out, width)
        module = PACKED_LINEARS[bits](to(matrix, "cuda"))
        weight, bias = weight_of(matrix).double(), random(out).to(dtype)
        for m in TOKENS:
            x = (random(m, width, seed=m) + 0.3).to(dtype)
            product = x.double() @ weight.T
            close(module(x.cuda()).cpu(), product)
            close(module(x.cuda(), bias.cuda()).cpu(), product + bias.double())
        assert not module.counters.any(), "counters are left as they were found"


@on_a_card
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_activations_on_a_card(dtype: torch.dtype) -> None:
    for out, width in SHAPES:
        matrix = stored(8, -1, True, out, width)
        here = INT8_ACTIVATION_LINEARS[8](matrix)
        there = INT8_ACTIVATION_LINEARS[8](to(matrix, "cuda"))
        for m in (1, 8, 9, 16, 17, 100):
            x, bias = random(m, width, seed=m).to(dtype), random(out).to(dtype)
            torch.testing.assert_close(there(x.cuda(), bias.cuda()).cpu(), here(x, bias))


@on_a_card
@pytest.mark.parametrize("bits", BITS)
def test_unpack_on_a_card(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (3, 50, 64), generator=generator).to(torch.uint8)
    for width in (64, 61, 3):
        found = unpack(pack(codes, bits).cuda(), bits, width)
        assert torch.equal(found.cpu(), codes[..., :width])


@on_a_card
def test_activations_that_are_not_aligned_or_not_contiguous() -> None:
    matrix = stored(4, 128, False, 100, 256)
    module = PACKED_LINEARS[4](to(matrix, "cuda"))
    x = random(4, 520).half().cuda()
    for view in (
        x[:, 3:259],
        x[:, 256:512],
        x[:, ::2][:, :256],
        x.flatten()[1 : 1 + 512].view(2, 256),
    ):
        close(module(view).cpu(), view.cpu().double() @ weight_of(matrix).double().T)
    assert module(x[:0, :256]).shape == (0, 100)
    assert module(x[0, :256]).shape == (100,)


@on_a_card
def test_a_graph_replays_every_regime() -> None:
    matrix = stored(4, 64, False, 100, 2048)
    module = PACKED_LINEARS[4](to(matrix, "cuda"))
    rounded = INT8_ACTIVATION_LINEARS[8](to(stored(8, -1, True, 100, 2048), "cuda"))
    for dtype in (torch.float16, torch.bfloat16):
        for linear in (module, rounded):
            for m in (1, 8, 16, 64, 100, 1024):
                x = torch.zeros(m, 2048, dtype=dtype, device="cuda")
                linear(x)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = linear(x)
                for seed in (1, 2, 3):
                    x.copy_(random(m, 2048, seed=seed))
                    graph.replay()
                    if m < plans.VENDOR_TOKENS:
                        assert torch.equal(y, linear(x))
                    else:  # the vendor's library may split K otherwise in a graph
                        torch.testing.assert_close(y, linear(x))


@on_a_card
def test_two_matrices_on_two_streams() -> None:
    pairs = []
    for seed in (4, 3):
        matrix = stored(seed, 64, False, 100, 4096)
        pairs.append((PACKED_LINEARS[seed](to(matrix, "cuda")), torch.cuda.Stream()))
    x = random(16, 4096).half().cuda()
    alone = [module(x) for module, _ in pairs]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for module, stream in pairs:
            with torch.cuda.stream(stream):
                found.append(module(x))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


@on_a_card
def test_compiled_on_a_card() -> None:
    torch.compiler.reset()
    module = PACKED_LINEARS[4](to(stored(4, 64, False, 100, 300), "cuda"))
    x = random(3, 300).half().cuda()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


@on_a_card
def test_packing_on_a_card_gives_the_same_words() -> None:
    matrix = stored(3, 64, False, 100, 300)
    here, there = PACKED_LINEARS[3](matrix), PACKED_LINEARS[3](to(matrix, "cuda"))
    for name, buffer in here.named_buffers():
        assert torch.equal(dict(there.named_buffers())[name].cpu(), buffer)
    assert there.registers(1)
    assert here.registers(1) is None
