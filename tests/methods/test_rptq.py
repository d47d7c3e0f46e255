"""RPTQ: clusters against brute force, layers against plain arithmetic, and planted outliers."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from harness.load import meta_model
from kernels.errors import ConfigError
from methods.affine import Affine, fake_quantize
from methods.artefact import WEIGHTS
from methods.base import Calibration, Matrix, Method
from methods.layers import bias_of, weight_of
from methods.linear import QuantizedLinear
from methods.rounded_activations import STACKED_EXPERTS
from methods.rptq import RPTQ
from methods.rptq_layers import (
    ChannelRanges,
    ReorderedLinear,
    clusters_of,
    grids,
    index_dtype,
    k_means,
)
from tests.architectures import CONFIGS, logits_of, tiny, tiny_ids
from tests.methods.int8_models import divergence, round_trip
from tests.methods.layer_checks import bits_on_disk, passed_through
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method" / "rptq.yaml"
KINDS = ("llama", "llama_tied", "qwen2", "gpt2", "mixtral", "opt")
CALIBRATION = Calibration(samples=4, seq_len=24, seed=0)


def rptq(bits: int = 8, activation_bits: int = 8, clusters: int = 4, **options: Any) -> RPTQ:
    return RPTQ("rptq", bits, CALIBRATION, activation_bits, clusters, **options)


def text() -> Tensor:
    return tiny_ids(4, 24)


def with_outliers() -> Any:
    """Return a model whose norms make a few channels 20 to 60 times as large as the others."""
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[3] *= 60
                norm.weight[17] *= 20
    return model


def squared_distance(points: Tensor, labels: Tensor) -> float:
    """Return the summed squared distance of points from the mean of their cluster."""
    parts = [points[labels == label] for label in set(labels.tolist())]
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


def test_it_is_a_method() -> None:
    method: Method = rptq(4)
    assert (method.name, method.bits, method.group_size) == ("rptq", 4, -1)
    assert method.needs_calibration


@pytest.mark.parametrize("seed", range(4))
def test_k_means_is_near_the_best_of_all_partitions(seed: int) -> None:
    """Lloyd's rounds end in a local optimum: near the best, not always at it."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    labels = k_means(points, 2, seed=0)
    best = min(
        squared_distance(points, torch.tensor(split))
        for split in itertools.product((0, 1), repeat=9)
    )
    assert best * 0.999 < squared_distance(points, labels) < best * 1.05


def test_k_means_is_deterministic_and_improves_with_clusters() -> None:
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for clusters in (1, 2, 4, 8, 32, 200):
        labels = k_means(points, clusters, seed=3)
        assert torch.equal(labels, k_means(points, clusters, seed=3))
        assert 0 <= int(labels.min()) <= int(labels.max()) < clusters
        errors.append(squared_distance(points, labels))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0
    assert errors[-1] == 0


def test_points_that_coincide_need_fewer_clusters() -> None:
    points = torch.tensor([[0.0, 1.0], [5.0, 6.0]], dtype=torch.float64).repeat(6, 1)
    labels = k_means(points, 4, seed=0)
    assert len(set(labels[::2].tolist())) == len(set(labels[1::2].tolist())) == 1
    assert labels[0] != labels[1]


