"""The stored format of bitsandbytes against its own functions and against the papers' formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kernels.errors import ConfigError
from methods import bitsandbytes_engine as engine
from methods.bnb_4bit import Bnb4Bit
from methods.layers import Scope, select_linears
from tests.architectures import logits_of, tiny, tiny_ids
from tests.methods.machine import Machine

bnb = engine.library()

# Dettmers et al. 2023, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Sign, then 2 exponent bits and 1 mantissa bit as bitsandbytes reads them, over the largest.
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODEBOOKS = {"nf4": NF4, "fp4": FP4}
NF4_OFFSET = 0.9677083


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.05


def stored(weight: Tensor, kind: str, block_size: int, nested: bool) -> dict[str, Tensor]:
    """Return the tensors that bitsandbytes stores for `weight`."""
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=nested
    )
    parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return {"weight": packed, **parts}


def codes_of(packed: Tensor) -> Tensor:
    return torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()


def dynamic_map() -> Tensor:
    """Return the 8-bit dynamic map: 7 decades, each cut into twice the steps of the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        steps = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*steps.tolist(), *(-steps).tolist()]
    return torch.tensor(sorted(values))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "block_size"),
    [(1, 32, 32), (7, 64, 32), (33, 128, 64), (16, 768, 256), (300, 64, 64), (2, 1024, 1024)],
)
def test_decoding_is_bitsandbytes_own_bit_for_bit(
    rows: int, width: int, block_size: int, nested: bool, kind: str
) -> None:
    weight = weights(rows, width)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=nested
    )
    expected = bnb.functional.dequantize_4bit(packed, state)
    decoded = engine.decode(stored(weight, kind, block_size, nested))
    assert torch.equal(decoded, expected)
    assert decoded.shape == weight.shape


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_scales_are_those_of_the_paper(kind: str) -> None:
    """The scale is the block's largest absolute value, a code the nearest value of the table."""
    weight = weights(24, 128)
    tensors = stored(weight, kind, 64, nested=False)
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(1)
    assert torch.equal(tensors["weight.absmax"], absmax)
    table = torch.tensor(CODEBOOKS[kind])
    assert torch.equal(tensors["weight.quant_map"], table)
    distance = (blocks / absmax[:, None]).unsqueeze(-1).sub(table).abs()
    chosen = distance.gather(-1, codes_of(tensors["weight"]).view(*blocks.shape, 1)).squeeze(-1)
    # FP4 has two zeros, and a rounding error decides between values equally near.
    assert torch.all(chosen <= distance.amin(-1) + 1e-6)


