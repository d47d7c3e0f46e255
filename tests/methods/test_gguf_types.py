"""The table of GGUF types against the gguf package, llama.cpp, and sizes that others published."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from harness.sizes import compute
from kernels.errors import ConfigError
from methods.base import Calibration
from methods.gguf import Gguf, shape_of
from methods.gguf_types import FILE_TYPES, TENSOR_TYPES, Choice, Shape, fitting, plan
from tests.architectures import BOS_ID, VOCABULARY, tiny_tokenizer


def gguf(name: str) -> Gguf:
    needed = Calibration(1, 8, 0) if FILE_TYPES[name].needs_importance else None
    return Gguf(f"gguf_{name}", name, calibration=needed)


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": BOS_ID,
    "eos_token_id": BOS_ID,
    "max_position_embeddings": 64,
}


def llama(
    hidden: int, feed_forward: int, layers: int, heads: tuple[int, int], tied: bool
) -> LlamaConfig:
    return LlamaConfig(
        **COMMON,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
    )


SHAPES: dict[str, Any] = {
    "llama, heads shared by four": llama(256, 512, 9, (8, 2), False),
    "llama, tied": llama(256, 256, 8, (4, 4), True),
    "llama, rows no multiple of 256": llama(320, 288, 8, (5, 5), False),
    "llama, rows no multiple of 32": llama(40, 72, 16, (2, 1), True),
    "llama, 80 layers": llama(32, 32, 80, (4, 1), False),
    "qwen2": Qwen2Config(
        **COMMON,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=17,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=256,
        n_layer=8,
        n_head=4,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    ),
}

# Bits a weight of all tensors of Llama 3.1 8B: llama.cpp, tools/quantize/README.md.
PUBLISHED = {
    "IQ1_S": 2.0042,
    "IQ1_M": 2.1460,
    "IQ2_XXS": 2.3824,
    "IQ2_XS": 2.5882,
    "IQ2_S": 2.7403,
    "IQ2_M": 2.9294,
    "IQ3_XXS": 3.2548,
    "IQ3_XS": 3.4977,
    "IQ3_S": 3.6606,
    "IQ3_M": 3.7628,
    "IQ4_XS": 4.4597,
    "IQ4_NL": 4.6818,
    "Q2_K_S": 2.9697,
    "Q2_K": 3.1593,
    "Q3_K_S": 3.6429,
    "Q3_K_M": 3.9960,
    "Q3_K_L": 4.2979,
    "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944,
    "Q5_K_S": 5.5704,
    "Q5_K_M": 5.7036,
    "Q6_K": 6.5633,
    "Q8_0": 8.5008,
    "F16": 16.0005,
}


@pytest.fixture(scope="module")
def llama_3_8b() -> Any:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_by_arithmetic_are_those_that_llama_cpp_publishes(name: str, llama_3_8b: Any) -> None:
    sizes = compute(llama_3_8b, gguf(name))
    weights = sum(parameter.numel() for parameter in llama_3_8b.parameters())
    assert 8 * sizes.total_bytes / weights == pytest.approx(PUBLISHED[name], abs=6e-5)


def test_a_tied_pair_is_stored_once() -> None:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(SHAPES["llama, tied"])
    model.tie_weights()
    sizes = compute(model, gguf("Q8_0"))
    assert sizes.part_bytes["head"] == 0
    assert sizes.part_bytes["embedding"] == VOCABULARY * 256 * 34 // 32
    assert sizes.part_bytes["other"] == 4 * sum(n for _, n, _ in sizes.left_out)


def test_blocks_are_those_of_the_gguf_package() -> None:
    pytest.importorskip("gguf")
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, kind in TENSOR_TYPES.items():
        known = GGMLQuantizationType[name]
        assert (known.value, *GGML_QUANT_SIZES[known]) == (kind.number, kind.block, kind.bytes)
        assert kind.bits <= 8 * kind.bytes / kind.block


def test_numbers_and_activations_are_those_of_llama_cpp() -> None:
    pytest.importorskip("llama_cpp")
    from methods.llamacpp_engine import library

    class Traits(ctypes.Structure):
        _fields_ = [
            ("from_float", ctypes.c_void_p),
            ("vec_dot", ctypes.c_void_p),
            ("vec_dot_type", ctypes.c_int),
            ("rows", ctypes.c_int64),
        ]

    api = library().api
    for name, file_type in FILE_TYPES.items():
        known = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
        assert getattr(api, known) == file_type.number
    traits = api.llama_cpp._lib.ggml_get_type_traits_cpu
    traits.restype, traits.argtypes = ctypes.c_void_p, (ctypes.c_int,)
    numbers = {name: kind.number for name, kind in TENSOR_TYPES.items()} | {"Q8_1": 9, "Q8_K": 15}
    for kind in TENSOR_TYPES.values():
        found = Traits.from_address(traits(kind.number)).vec_dot_type
        assert found == numbers[kind.activations]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Return file and model of each of SHAPES."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from methods.gguf_export import export

    folder = tmp_path_factory.mktemp("shapes")
    found = {}
    for number, (name, config) in enumerate(SHAPES.items()):
        model = AutoModelForCausalLM.from_config(config)
        export(model, tiny_tokenizer(), folder / f"{number}.gguf", "float32")
        found[name] = (folder / f"{number}.gguf", model)
    return found


def llama_cpp_chooses(path: Path, choice: Choice) -> dict[str, str]:
    """Return tensor name -> type that llama.cpp would store it in, from its own dry run's log."""
    from methods.llamacpp_engine import library

    api = library().api
    lines: list[str] = []
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype, parameters.pure = FILE_TYPES[choice.file_type].number, choice.pure
    parameters.nthread, parameters.dry_run = 1, True
    if choice.output is not None:
        parameters.output_tensor_type = TENSOR_TYPES[choice.output].number
    if choice.embedding is not None:
        parameters.token_embedding_type = TENSOR_TYPES[choice.embedding].number
    if choice.importance:
        # That there is a matrix changes the choice; what it holds does not.
        entries = (api.llama_model_imatrix_data * 2)()
        one = (ctypes.c_float * 1)(1.0)
        entries[0].name, entries[0].data, entries[0].size = b"none", one, 1
        parameters.imatrix = entries
    listen = api.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    api.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        code = api.llama_model_quantize(str(path).encode(), b"unused", ctypes.byref(parameters))
    finally:
        api.llama_log_set(library().callback, ctypes.c_void_p(0))
    assert code == 0
    found = re.findall(
        r"\[ *\d+/ *\d+\] +(\S+) +- \[[^]]*\], type = +(\w+), size = [^\n(]*(?:\((\w+)\))?\n",
        "".join(lines),
    )
    return {name: (after or before).upper() for name, before, after in found}