def test_ranges_are_those_of_each_channel() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 5, 3) * torch.tensor([1.0, 10.0, 0.1]) for _ in range(3)]
    ranges = ChannelRanges()
    for batch in batches:
        ranges.observe(batch)
    every = torch.cat([batch.reshape(-1, 3) for batch in batches])
    lows, highs = ranges.channels()
    assert torch.equal(lows, every.amin(0))
    assert torch.equal(highs, every.amax(0))
    with pytest.raises(ConfigError, match="NaN or infinite"):
        ranges.observe(torch.tensor([[1.0, float("nan"), 2.0]]))
    with pytest.raises(ConfigError, match="never reached"):
        ChannelRanges().channels()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_grid_spans_its_range_and_no_more(bits: int) -> None:
    # Around zero, from zero, far from zero on both sides, one value only, nothing at all.
    low = torch.tensor([-1.0, 0.0, 9.0, -9.5, 2.5, -2.5, 0.0])
    high = torch.tensor([2.0, 3.0, 10.0, -9.0, 2.5, -2.5, 0.0])
    scale, zero_point = grids(low, high, bits)
    first = scale * (0 - zero_point)
    last = scale * (2**bits - 1 - zero_point)
    step = (high - low) / (2**bits - 1)
    for value, end in ((low, first), (high, last)):
        widths = torch.where(step > 0, step, scale)[:4]
        assert bool(((end - value)[:4].abs() <= widths / 2 * 1.001).all())
    torch.testing.assert_close(scale[:4], step[:4])
    # The nearest value of the grid to a constant is the constant.
    for index in (4, 5, 6):
        code = (low[index] / scale[index]).round() + zero_point[index]
        restored = scale[index] * (code.clamp(0, 2**bits - 1) - zero_point[index])
        assert float(restored) == pytest.approx(float(low[index]), rel=1e-4)


def test_clusters_lie_side_by_side_and_hold_like_ranges() -> None:
    highs = torch.tensor([1.0, 100.0, 1.1, 9.0, 101.0, 0.9, 10.0])
    found = clusters_of(-highs, highs, clusters=3, bits=8, seed=0)
    assert sorted(found.order.tolist()) == list(range(7))
    parts = torch.split(found.order, found.sizes.tolist())
    assert {tuple(part.tolist()) for part in parts} == {(0, 2, 5), (1, 4), (3, 6)}
    for part, scale in zip(parts, found.scale, strict=True):
        assert float(scale) == pytest.approx(2 * float(highs[part].max()) / 255)


def test_one_cluster_is_a_grid_for_the_whole_tensor() -> None:
    lows, highs = torch.tensor([-1.0, -3.0, 0.5]), torch.tensor([2.0, -1.0, 7.0])
    found = clusters_of(lows, highs, clusters=1, bits=4, seed=0)
    assert found.order.tolist() == [0, 1, 2]
    assert float(found.scale) == pytest.approx(10 / 15)


def layer(weight: Tensor, bias: Tensor | None, lows: Tensor, highs: Tensor) -> ReorderedLinear:
    matrix = Matrix("layer", "block", *weight.shape)
    clusters = clusters_of(lows, highs, 5, 8, seed=0)
    linear = ReorderedLinear.of(matrix, weight, bias, Affine(8), clusters, 8)
    linear.prepare("layer", Machine())
    return linear


def test_reordering_alone_changes_nothing() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(12, 40), torch.randn(12), torch.randn(3, 7, 40)
    x *= torch.rand(40) * 10
    flat = x.flatten(0, 1)
    linear = layer(weight, bias, flat.amin(0), flat.amax(0))
    assert linear.order.tolist() != list(range(40)), "something was reordered"
    reordered = QuantizedLinear.forward(linear, x[..., linear.index])
    expected = x @ fake_quantize("layer", weight, Affine(8)).T + bias
    torch.testing.assert_close(reordered, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 8), (4, 4)])
