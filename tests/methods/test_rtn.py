"""Round-to-nearest on whole models: artefacts, sizes, scope, padding, and bad options."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.load import meta_model
from kernels.errors import ConfigError
from methods.affine import fake_quantize
from methods.artefact import WEIGHTS
from methods.base import Matrix, Method, QuantizeReport
from methods.layers import weight_of
from methods.rtn import RTN
from tests.architectures import CONFIGS, logits_of, tiny, tiny_ids
from tests.methods.machine import Machine

BITS = (8, 4, 3, 2)
KINDS = ("llama", "llama_tied", "gpt2", "mixtral", "opt", "gpt_neox")


def rtn(bits: int = 4, group_size: int = 32, **options: Any) -> RTN:
    return RTN("rtn", bits, group_size, **options)


def quantized(method: RTN, kind: str, into: Path) -> QuantizeReport:
    return method.quantize(tiny(kind), None, None, into)


def rounded(method: RTN, kind: str) -> Any:
    """Return the model with the weights that `method` covers rounded and stored as floats."""
    model = tiny(kind)
    for matrix in method.select(model)[0]:
        weight = weight_of(model, matrix)
        weight.copy_(fake_quantize(matrix.name, weight, method.affine))
    # Grouped experts add in another order; the engine runs them one by one.
    model.config._experts_implementation = "eager"
    return model


def relative(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


def test_it_is_a_method() -> None:
    method: Method = rtn()
    assert (method.name, method.bits, method.group_size) == ("rtn", 4, 32)
    assert not method.needs_calibration


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 16), (4, 32), (3, 16), (2, -1)])
def test_the_loaded_artefact_is_the_rounded_model(
    kind: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    method = rtn(bits, group_size)
    report = quantized(method, kind, tmp_path)
    expected = logits_of(rounded(method, kind), tiny_ids())
    engine = method.load_dequantized(tmp_path, Machine())
    ids = tiny_ids()
    logits, cache = engine.prefill(ids[:, :-1])
    step, _ = engine.decode(ids[:, -1:], cache)
    torch.testing.assert_close(torch.cat([logits, step], 1), expected, rtol=1e-4, atol=1e-4)
    assert {use.name for use in engine.kernels()} == {m.name for m in report.quantized}
    assert sum(use.weights for use in engine.kernels()) == sum(m.weights for m in report.quantized)
    packed = method.load(tmp_path, Machine())
    assert relative(packed.prefill(ids)[0], expected) < 0.03
    assert not report.notes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True}, {"scale_dtype": "float32"}, {"head": True, "embeddings": True}],
    ids=str,
)
@pytest.mark.parametrize("bits", BITS)
def test_stored_bits_are_the_bytes_on_disk(
    kind: str, options: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    method = rtn(bits, 16, **options)
    report = quantized(method, kind, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    own = {f"{matrix.name}." for matrix in report.quantized}
    stored = sum(
        8 * tensor.nbytes
        for name, tensor in tensors.items()
        if any(name.startswith(prefix) for prefix in own) and not name.endswith(".bias")
    )
    assert stored == report.stored_bits
    assert stored == sum(method.stored_bits(matrix) for matrix in report.quantized)
    assert method.select(meta_model(CONFIGS[kind])) == (
        list(report.quantized),
        list(report.left_out),
    )


def test_bits_a_weight_by_hand() -> None:
    matrix = Matrix("layer", "block", 64, 256)
    for bits in BITS:
        # A scale of 16 bits and a zero point of `bits` bits a group.
        assert rtn(bits, 32).stored_bits(matrix) / matrix.weights == bits + (16 + bits) / 32
        assert rtn(bits, 128, symmetric=True).stored_bits(matrix) == 64 * 256 * bits + 128 * 16
        assert rtn(bits, -1).stored_bits(matrix) == 64 * (256 * bits + 16 + bits)
    assert rtn(4, -1, per_tensor=True).stored_bits(matrix) == 64 * 256 * 4 + 16 + 8
    wide = rtn(4, 128, scale_dtype="float32", symmetric=True)
    assert wide.stored_bits(matrix) == 64 * 256 * 4 + 128 * 32
    assert rtn(4, 32).stored_bits(Matrix("e", "block", 64, 256, 3)) == 3 * rtn(4, 32).stored_bits(
        matrix
    )


def test_error_grows_from_8_to_2_bits_and_with_the_group() -> None:
    model = tiny("llama")
    weights = [weight_of(model, matrix) for matrix in rtn().select(model)[0]]
    found = {
        (bits, size): sum(
            float((fake_quantize("w", w, rtn(bits, size).affine) - w).square().sum())
            for w in weights
        )
        for bits in BITS
        for size in (16, 32, -1)
    }
    for size in (16, 32, -1):
        by_bits = [found[bits, size] for bits in BITS]
        assert by_bits == sorted(by_bits)
    for bits in BITS:
        assert found[bits, 16] < found[bits, 32] <= found[bits, -1]
    expected = logits_of(model, tiny_ids())
    off = [relative(logits_of(rounded(rtn(b, 32), "llama"), tiny_ids()), expected) for b in BITS]
    assert off == sorted(off)


def test_kept_modules_stay_as_they_are(tmp_path: Path) -> None:
    method = rtn(2, 32, keep=["*.down_proj", "model.layers.0.*"])
    assert method.keep == ("*.down_proj", "model.layers.0.*")
    report = quantized(method, "llama", tmp_path)
    assert len(report.quantized) == 6
    tensors = load_file(tmp_path / WEIGHTS)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(tensors[name], tiny("llama").state_dict()[name])


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"head": True}, "quantizing the head unties"),
        ({"embeddings": True}, "quantizing the embedding unties"),
        ({"head": True, "embeddings": True}, "quantizing the embedding and the head unties"),
    ],
    ids=str,
)
def test_a_tied_head_is_untied_and_said_so(
    kind: str, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    method = rtn(4, 32, **options)
    report = quantized(method, kind, tmp_path)
    assert len(report.notes) == 1
    assert named in report.notes[0]
    engine = method.load_dequantized(tmp_path, Machine())
    model = tiny(kind)
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    original = ends["head"].weight.clone()
    for matrix in method.select(model)[0]:
        weight = fake_quantize(matrix.name, weight_of(model, matrix), method.affine)
        if matrix.role == "block":
            weight_of(model, matrix).copy_(weight)
        else:
            ends[matrix.role].weight = nn.Parameter(weight)
    untouched = {"embedding", "head"} - {matrix.role for matrix in report.quantized}
    for role in untouched:
        assert torch.equal(ends[role].weight, original)
    expected = logits_of(model, tiny_ids())
    torch.testing.assert_close(engine.prefill(tiny_ids())[0], expected, rtol=1e-4, atol=1e-4)
    untied = [entry for entry in report.left_out if entry[2].startswith("untied")]
    assert untied == ([] if "head" in options else [("head", 320 * 32, untied[0][2])])


def test_an_untied_head_needs_no_note(tmp_path: Path) -> None:
    assert not quantized(rtn(4, 32, head=True, embeddings=True), "llama", tmp_path).notes


def test_an_embedding_that_does_more_is_refused() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 8

    model = tiny("llama")
    model.set_input_embeddings(Scaled(320, 32))
    with pytest.raises(ConfigError, match="is a Scaled, which does more than look rows up"):
        rtn(4, 32, embeddings=True).select(model)


def test_a_width_that_no_group_divides_names_layer_width_and_sizes() -> None:
    model = meta_model({**CONFIGS["llama"], "intermediate_size": 172})
    with pytest.raises(ConfigError) as caught:
        rtn(4, 32).select(model)
    assert str(caught.value) == (
        "layer model.layers.0.mlp.down_proj: its width 172 is not a multiple of group_size 32; "
        "group sizes that fit it: 43, 86, 172, -1 (-1 is per channel); "
        "or set on_indivisible=pad"
    )


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_recorded_counted_and_exact(bits: int, tmp_path: Path) -> None:
    method = rtn(bits, 24, on_indivisible="pad")
    report = quantized(method, "llama", tmp_path)
    assert list(report.notes) == [
        "rows of 32 inputs are padded to 48 for group_size 24; the padding is stored and counted",
        "rows of 64 inputs are padded to 72 for group_size 24; the padding is stored and counted",
    ]
    matrix = next(m for m in report.quantized if m.name.endswith("q_proj"))
    assert method.stored_bits(matrix) == 32 * (48 * bits + 2 * (16 + bits))
    expected = logits_of(rounded(method, "llama"), tiny_ids())
    logits, _ = method.load_dequantized(tmp_path, Machine()).prefill(tiny_ids())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_two_bits_symmetric_say_that_they_are_ternary(tmp_path: Path) -> None:
    assert "ternary" in quantized(rtn(2, 32, symmetric=True), "llama", tmp_path).notes[0]


def test_scales_too_small_for_float16_are_said(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1e-6)
    notes = rtn(4, 32).quantize(model, None, None, tmp_path).notes
    assert notes[0].startswith("32 scales are below the smallest normal number of float16")


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj", "model.norm", "model.embed_tokens"],
)
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(
    name: str, tmp_path: Path
) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.get_submodule(name).weight.flatten()[3] = float("nan")
    with pytest.raises(ConfigError, match=rf"weight {name}(\.weight)? holds 1 values"):
        rtn().quantize(model, None, None, tmp_path / "artefact")
    assert not (tmp_path / "artefact").exists()


def test_biases_keep_the_type_of_the_checkpoint(tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.config.dtype = torch.bfloat16
    rtn().quantize(model, None, None, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["transformer.h.0.attn.c_attn.bias"].dtype == torch.bfloat16
    assert tensors["transformer.h.0.attn.c_attn.scale"].dtype == torch.float16
    assert tensors["transformer.wpe.weight"].dtype == torch.bfloat16
    engine = rtn().load(tmp_path, Machine(compute_dtype="bfloat16"))
    assert torch.isfinite(engine.prefill(tiny_ids())[0]).all()


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        quantized(rtn(3, 32), "llama", tmp_path / folder)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_the_yaml_holds_every_option_at_its_default() -> None:
    path = Path(__file__).resolve().parents[2] / "conf" / "method" / "rtn.yaml"
    node = OmegaConf.load(path)
    axes = {"bits": 3, "group_size": 64, "on_indivisible": "pad"}
    config = OmegaConf.create({**axes, "method": node})
    assert instantiate(config.method) == RTN("rtn", 3, 64, on_indivisible="pad")
    assert set(node) - {"_target_"} == {field.name for field in fields(RTN)}
    config.method.keep = ["lm_head"]
    assert instantiate(config.method).keep == ("lm_head",)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 5}, "bits is 5; weights can have 8, 4, 3 or 2 bits"),
        ({"group_size": 0}, "group_size is 0; it must be 16 to 1024 inputs, or -1"),
        ({"per_tensor": True}, "set group_size=-1"),
        ({"on_indivisible": "skip"}, "on_indivisible is 'skip'; it must be 'error' or 'pad'"),
        ({"keep": "lm_head"}, "keep is 'lm_head'; it must be a list, as [lm_head]"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RTN(**{"name": "rtn", "bits": 4, "group_size": 32, **options})
    assert sentence in str(caught.value)


def test_hardware_that_cannot_run_it_is_refused_before_any_weight_is_read() -> None:
    with pytest.raises(ConfigError, match="'float16' on a CPU, where it is emulated"):
        rtn().check(Machine(compute_dtype="float16"))
    strict = Machine(allow_fallback=False, compute_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"panel_linear \(C\) takes no groups"):
        rtn(4, 48).check(strict)
    for bits, group_size in ((8, -1), (4, 32), (3, 32), (2, -1)):
        rtn(bits, group_size).check(strict)
    rtn(4, 32).check(Machine(device="cuda", compute_dtype="float16"))
