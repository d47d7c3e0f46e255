"""The ONNX graph against transformers: every way of reading tokens, and what the file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

pytest.importorskip("onnxruntime")

from kernels.errors import ConfigError
from methods import onnx_graph, onnx_int8
from methods.base import SizedCache, Storing
from methods.layers import Scope
from methods.onnx_engine import OnnxEngine, check_hardware, load_engine, operators_of
from methods.onnx_export import export, float32_notes, select_maps
from methods.onnx_unquantized import OnnxUnquantized
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import CONTEXT, VOCABULARY, logits_of, tiny, tiny_ids
from tests.methods.forks import check_fork, drawn
from tests.methods.int8_models import divergence
from tests.methods.machine import Machine
from tests.methods.onnx_models import (
    WINDOW,
    bits_on_disk,
    change_tensor,
    copied,
    exported,
    quantize,
    small,
)

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
KINDS = ("qwen2", "gpt2", "mistral")

# The sums of float32 in another order.
AGREEMENT = 1e-6


def method(dtype: str = "float32") -> OnnxUnquantized:
    return OnnxUnquantized("onnx_fp32", dtype)


def engine_of(kind: str, threads: int = 1) -> OnnxEngine:
    folder, _ = exported(kind, False)
    return load_engine(folder, Machine(usable_threads=threads), lambda _: ("", "packed"), "test")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_however_tokens_are_read(kind: str) -> None:
    """At once, in pieces, one by one; mistral beyond its window."""
    engine, ids = engine_of(kind), tiny_ids(3, 3 * WINDOW)
    expected = logits_of(small(kind), ids)
    whole, _ = engine.prefill(ids)
    assert whole.shape == expected.shape
    assert whole.dtype == torch.float32
    assert abs(divergence(expected, whole)) < AGREEMENT
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    pieces, cache = [], None
    for part in ids.split([7, 5, 1, 1, 10], dim=1):
        logits, cache = engine.prefill(part, cache)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


def test_the_window_was_needed() -> None:
    """Without it the logits are others, so that the test above has shown it."""
    model, ids = small("mistral"), tiny_ids(1, 3 * WINDOW)
    expected = logits_of(model, ids)
    model.config.sliding_window = 4 * WINDOW
    assert divergence(expected[:, -1:], logits_of(model, ids)[:, -1:]) > 100 * AGREEMENT


@pytest.mark.parametrize("last", [1, 3, 24, 99])
def test_last_logits_alone(last: int) -> None:
    engine, ids = engine_of("qwen2"), tiny_ids()
    whole, _ = engine.prefill(ids)
    logits, _ = engine.prefill(ids, last=last)
    torch.testing.assert_close(logits, whole[:, -last:], rtol=1e-4, atol=1e-5)


def test_caches_are_independent_and_say_their_size() -> None:
    engine, ids = engine_of("qwen2"), tiny_ids(2, 12)
    _, one = engine.prefill(ids[:1, :8])
    _, other = engine.prefill(ids[1:, :8])
    assert isinstance(one, SizedCache)
    # 2 layers, keys and values, 2 heads of 8 float32.
    assert one.nbytes == 2 * 2 * 2 * 8 * 4 * one.length
    expected = logits_of(small("qwen2"), ids)
    for position in range(8, 12):
        for row, cache in enumerate((one, other)):
            token = ids[row : row + 1, position : position + 1]
            logits, advanced = engine.decode(token, cache)
            assert advanced is cache
            assert divergence(expected[row : row + 1, position : position + 1], logits) < AGREEMENT
    assert one.length == other.length == 12


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_goes_on_in_several_ways(kind: str) -> None:
    engine = engine_of(kind)
    assert "fork" in engine.capabilities
    check_fork(engine, drawn(4, engine.vocab_size))


def test_one_token_at_the_start_and_the_whole_context() -> None:
    engine, ids = engine_of("gpt2"), tiny_ids(1, CONTEXT)
    expected = logits_of(small("gpt2"), ids)
    first, cache = engine.prefill(ids[:, :1])
    rest, _ = engine.prefill(ids[:, 1:], cache)
    assert abs(divergence(expected, torch.cat((first, rest), 1))) < AGREEMENT


def test_the_engine_says_what_it_is() -> None:
    engine = engine_of("qwen2", threads=2)
    assert engine.runtime == "onnxruntime"
    assert engine.capabilities == {"logits", "cache", "fork", "generate", "logprobs", "memory"}
    assert (engine.vocab_size, engine.context_length) == (VOCABULARY, CONTEXT)
    assert isinstance(engine, Storing)
    options = engine.session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    engine.close()
    assert engine.session is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_names_every_parameter_once(kind: str) -> None:
    """As the Hugging Face model does, in float32; and nothing of where it was made."""
    folder, notes = exported(kind, False)
    sizes = onnx_graph.tensor_bytes(folder)
    parameters = dict(small(kind).named_parameters())
    assert {name: 4 * one.numel() for name, one in parameters.items()}.items() <= sizes.items()
    assert sum(sizes.values()) < sum(4 * one.numel() for one in parameters.values()) + 4096
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx.data",
        "onnx.json",
    }
    assert (
        str(Path(onnx_graph.__file__).parents[1]).encode()
        not in (folder / "model.onnx").read_bytes()
    )
    assert ("transposed copy" in " ".join(notes)) == (kind != "mistral")


def test_large_tensors_stand_beside_the_graph() -> None:
    folder, _ = exported("qwen2", False)
    graph = onnx_graph.read(folder, with_data=False).graph
    outside = {tensor.name for tensor in graph.initializer if tensor.external_data}
    assert "model.layers.0.mlp.up_proj.weight" in outside
    assert all(not tensor.raw_data for tensor in graph.initializer if tensor.name in outside)


def test_a_tied_head_can_be_stored_apart() -> None:
    folder, notes = exported("qwen2", True)
    sizes = onnx_graph.tensor_bytes(folder)
    assert sizes["lm_head.weight"] == sizes["model.embed_tokens.weight"]
    assert "lm_head" in onnx_graph.read_facts(folder).maps
    assert "stored apart" in notes[0]


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    folder, _ = exported("gpt2", False)
    export(small("gpt2"), [], tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_unquantized_round_trip(dtype: str, kind: str, tmp_path: Path) -> None:
    chosen = method(dtype)
    report = quantize(chosen, kind, tmp_path)
    assert report.unquantized == dtype
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    engine: Any = chosen.load(tmp_path, Machine())
    expected = logits_of(small(kind).to(getattr(torch, dtype)).float(), tiny_ids())
    assert abs(divergence(expected, engine.prefill(tiny_ids())[0])) < AGREEMENT
    plain = chosen.load_dequantized(tmp_path, Machine())
    compare_paths(engine, plain, tiny_ids(), chosen.path_tolerance)
    uses = engine.kernels()
    assert [use.name for use in uses] == [matrix.name for matrix in report.quantized]
    assert [use.weights for use in uses] == [matrix.weights for matrix in report.quantized]
    assert {use.layer for use in uses} == {"MatMul"}
    wanted = {
        "float32": ("packed", "float32"),
        "float16": ("dequantized", "converted from float16"),
    }
    assert {use.execution for use in uses} == {wanted[dtype][0]}
    assert all(wanted[dtype][1] in use.kernel for use in uses)
    assert engine.reads_stored == (dtype == "float32")


def test_float16_is_what_the_file_holds(tmp_path: Path) -> None:
    quantize(method("float16"), "qwen2", tmp_path)
    sizes = onnx_graph.tensor_bytes(tmp_path)
    for name, parameter in small("qwen2").named_parameters():
        assert sizes[name] == 2 * parameter.numel()


def test_float16_is_converted_on_loading_and_not_at_each_call(tmp_path: Path) -> None:
    """What the kernel's name says: no Cast of a weight is left in the graph that is run."""
    import onnx
    import onnxruntime

    quantize(method("float16"), "gpt2", tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    cast = {node.input[0] for node in graph.node if node.op_type == "Cast"}
    assert not [name for name in cast if name.endswith((".weight", ".bias"))]
    weights = [name for name in types if ".c_fc.weight" in name or ".c_attn.weight" in name]
    assert len(weights) == 2
    assert {types[name] for name in weights} == {onnx.TensorProto.FLOAT}
    # The tables of embeddings alone stay.
    halves = [name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT16]
    assert sorted(halves) == ["transformer.wpe.weight", "transformer.wte.weight"]


def test_a_broken_weight_is_caught(tmp_path: Path) -> None:
    chosen = method()
    quantize(chosen, "qwen2", tmp_path)
    plain = chosen.load_dequantized(tmp_path, Machine())
    change_tensor(tmp_path, "model.layers.1.mlp.down_proj.weight", lambda array: array[::-1].copy())
    with pytest.raises(PathDisagreementError, match="prefill"):
        compare_paths(chosen.load(tmp_path, Machine()), plain, tiny_ids(), chosen.path_tolerance)


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = small("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e6
    with pytest.raises(ConfigError, match=r"c_fc\.weight overflows in float16; use onnx_fp32"):
        method("float16").quantize(model, None, None, tmp_path)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="1 values that are NaN or infinite"):
        method().quantize(model, None, None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_experts_in_stacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot export MixtralForCausalLM: it keeps its experts"):
        method().select(tiny("mixtral"))


def test_a_cache_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("gpt2")
    model.config.layer_types = ["linear_attention"]
    with pytest.raises(ConfigError, match=r"its cache is not keys and values .*LinearAttention"):
        select_maps(model, Scope(), "onnx_fp32")
    model = small("gpt2")
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids: None)
    with pytest.raises(ConfigError, match="takes no logits_to_keep"):
        select_maps(model, Scope(), "onnx_fp32")


def test_what_torch_cannot_export_is_one_sentence(tmp_path: Path) -> None:
    model = small("gpt2")
    forward = model.transformer.forward

    def depends_on_data(input_ids: Tensor, **options: Any) -> Any:
        return forward(
            input_ids=input_ids if int(input_ids.max()) > 3 else input_ids + 1, **options
        )

    model.transformer.forward = depends_on_data
    with pytest.raises(ConfigError, match=r"torch\.onnx cannot export GPT2LMHeadModel") as caught:
        export(model, [], tmp_path)
    assert "\n" not in str(caught.value)


def test_parameters_of_another_type_than_the_checkpoints_are_said() -> None:
    model = small("gpt2")
    assert float32_notes(model) == []
    model.config.dtype = torch.bfloat16
    assert "the checkpoint has in bfloat16" in float32_notes(model)[0]


def test_a_graph_without_a_parameter_is_an_error(tmp_path: Path) -> None:
    copied("gpt2")(None, [], tmp_path)
    stored = onnx_graph.tensors_of(onnx_graph.read(tmp_path))
    del stored["transformer.h.0.ln_1.weight"]
    with pytest.raises(RuntimeError, match=r"the graph has no tensor transformer\.h\.0\.ln_1"):
        onnx_graph.plain_model(tmp_path, stored, {})


def test_a_matrix_without_a_product_is_an_error() -> None:
    graph = onnx_graph.read(exported("gpt2", False)[0])
    with pytest.raises(RuntimeError, match=r"has no MatMul of transformer.h.0.attn.c_attn$"):
        onnx_graph.name_maps(graph, {"transformer.h.0.attn.c_attn": [1, 1]})


def test_operators_are_read_from_a_profile() -> None:
    def event(name: str, operator: str) -> dict[str, Any]:
        return {"name": name, "args": {"op_name": operator}}

    events = [
        event("h.1.fc_kernel_time", "MatMul"),
        event("fused h.1.fc2/MatMulAddFusion_kernel_time", "FusedGemm"),
        event("h.1.fc.weight_cast_kernel_time", "Cast"),
        event("h.11.fc_Q4_kernel_time", "MatMulNBits"),
        event("h.11.fc_Q4_fence_before", "MatMulNBits"),
        {"name": "session_initialization"},
    ]
    maps = ["h.1.fc", "h.1.fc2", "h.11.fc"]
    found = operators_of(events, maps, ["h.1.fc", "h.11.fc"])
    assert found == {"h.1.fc": "MatMul", "h.11.fc": "MatMulNBits"}
    with pytest.raises(RuntimeError, match=r"h\.11\.fc was run by no operator"):
        operators_of(events[:2], maps, maps)
    with pytest.raises(RuntimeError, match=r"h\.1\.fc was run by MatMul, MatMul of"):
        operators_of([*events, events[0]], maps, maps)


@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        (Machine("cuda"), "needs an onnxruntime with CUDAExecutionProvider"),
        (Machine(compute_dtype="bfloat16"), "computes in float32, not bfloat16"),
        (Machine(compute_dtype="float16"), "set hardware.compute_dtype=float32"),
    ],
)
def test_hardware_is_refused_in_one_sentence(
    machine: Machine, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ConfigError, match=sentence) as caught:
        method().check(machine)
    assert "\n" not in str(caught.value)