def differences(path: Path, model: Any, choice: Choice) -> dict[str, tuple[str, str]]:
    """Return tensor -> (planned, llama.cpp's) of the matrices in which the two differ."""
    chosen = llama_cpp_chooses(path, choice)
    shape = shape_of(model)
    wrong = {}
    for name, parameter in model.named_parameters():
        from methods.gguf_names import gguf_name

        tensor = gguf_name(model.config.model_type, name)
        if parameter.ndim == 2 and tensor != "position_embd.weight":
            transposed = model.config.model_type == "gpt2" and tensor.startswith("blk.")
            planned = plan(choice, shape, tensor, parameter.shape[0 if transposed else 1]).type
            if planned != chosen[tensor]:
                wrong[tensor] = (planned, chosen[tensor])
    return wrong


def choices() -> Iterator[Choice]:
    for name in FILE_TYPES:
        for importance in (False, True):
            for pure in (False, True):
                yield Choice(name, pure, importance=importance)


@pytest.mark.parametrize("name", SHAPES)
def test_the_plan_is_llama_cpps_choice(name: str, exported: dict[str, tuple[Path, Any]]) -> None:
    path, model = exported[name]
    for choice in choices():
        # What is garbage without a matrix is never made without one here.
        if choice.importance or not FILE_TYPES[choice.file_type].needs_importance:
            assert differences(path, model, choice) == {}, choice


def test_types_of_the_users_own_are_taken_as_llama_cpp_takes_them(
    exported: dict[str, tuple[Path, Any]],
) -> None:
    untied, tied = "llama, heads shared by four", "llama, tied"
    for name, choice in (
        (untied, Choice("Q4_K_M", output="Q8_0")),
        (untied, Choice("Q4_K_M", output="F16", embedding="Q3_K", pure=True)),
        (untied, Choice("F16", output="Q8_0", embedding="Q4_0")),
        (tied, Choice("Q4_K_M", output="Q5_K")),
        (tied, Choice("Q4_K_M", embedding="Q2_K")),
    ):
        path, model = exported[name]
        assert differences(path, model, choice) == {}, choice
        assert set(llama_cpp_chooses(path, choice).values()) > {"F32"}


def test_a_chosen_type_that_the_rows_do_not_fit_is_refused() -> None:
    shape = Shape(layers=8, sharing=1, tied=False)
    with pytest.raises(ConfigError, match=r"token_embedding_type is Q6_K, whose blocks of 256"):
        plan(Choice("Q8_0", embedding="Q6_K"), shape, "token_embd.weight", 320)
    with pytest.raises(ConfigError, match=r"output_tensor_type is Q8_0, .* not divide .* of 40"):
        plan(Choice("Q8_0", output="Q8_0"), shape, "output.weight", 40)


@pytest.mark.parametrize(
    ("wanted", "width", "stored"),
    [("Q4_K", 256, "Q4_K"), ("Q4_K", 320, "Q5_0"), ("Q3_K", 96, "Q4_0"), ("IQ2_S", 64, "IQ4_NL")],
)
def test_rows_that_are_no_whole_blocks_are_stored_in_smaller_ones(
    wanted: str, width: int, stored: str
) -> None:
    assert fitting(wanted, width) == stored
    assert fitting(wanted, 40) == "F16"