def test_layers_give_what_the_paper_computes(
    kind: str, bits: int, activation_bits: int, tmp_path: Path
) -> None:
    report, engine = round_trip(rptq(bits, activation_bits), tiny(kind), tmp_path, text())
    model = tiny(kind)
    stored = load_file(tmp_path / WEIGHTS)
    seen = passed_through(engine, tiny_ids(), ReorderedLinear)
    assert set(seen) == {matrix.name for matrix in report.quantized}
    for matrix in report.quantized:
        x, y = seen[matrix.name]
        sizes = stored[f"{matrix.name}.cluster_sizes"].tolist()
        parts = torch.split(stored[f"{matrix.name}.order"], sizes)
        rounded = torch.full_like(x, float("nan"))
        grid = zip(
            parts,
            stored[f"{matrix.name}.input_scale"].tolist(),
            stored[f"{matrix.name}.input_zero_point"].tolist(),
            strict=True,
        )
        # Channel by channel, in the model's own order.
        for part, scale, zero_point in grid:
            for channel in part.tolist():
                codes = (x[..., channel] / scale).round() + zero_point
                codes = codes.clamp(0, 2**activation_bits - 1)
                rounded[..., channel] = (codes - zero_point) * scale
        weight = fake_quantize(matrix.name, weight_of(model, matrix), Affine(bits))
        expected = rounded.double() @ weight.T.double()
        bias = bias_of(model, matrix)
        expected = expected if bias is None else expected + bias.double()
        torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-4)