def test_integer_operators_are_a_cpus() -> None:
    with pytest.raises(ConfigError, match="the operators of onnx_int4 are a CPU's, not for cuda"):
        check_hardware("onnx_int4", Machine("cuda"))


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("methods.library.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="onnx_fp32 needs the package onnx, which is not"):
        method().quantize(small("gpt2"), None, None, tmp_path)
    with pytest.raises(ConfigError, match="onnx_int8_dynamic needs the package onnx"):
        onnx_int8.OnnxInt8Dynamic("onnx_int8_dynamic").load(tmp_path, Machine())


def test_facts_of_another_format_are_an_error(tmp_path: Path) -> None:
    copied("gpt2")(None, [], tmp_path)
    facts = json.loads((tmp_path / "onnx.json").read_text())
    (tmp_path / "onnx.json").write_text(json.dumps({**facts, "format": 0}))
    with pytest.raises(ValueError, match="has format 0, not 1"):
        onnx_graph.read_facts(tmp_path)


@pytest.mark.parametrize(("name", "bits"), [("onnx_fp32", 32), ("onnx_fp16", 16)])
def test_the_yaml_builds_the_method(name: str, bits: int) -> None:
    built = instantiate(OmegaConf.load(CONF / f"{name}.yaml"))
    assert (built.name, built.bits, built.group_size) == (name, bits, None)
    with pytest.raises(ConfigError, match="must be float32 or float16"):
        OnnxUnquantized("onnx_bf16", "bfloat16")
