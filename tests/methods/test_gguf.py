"""The gguf method: every type from a model to logits, its options, its refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from kernels.errors import ConfigError
from methods import gguf_read, packed
from methods.base import Calibration, Matrix, QuantizeReport, Storing
from methods.gguf import FILE, Gguf, StoredDifferentlyError, TypedMatrix, check_stored
from methods.gguf_imatrix import importance
from methods.gguf_types import FILE_TYPES, FLOATS, TENSOR_TYPES
from methods.llamacpp_kernels import uses_of
from tests.architectures import BOS_ID, VOCABULARY, logits_of, tiny, tiny_ids, tiny_tokenizer
from tests.methods.gguf_models import mean_kl
from tests.methods.machine import Machine

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

CALIBRATION = Calibration(2, 24, 0)
Q4 = Gguf("gguf_Q4_K_M", "Q4_K_M")


def model_of(hidden: int = 256, layers: int = 1, tied: bool = False) -> Any:
    """Return a seeded Llama whose rows K-quants take, where `hidden` is a multiple of 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    return with_norms(AutoModelForCausalLM.from_config(config).eval())


def with_norms(model: Any) -> Any:
    """Draw vectors too: fresh ones are all 1 or 0 and hide a mix-up."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def quantized(method: Gguf, model: Any, into: Path) -> QuantizeReport:
    shown = tiny_ids(2, 24) if method.needs_calibration else None
    return method.quantize(model, tiny_tokenizer(), shown, into)


def logits_from(method: Gguf, artefact: Path) -> Tensor:
    engine = method.load(artefact, Machine())
    logits, _ = engine.prefill(tiny_ids())
    engine.close()
    return logits


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizeReport]:
    """Return artefact and report of an eight-layer Llama in Q4_K_M."""
    folder = tmp_path_factory.mktemp("q4")
    return folder, quantized(Q4, model_of(layers=8), folder)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_every_type_from_model_to_logits(name: str, tmp_path: Path) -> None:
    needed = CALIBRATION if FILE_TYPES[name].needs_importance else None
    method = Gguf(f"gguf_{name}", name, calibration=needed)
    report = quantized(method, model_of(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", FILE}
    assert report.unquantized == FLOATS.get(name)
    assert method.needs_calibration == FILE_TYPES[name].needs_importance
    engine = method.load(tmp_path, Machine())
    assert isinstance(engine, Storing)
    stored = engine.stored_bytes()
    on_disk = sum(stored[f"{matrix.name}.weight"] for matrix in report.quantized)
    assert 8 * on_disk == report.stored_bits
    assert {use.name: use.weights for use in engine.kernels()} == {
        matrix.name: matrix.weights for matrix in report.quantized
    }
    assert {use.execution for use in engine.kernels()} == {"packed"}
    decoded = method.load_dequantized(tmp_path, Machine())
    compared = packed.compare_paths(engine, decoded, tiny_ids(), method.path_tolerance)
    assert max(compared.prefill, compared.decode) < method.path_tolerance
    engine.close()
    models = (model_of(), decoded.model)
    before, after = (m.model.layers[0].mlp.up_proj.weight.detach() for m in models)
    assert float((after - before).norm() / before.norm()) <= weight_error(name)


def weight_error(name: str) -> float:
    """Return what of normally distributed weights may get lost, as a share of their size."""
    floats = {"F32": 0.0, "F16": 3e-4, "BF16": 3e-3}
    # Three values for a whole block cannot follow a bell.
    ternary = {"TQ1_0": 0.9, "TQ2_0": 0.9}
    bits = TENSOR_TYPES[FILE_TYPES[name].main].bits
    return (floats | ternary).get(name, 2 ** (1 - bits))


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "gpt2"])
def test_the_float32_file_is_the_model(kind: str, tmp_path: Path) -> None:
    method = Gguf("gguf_F32", "F32")
    expected = logits_of(tiny(kind), tiny_ids())
    report = quantized(method, tiny(kind), tmp_path)
    assert report.unquantized == "float32"
    assert mean_kl(expected, logits_from(method, tmp_path)) < 1e-6


def test_the_same_model_gives_the_same_bytes(
    q4: tuple[Path, QuantizeReport], tmp_path: Path
) -> None:
    quantized(Q4, model_of(layers=8), tmp_path)
    assert (tmp_path / FILE).read_bytes() == (q4[0] / FILE).read_bytes()


def test_better_types_are_named(q4: tuple[Path, QuantizeReport]) -> None:
    notes = [note for note in q4[1].notes if note.startswith("matrices not in Q4_K: ")]
    # Eighths and thirds of eight layers.
    assert "self_attn.v_proj of layers 0, 3, 6-7: Q6_K" in notes[0]
    assert "mlp.down_proj of layers 0, 3, 6-7: Q6_K" in notes[0]
    assert "lm_head: Q6_K" in notes[0]
    by_name = {m.name: m for m in q4[1].quantized}
    first = by_name["model.layers.0.self_attn.v_proj"]
    assert isinstance(first, TypedMatrix)
    assert (first.type, first.wanted) == ("Q6_K", "Q6_K")


def test_kernels_say_the_real_types_and_what_activations_become(
    q4: tuple[Path, QuantizeReport],
) -> None:
    engine = Q4.load(q4[0], Machine())
    kernels = {use.name: use.kernel for use in engine.kernels()}
    engine.close()
    assert "Q6_K x Q8_K, activations rounded to Q8_K" in kernels["lm_head"]
    assert "Q4_K x Q8_K" in kernels["model.layers.1.mlp.up_proj"]
    assert kernels["model.embed_tokens"] == "ggml get_rows Q4_K, rows looked up become F32"


def test_the_head_and_the_last_layers_go_to_a_card_first(
    q4: tuple[Path, QuantizeReport], tmp_path: Path
) -> None:
    uses = uses_of(q4[0] / FILE, Machine(device="cuda", gpu_layers=3))
    on_card = {use.name for use in uses if use.kernel.startswith("ggml CUDA mul_mat")}
    last = {m.name for m in q4[1].quantized if ".6." in m.name or ".7." in m.name}
    assert on_card == {"lm_head", *last}
    assert all(
        use.kernel.endswith("large batches on the card") for use in uses if ".5." in use.name
    )
    everything = uses_of(q4[0] / FILE, Machine(device="cuda"))
    assert [use.name for use in everything if "CUDA" not in use.kernel] == ["model.embed_tokens"]
    quantized(Q4, model_of(tied=True), tmp_path)
    tied = uses_of(tmp_path / FILE, Machine(device="cuda", gpu_layers=1))
    assert [use.name for use in tied if "CUDA" in use.kernel] == ["model.embed_tokens"]


def test_what_is_stored_again_for_this_processor_is_said(
    q4: tuple[Path, QuantizeReport],
) -> None:
    from methods.llamacpp_engine import library

    lines: list[str] = []
    api = library().api
    listen = api.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    api.llama_log_set(listen, None)
    try:
        engine = Q4.load(q4[0], Machine())
    finally:
        api.llama_log_set(library().callback, None)
    said = {use.name for use in engine.kernels() if "stored again as CPU_REPACK" in use.kernel}
    engine.close()
    stored = gguf_read.stored_tensors(q4[0] / FILE)
    predicted = sum(stored[f"{name}.weight"].bytes for name in said) / 2**20
    (line,) = [line for line in lines if "CPU_REPACK model buffer size" in line] or ["= 0.00 MiB"]
    assert float(line.split("=")[1].split()[0]) == pytest.approx(predicted, abs=0.006)


def test_mapped_and_read_files_give_the_same(q4: tuple[Path, QuantizeReport]) -> None:
    assert Q4.loadings == ("mmap", "no_mmap")
    engines = [Q4.load_as(way, q4[0], Machine()) for way in Q4.loadings]
    first, second = (engine.prefill(tiny_ids())[0] for engine in engines)
    assert torch.equal(first, second)
    for engine in engines:
        engine.close()


def test_a_damaged_tensor_is_caught(q4: tuple[Path, QuantizeReport], tmp_path: Path) -> None:
    shutil.copytree(q4[0], tmp_path, dirs_exist_ok=True)
    good = Q4.load_dequantized(q4[0], Machine())
    data = np.memmap(tmp_path / FILE, np.uint8, "r+")
    # The middle of the file lies in the blocks; their nibbles are exchanged.
    half = len(data) // 2
    part = data[half : half + 200_000]
    part[:] = (part >> 4) | (part << 4)
    data.flush()
    broken = Q4.load(tmp_path, Machine())
    with pytest.raises(packed.PathDisagreementError):
        packed.compare_paths(broken, good, tiny_ids(), Q4.path_tolerance)
    broken.close()


def test_pure_has_one_type(tmp_path: Path) -> None:
    method = replace(Q4, pure=True)
    report = quantized(method, model_of(layers=2), tmp_path)
    assert {t.type for t in gguf_read.stored_tensors(tmp_path / FILE).values()} == {"Q4_K", "F32"}
    assert report.stored_bits == sum(m.weights for m in report.quantized) * 144 * 8 // 256
    assert not report.notes or "not in Q4_K" not in report.notes[0]


def test_head_and_embedding_have_types_of_their_own(tmp_path: Path) -> None:
    method = replace(Q4, output_tensor_type="Q8_0", token_embedding_type="Q3_K")
    quantized(method, model_of(), tmp_path)
    stored = gguf_read.stored_tensors(tmp_path / FILE)
    assert stored["lm_head.weight"].type == "Q8_0"
    assert stored["model.embed_tokens.weight"].type == "Q3_K"


def test_half_precision_with_a_head_of_its_own_is_quantized(tmp_path: Path) -> None:
    method = Gguf("gguf_F16", "F16", output_tensor_type="Q8_0")
    report = quantized(method, model_of(), tmp_path)
    stored = gguf_read.stored_tensors(tmp_path / FILE)
    assert report.unquantized is None
    assert stored["lm_head.weight"].type == "Q8_0"
    assert stored["model.layers.0.mlp.up_proj.weight"].type == "F16"


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    report = quantized(Q4, model_of(tied=True), tmp_path)
    names = [matrix.name for matrix in report.quantized]
    assert "model.embed_tokens" in names
    assert "lm_head" not in names
    engine = Q4.load(tmp_path, Machine())
    (use,) = [use for use in engine.kernels() if use.name == "model.embed_tokens"]
    engine.close()
    assert "Q6_K x Q8_K" in use.kernel
    assert use.kernel.endswith("(the head; looked up as the embedding)")
    for change in ({"pure": True}, {"token_embedding_type": "Q8_0"}, {"type": "F16"}):
        method = replace(Q4, output_tensor_type="Q8_0", **change)
        with pytest.raises(ConfigError, match=r"head is its embedding and has no type of its own"):
            method.select(model_of(tied=True))


def test_rows_a_type_cannot_take_are_foreseen(tmp_path: Path) -> None:
    sentences = Q4.foresee(model_of(hidden=320, layers=2))
    assert sentences == [
        "rows of 320 weights are no whole blocks of Q4_K (256 weights), so llama.cpp stores Q5_0 "
        "for self_attn.q_proj of layers 0-1; self_attn.k_proj of layers 0-1; self_attn.v_proj of "
        "layers 0; self_attn.o_proj of layers 0-1; mlp.gate_proj of layers 0-1; mlp.up_proj of "
        "layers 0-1; mlp.down_proj of layers 0; model.embed_tokens",
        "rows of 320 weights are no whole blocks of Q6_K (256 weights), so llama.cpp stores Q8_0 "
        "for self_attn.v_proj of layers 1; mlp.down_proj of layers 1; lm_head",
    ]
    report = quantized(Q4, model_of(hidden=320, layers=2), tmp_path)
    assert set(sentences) <= set(report.notes)
    assert Q4.foresee(model_of()) == []
    assert Gguf("gguf_Q8_0", "Q8_0").foresee(model_of(hidden=320)) == []


def test_rows_that_no_block_divides_stay_in_half_precision(tmp_path: Path) -> None:
    report = quantized(Q4, model_of(hidden=40), tmp_path)
    kinds = {m.type for m in report.quantized if isinstance(m, TypedMatrix)}
    assert kinds == {"F16"}
    assert report.unquantized == "float16"


@pytest.mark.parametrize("config", ["qwen2", "gpt2"])
def test_biases_and_transposed_matrices(config: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "bos_token_id": BOS_ID, "eos_token_id": BOS_ID}
    configs: dict[str, Callable[[], Any]] = {
        "qwen2": lambda: Qwen2Config(
            **common,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        ),
        "gpt2": lambda: GPT2Config(**common, n_positions=64, n_embd=256, n_layer=2, n_head=4),
    }
    model = with_norms(AutoModelForCausalLM.from_config(configs[config]()).eval())
    expected = logits_of(model, tiny_ids())
    method = Gguf("gguf_Q6_K", "Q6_K", calibration=CALIBRATION)
    report = quantized(method, model, tmp_path)
    assert {m.type for m in report.quantized if isinstance(m, TypedMatrix)} == {"Q6_K"}
    engine = method.load(tmp_path, Machine())
    packed.compare_paths(
        engine, method.load_dequantized(tmp_path, Machine()), tiny_ids(), method.path_tolerance
    )
    assert mean_kl(expected, engine.prefill(tiny_ids())[0]) < 1e-3
    engine.close()


@pytest.mark.parametrize("kind", ["mixtral", "opt", "gpt_neox"])
def test_families_without_an_exporter_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"models of type '{kind}' cannot be written as GGUF"):
        Q4.select(tiny(kind))


def test_importance_is_the_mean_square_of_each_input() -> None:
    model = model_of(layers=2)
    ids = tiny_ids(2, 24)
    seen: list[Tensor] = []
    name = "model.layers.1.mlp.down_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
    hook.remove()
    found = importance(model, ids, [name, "lm_head", "model.embed_tokens"])
    squares = seen[0].numpy().astype(np.float64).reshape(-1, 256) ** 2
    np.testing.assert_allclose(found[name].numpy(), squares.mean(0), rtol=1e-5)
    head = hidden.numpy().astype(np.float64).reshape(-1, 256) ** 2
    np.testing.assert_allclose(found["lm_head"].numpy(), head.mean(0), rtol=1e-5)
    assert torch.equal(found["model.embed_tokens"], torch.ones(256))
    assert not model.get_submodule(name)._forward_pre_hooks


def test_a_tied_embedding_matters_as_the_head_does() -> None:
    model = model_of(tied=True)
    found = importance(model, tiny_ids(), ["model.embed_tokens"])["model.embed_tokens"]
    with torch.no_grad():
        hidden = model.model(input_ids=tiny_ids()).last_hidden_state
    torch.testing.assert_close(found, hidden.square().mean((0, 1)))


def test_an_importance_matrix_changes_and_betters_what_it_weighs(tmp_path: Path) -> None:
    plain = replace(Q4, type="Q4_0")
    weighed = replace(plain, calibration=CALIBRATION)
    errors = []
    for number, method in enumerate((plain, weighed)):
        model = model_of()
        # One column in eight is fed far more than the others.
        with torch.no_grad():
            model.model.layers[0].post_attention_layernorm.weight[::8] *= 20
        weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        means = importance(model, tiny_ids(2, 24), ["model.layers.0.mlp.up_proj"])
        quantized(method, model, tmp_path / str(number))
        decoded = gguf_read.load_dequantized(tmp_path / str(number) / FILE)
        error = (decoded.model.layers[0].mlp.up_proj.weight - weight).square()
        errors.append(float((error * means["model.layers.0.mlp.up_proj"]).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_pure_types_that_need_importance_have_it_everywhere(tmp_path: Path) -> None:
    # llama.cpp itself would abort: it asks for none where the embedding is concerned.
    method = Gguf("gguf_IQ2_XXS", "IQ2_XXS", pure=True, calibration=CALIBRATION)
    for tied in (False, True):
        quantized(method, model_of(tied=tied), tmp_path / str(tied))
        stored = gguf_read.stored_tensors(tmp_path / str(tied) / FILE)
        assert {t.type for t in stored.values()} == {"IQ2_XXS", "F32"}


def test_importance_needs_text(tmp_path: Path) -> None:
    weighed = replace(Q4, calibration=CALIBRATION)
    with pytest.raises(ConfigError, match="gguf needs calibration text and was given none"):
        weighed.quantize(model_of(), tiny_tokenizer(), None, tmp_path)


def test_a_file_with_other_types_is_an_error(q4: tuple[Path, QuantizeReport]) -> None:
    matrices = [m for m in q4[1].quantized if isinstance(m, TypedMatrix)]
    check_stored(q4[0] / FILE, matrices)
    other = [replace(matrices[0], type="Q5_K"), replace(matrices[1], name="nowhere")]
    with pytest.raises(StoredDifferentlyError, match=r"2 matrices otherwise.*instead of Q5_K"):
        check_stored(q4[0] / FILE, other)


def test_a_matrix_that_select_did_not_name_is_in_the_main_type() -> None:
    assert Q4.stored_bits(Matrix("a", "block", 8, 512)) == 8 * 2 * 144 * 8
    assert Q4.stored_bits(Matrix("a", "block", 8, 64)) == 8 * 2 * 22 * 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"type": "Q4_K"}, r"method\.type is 'Q4_K'; it must be one of F32, F16, .*, IQ1_S$"),
        ({"output_tensor_type": "Q4_K_M"}, r"output_tensor_type is 'Q4_K_M'; it must be one of"),
        ({"token_embedding_type": "int4"}, r"token_embedding_type is 'int4'; it must be one of"),
        ({"pure": "yes"}, r"method\.pure of gguf is 'yes'; it must be true or false"),
        ({"type": "IQ2_S"}, "type IQ2_S needs an importance matrix; use method=gguf_imatrix"),
        ({"token_embedding_type": "IQ1_S"}, "token_embedding_type IQ1_S needs an importance"),
        (
            {"type": "Q8_0", "calibration": CALIBRATION},
            "rounding to Q8_0 does not look at an importance matrix; use method=gguf",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace(Q4, **changes)


def test_a_mixture_has_no_single_width() -> None:
    assert (Q4.bits, Q4.group_size) == (None, None)
    pure = replace(Q4, pure=True)
    assert (pure.bits, pure.group_size) == (4.0, 32)
    mixed = replace(pure, output_tensor_type="Q8_0")
    assert (mixed.bits, mixed.group_size) == (None, None)
    half = Gguf("gguf_F16", "F16")
    assert (half.bits, half.group_size) == (16.0, None)


def test_a_missing_library_is_one_sentence(
    q4: tuple[Path, QuantizeReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("methods.library.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf needs the package gguf, which is not installed"):
        Q4.load(q4[0], Machine())
    with pytest.raises(ConfigError, match=r"pip install --constraint constraints\.txt"):
        quantized(Q4, model_of(), q4[0])
