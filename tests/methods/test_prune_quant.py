"""Pruning before quantizing: which weights go, that zeros stay zero, what the file takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import prune

from harness.load import meta_model
from kernels.errors import ConfigError
from methods.artefact import WEIGHTS
from methods.base import Method, TrainingMethod, TwoPathMethod
from methods.bitnet import BitNet
from methods.layers import weight_of
from methods.prune_quant import PruneQuant, removed
from methods.rtn import RTN
from methods.unquantized import Unquantized
from tests.architectures import CONFIGS, tiny, tiny_ids
from tests.methods.int8_models import divergence, round_trip
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf"
KINDS = ("llama", "gpt2", "mixtral")


def rtn(bits: int = 8, **options: Any) -> RTN:
    return RTN("rtn", bits, 32, **options)


def prune_quant(then: Method | None = None, **options: Any) -> PruneQuant:
    return PruneQuant("prune_quant", then or rtn(), **options)


def pruned(method: PruneQuant, model: Any) -> dict[str, Tensor]:
    """Return the pruned weights of `model`, by name."""
    matrices, _ = method.select(model)
    method.prune(model, matrices)
    return {matrix.name: weight_of(model, matrix) for matrix in matrices}


def test_the_smallest_weights_of_a_matrix_go_as_torch_removes_them() -> None:
    found = pruned(prune_quant(amount=0.37), tiny("llama"))
    model = tiny("llama")
    for name, weight in found.items():
        module = model.get_submodule(name)
        prune.l1_unstructured(module, "weight", amount=0.37)
        assert torch.equal(weight, module.weight), name
        assert int((weight == 0).sum()) == removed(weight.numel(), 0.37)


def test_the_smallest_of_all_matrices_go_as_torch_removes_them() -> None:
    found = pruned(prune_quant(amount=0.5, scope="global"), tiny("llama"))
    model = tiny("llama")
    parts = [(model.get_submodule(name), "weight") for name in found]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=0.5)
    for (module, _), (name, weight) in zip(parts, found.items(), strict=True):
        assert torch.equal(weight, module.weight), name


def test_without_an_amount_it_is_the_documents_share() -> None:
    found = pruned(prune_quant(), tiny("llama"))
    zeros = sum(int((weight == 0).sum()) for weight in found.values())
    assert zeros / sum(weight.numel() for weight in found.values()) == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_of_every_four_inputs_stay(kind: str) -> None:
    before = {name: weight.clone() for name, weight in pruned(prune_quant(), tiny(kind)).items()}
    found = pruned(prune_quant(pattern="2:4"), tiny(kind))
    assert set(found) == set(before)
    for weight in found.values():
        fours = weight.reshape(-1, 4)
        assert bool(((fours != 0).sum(1) == 2).all())
    original = tiny(kind)
    matrix = prune_quant().select(original)[0][0]
    fours, all_four = (w.reshape(-1, 4) for w in (found[matrix.name], weight_of(original, matrix)))
    kept = torch.where(fours == 0, 0, all_four)
    assert torch.equal(kept, fours)
    assert bool((fours.abs().sum(1) >= all_four.abs().sum(1) / 2).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero_and_both_stores_give_the_same_model(
    kind: str, bits: int, tmp_path: Path
) -> None:
    dense, sparse = (prune_quant(rtn(bits), store=store) for store in ("dense", "bitmap"))
    one, dense_engine = round_trip(dense, tiny(kind), tmp_path / "dense")
    other, sparse_engine = round_trip(sparse, tiny(kind), tmp_path / "bitmap")
    logits = [engine.prefill(tiny_ids())[0] for engine in (dense_engine, sparse_engine)]
    assert torch.equal(*logits)
    shares = [report.details["pruning"]["zeros"] for report in (one, other)]
    assert shares[0] == shares[1]
    # Rounding adds zeros and takes none away.
    assert 0.2995 <= shares[0] < 0.45
    assert one.stored_bits == sum(dense.stored_bits(matrix) for matrix in one.quantized)
    assert other.stored_bits <= sum(sparse.stored_bits(matrix) for matrix in other.quantized)
    assert f"{shares[0]:.1%} of the stored weights are zero" in one.notes
    assert "pruning saves no bytes here" in one.notes[2]
    assert "those of dense weights" in other.notes[2]


def test_the_bits_that_a_bitmap_takes_are_on_disk(tmp_path: Path) -> None:
    method = prune_quant(rtn(8, head=True, embeddings=True), amount=0.6, store="bitmap")
    report, _ = round_trip(method, tiny("llama"), tmp_path)
    own = tuple(f"{matrix.name}." for matrix in report.quantized)
    tensors = load_file(tmp_path / WEIGHTS)
    assert not any(name.endswith(".packed") for name in tensors)
    assert report.stored_bits == sum(
        8 * tensor.nbytes for name, tensor in tensors.items() if name.startswith(own)
    )
    facts = report.details["pruning"]
    assert facts["bits_per_weight"] < 0.6 * facts["bits_per_weight_dense"]
    found = method.select(meta_model(CONFIGS["llama"]))
    assert found == (list(report.quantized), list(report.left_out))


def test_it_can_what_the_method_at_its_end_can(tmp_path: Path) -> None:
    method: Method = prune_quant(rtn(4))
    assert (method.name, method.bits, method.group_size) == ("prune_quant", 4, 32)
    assert isinstance(method, TwoPathMethod)
    assert isinstance(method, TrainingMethod)
    assert method.path_tolerance == rtn(4).path_tolerance
    assert not isinstance(prune_quant(BitNet("bitnet")), TwoPathMethod)
    model = tiny("llama")
    for store in ("dense", "bitmap"):
        chain: Any = prune_quant(rtn(4), store=store)
        _, engine = round_trip(
            chain, model if store == "dense" else tiny("llama"), tmp_path / store
        )
        other = chain.load_dequantized(tmp_path / store, Machine())
        assert divergence(other.prefill(tiny_ids())[0], engine.prefill(tiny_ids())[0]) < 1e-3
        assert {use.execution for use in other.kernels()} == {"dequantized"}


def test_pruning_alone_is_a_row_and_not_the_unquantized_one(tmp_path: Path) -> None:
    method = prune_quant(Unquantized("fp16", "float16"), amount=0.5)
    report, _ = round_trip(method, tiny("gpt2"), tmp_path)
    assert report.unquantized is None
    assert report.details["pruning"]["zeros"] == pytest.approx(0.5, abs=1e-3)


def test_zeros_of_ternary_weights_are_counted(tmp_path: Path) -> None:
    report, _ = round_trip(prune_quant(BitNet("bitnet")), tiny("llama"), tmp_path)
    assert 0.3 <= report.details["pruning"]["zeros"] < 0.5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"amount": 0}, "amount of prune_quant is 0; it must be above 0 and below 1"),
        ({"amount": 1.0}, "it must be above 0 and below 1"),
        ({"amount": "much"}, "is 'much'; it must be above 0"),
        ({"pattern": "2:4", "amount": 0.5}, "pattern=2:4 removes two of every four"),
        ({"pattern": "2:4", "scope": "global"}, "has no such option"),
        ({"pattern": "4:8"}, "pattern of prune_quant is '4:8'; it must be unstructured or 2:4"),
        ({"scope": "row"}, "scope of prune_quant is 'row'; it must be matrix or global"),
        ({"store": "csr"}, "store of prune_quant is 'csr'; it must be dense or bitmap"),
        ({"store": "bitmap", "then": BitNet("bitnet")}, "and bitnet stores others"),
        ({"store": "bitmap", "then": rtn(8, activation_bits=8)}, "rtn with activation_bits stores"),
        ({"then": "rtn"}, "then of prune_quant is 'rtn'; it is chosen among the methods"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        prune_quant(**options)


def test_a_width_that_is_no_multiple_of_four_is_named() -> None:
    model = meta_model({**CONFIGS["llama"], "intermediate_size": 66})
    method = prune_quant(RTN("rtn", 8, -1), pattern="2:4")
    with pytest.raises(ConfigError, match=r"down_proj: its width 66 is not a multiple of 4"):
        method.select(model)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(ConfigError, match=r"weight model.layers.1.mlp.up_proj holds 1 values"):
        prune_quant().quantize(model, None, None, tmp_path)


def test_the_method_after_it_is_chosen_like_any() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = compose(
            "config", ["method=prune_quant", "method@method.then=bitnet", "method.pattern=2:4"]
        )
    method = instantiate(chosen.method)
    assert method == prune_quant(BitNet("bitnet"), pattern="2:4")