def test_grids_hold_what_calibration_saw(tmp_path: Path) -> None:
    model = tiny("gpt2")
    inputs: list[Tensor] = []
    layer = model.transformer.h[1].mlp.c_proj
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits_of(model, text())
    handle.remove()
    flat = inputs[0].flatten(0, 1)
    rptq().quantize(model, None, text(), tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    name = "transformer.h.1.mlp.c_proj"
    sizes = stored[f"{name}.cluster_sizes"]
    scale = stored[f"{name}.input_scale"].repeat_interleave(sizes)
    zero_point = stored[f"{name}.input_zero_point"].repeat_interleave(sizes)
    order = stored[f"{name}.order"].long()
    assert bool((scale * (0 - zero_point) <= flat.amin(0)[order] + scale * 0.51).all())
    assert bool((scale * (255 - zero_point) >= flat.amax(0)[order] - scale * 0.51).all())


@pytest.mark.parametrize("activation_bits", [8, 4])
def test_clusters_beat_one_grid_where_channels_differ(activation_bits: int, tmp_path: Path) -> None:
    expected = logits_of(with_outliers(), tiny_ids())
    of_inputs, of_logits = [], []
    for clusters in (1, 2, 4, 32):
        method = rptq(8, activation_bits, clusters)
        _, engine = round_trip(method, with_outliers(), tmp_path / str(clusters), text())
        loaded: Any = engine
        seen = passed_through(engine, tiny_ids(), ReorderedLinear)
        share = 0.0
        for name, (x, _) in seen.items():
            module = loaded.model.get_submodule(name)
            difference = module.round_input(x) - x[..., module.index]
            share += float(difference.norm() / x.norm()) / len(seen)
        of_inputs.append(share)
        logits = engine.prefill(tiny_ids())[0]
        of_logits.append(float((logits - expected).norm() / expected.norm()))
    assert of_inputs == sorted(of_inputs, reverse=True)
    assert of_inputs[-1] < of_inputs[0] / 2
    # How a layer's error reaches the logits is chance, but not whether it was halved.
    assert max(of_logits[1:]) < 0.9 * of_logits[0]


def test_fewer_bits_err_more(tmp_path: Path) -> None:
    expected = logits_of(tiny("llama"), tiny_ids())
    errors = []
    for bits, activation_bits in ((8, 8), (4, 8), (4, 4), (2, 4)):
        folder = tmp_path / f"{bits}{activation_bits}"
        _, engine = round_trip(rptq(bits, activation_bits), tiny("llama"), folder, text())
        errors.append(float((engine.prefill(tiny_ids())[0] - expected).norm() / expected.norm()))
    assert errors == sorted(errors)
    assert 1e-4 < errors[0] < 0.05


def test_a_token_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    _, engine = round_trip(rptq(), tiny("llama"), tmp_path, text())
    ids = tiny_ids(1, 12)
    whole, _ = engine.prefill(ids)
    _, cache = engine.prefill(ids[:, :-1])
    step, _ = engine.decode(ids[:, -1:], cache)
    assert divergence(whole[:, -1:], step) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clusters", [4, 40])
def test_stored_bits_are_the_bits_on_disk(kind: str, clusters: int, tmp_path: Path) -> None:
    """40 clusters are more than some widths have channels."""
    method = rptq(4, 4, clusters)
    report, engine = round_trip(method, tiny(kind), tmp_path, text())
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    assert report.stored_bits == sum(method.stored_bits(matrix) for matrix in report.quantized)
    found = method.select(meta_model(CONFIGS[kind]))
    assert found == (list(report.quantized), list(report.left_out))
    assert torch.isfinite(engine.prefill(tiny_ids())[0]).all()


def test_bits_by_hand_and_the_type_of_the_order() -> None:
    matrix = Matrix("layer", "block", 64, 256)
    row = 64 * (256 * 4 + 16 + 4)
    assert rptq(4, 8, 32).stored_bits(matrix) == row + 256 * 16 + 32 * 96
    assert index_dtype(2**15) == torch.int16
    assert index_dtype(2**15 + 1) == torch.int32


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        rptq(4, 4).quantize(tiny("llama"), None, text(), tmp_path / folder)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_what_runs_and_what_is_not_covered_is_said(tmp_path: Path) -> None:
    report, engine = round_trip(rptq(), tiny("mixtral"), tmp_path, text())
    uses = engine.kernels()
    assert [use.name for use in uses] == [matrix.name for matrix in report.quantized]
    assert {(use.layer, use.execution) for use in uses} == {("ReorderedLinear", "dequantized")}
    assert {use.kernel for use in uses} == {
        "reorder, fixed grid a cluster, then quantbench::packed_linear in float32"
    }
    assert "queries, keys, values and attention weights are not" in report.notes[0]
    assert {reason for name, _, reason in report.left_out if "experts" in name} == {STACKED_EXPERTS}


def test_bfloat16_activations(tmp_path: Path) -> None:
    expected = logits_of(tiny("qwen2"), tiny_ids())
    machine = Machine(compute_dtype="bfloat16")
    _, engine = round_trip(rptq(), tiny("qwen2"), tmp_path, text(), machine)
    seen = passed_through(engine, tiny_ids(), ReorderedLinear)
    assert {y.dtype for _, y in seen.values()} == {torch.bfloat16}
    assert divergence(expected, engine.prefill(tiny_ids())[0]) < 5e-2


def test_kept_matrices_stay_as_they_are(tmp_path: Path) -> None:
    report = rptq(keep=["*.down_proj"]).quantize(tiny("llama"), None, text(), tmp_path)
    assert len(report.quantized) == 12
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(load_file(tmp_path / WEIGHTS)[name], tiny("llama").state_dict()[name])


@pytest.mark.parametrize("calibration", [None, torch.zeros(0, 24, dtype=torch.int64)])
def test_without_calibration_text_it_refuses(calibration: Tensor | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rptq needs calibration text"):
        rptq().quantize(tiny("llama"), None, calibration, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 5}, "bits is 5; weights can have 8, 4, 3 or 2 bits"),
        ({"activation_bits": 3}, "activation_bits of rptq is 3; it must be 8 or 4"),
        ({"clusters": 0}, "clusters of rptq is 0; it must be 1 or more"),
        ({"keep": "lm_head"}, "method.keep is 'lm_head'; it must be a list"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        rptq(**options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="'float16' on a CPU"):
        rptq().check(Machine(compute_dtype="float16"))


def test_the_yaml_holds_every_option_at_its_default() -> None:
    node = OmegaConf.load(CONF)
    config = OmegaConf.create({"bits": 4, "seed": 7, "method": node})
    built = instantiate(config.method)
    assert built.calibration.seed == 7
    assert built == RPTQ("rptq", 4, built.calibration)
    assert set(node) - {"_target_"} == {field.name for field in fields(RPTQ)}