def test_nf4_is_the_formula_of_the_paper() -> None:
    """Quantiles of the normal distribution, 8 on the left and 9 on the right with the zero."""

    def side(count: int) -> Tensor:
        levels = torch.linspace(NF4_OFFSET, 0.5, count, dtype=torch.float64)
        return torch.special.ndtri(levels)[:-1]

    positive, negative = side(9), -side(8)
    table = torch.cat([negative, torch.zeros(1), positive]).sort().values
    assert (table / table.max() - torch.tensor(NF4)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_bit_for_bit(kind: str) -> None:
    """Scales about their mean, in 8 bits of the dynamic map, over blocks of 256."""
    weight = weights(300, 64)
    tensors = stored(weight, kind, 64, nested=True)
    plain = stored(weight, kind, 64, nested=False)["weight.absmax"]
    facts = engine._facts(tensors)
    assert facts["nested_offset"] == float(plain.mean())
    assert facts["nested_blocksize"] == 256
    torch.testing.assert_close(
        tensors["weight.nested_quant_map"], dynamic_map(), rtol=1e-6, atol=1e-9
    )
    centred = plain - plain.mean()
    assert torch.equal(
        tensors["weight.nested_absmax"],
        torch.stack([centred[:256].abs().max(), centred[256:].abs().max()]),
    )
    scaled = centred / tensors["weight.nested_absmax"].repeat_interleave(256)[:300]
    distance = scaled[:, None].sub(tensors["weight.nested_quant_map"]).abs()
    chosen = distance.gather(1, tensors["weight.absmax"].long()[:, None]).squeeze(1)
    assert torch.all(chosen <= distance.amin(1) + 1e-6)


def test_int8_decoding_is_bitsandbytes_own() -> None:
    weight = weights(24, 40).half()
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight)
    assert torch.equal(scale, weight.abs().amax(1).float())
    assert torch.equal(codes, (weight.float() * (127 / scale[:, None])).round().to(torch.int8))
    decoded = engine.decode({"weight": codes, "SCB": scale})
    expected = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, scale)
    torch.testing.assert_close(decoded, expected, rtol=1e-6, atol=0)
    assert (decoded - weight.float()).abs().max() <= scale.max() / 127 / 2 * 1.001


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an NF4 checkpoint of a tiny Llama whose key and value matrices have 16 rows."""
    into = tmp_path_factory.mktemp("nf4")
    Bnb4Bit("nf4", "nf4", 32).quantize(tiny("llama"), None, None, into)
    return into


def test_matrices_are_listed(folder: Path) -> None:
    found = {matrix.name: (matrix.out_features, matrix.in_features) for matrix in _list(folder)}
    assert len(found) == 14
    assert found["model.layers.1.mlp.down_proj"] == (32, 64)
    assert found["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert engine.group_sizes(folder) == {32}


def _list(folder: Path) -> list[Any]:
    return engine.matrices(folder)


def test_shards_are_read_together(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    halves = [sorted(tensors)[0::2], sorted(tensors)[1::2]]
    for number, half in enumerate(halves):
        save_file({name: tensors[name] for name in half}, tmp_path / f"part{number}.safetensors")
    assert _list(tmp_path) == _list(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_from_pretrained_loads(folder: Path, dtype: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map="cpu"
    )
    loaded = engine.load(folder, Machine(compute_dtype=dtype))
    for name, module in theirs.named_modules():
        if type(module).__name__ == "Linear4bit":
            own = loaded.model.get_submodule(name)
            # Otherwise bitsandbytes stops at an assertion where rows are no multiple of 32.
            module.support_avx512bf16_for_cpu = own.support_avx512bf16_for_cpu
    assert torch.equal(logits_of(theirs, tiny_ids()), loaded.prefill(tiny_ids())[0])


def test_weights_are_settled_before_the_first_token(folder: Path) -> None:
    loaded = engine.load(folder, Machine())
    before = {name: tensor.clone() for name, tensor in loaded.model.named_parameters()}
    loaded.prefill(tiny_ids())
    assert all(torch.equal(before[name], now) for name, now in loaded.model.named_parameters())


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="without AVX512_BF16 every matrix is dequantized"
)
def test_each_matrix_says_how_it_runs(folder: Path) -> None:
    """16 rows are no block of the kernel's 32: these dequantize, where that is allowed."""
    uses = engine.load(folder, Machine()).kernels()
    states = {use.name.rpartition(".")[2]: use.execution for use in uses}
    assert {name for name, state in states.items() if state == "dequantized"} == {
        "k_proj",
        "v_proj",
    }
    said = next(use.kernel for use in uses if use.name.endswith("k_proj"))
    assert "blocks of 32, not 16" in said
    with pytest.raises(ConfigError, match=r"k_proj: .* blocks of 32, not 16"):
        engine.load(folder, Machine(allow_fallback=False))


def test_without_the_kernel_everything_is_dequantized(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    loaded = engine.load(folder, Machine(allow_fallback=False))
    assert {use.execution for use in loaded.kernels()} == {"dequantized"}
    plain = engine.load_dequantized(folder, Machine())
    ids = tiny_ids()
    difference = (loaded.prefill(ids)[0] - plain.prefill(ids)[0]).square().mean().sqrt()
    assert difference < 0.02 * plain.prefill(ids)[0].std()


def test_blocks_that_run_across_rows_are_refused_on_a_cpu(tmp_path: Path) -> None:
    """bitsandbytes 0.50.2 then takes other scales there than it quantized with."""
    model = tiny("llama")
    selection = select_linears(model, Scope(), "of no matter")

    def build(weight: Tensor) -> Any:
        linear = bnb.nn.Linear4bit(*weight.T.shape, bias=False, device="meta")
        linear.weight = bnb.nn.Params4bit(weight, quant_type="nf4", module=linear).to("cpu")
        return linear

    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    engine.write(model, tmp_path, selection, settings, build)
    with pytest.raises(ConfigError, match="its width 32 is not a multiple of the block size 64"):
        engine.load(tmp_path, Machine())


def test_a_matrix_that_transformers_leaves_out_is_an_error(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] += ["down_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"skipped 2 .*down_proj"):
        engine.load(tmp_path, Machine())


def test_skipped_names_are_no_beginnings_of_others() -> None:
    """transformers skips whatever begins as a name of the list does."""
    linears = {"layers.0.gate", "layers.0.gate_proj", "lm_head"}
    assert engine._skipped(linears, ["layers.0.gate_proj"]) == ["layers.0.gate$", "lm_head"]
