"""Tiny models of widths that the GPTQ and AWQ formats can pack, and what their tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from methods.base import Calibration, QuantizeReport
from methods.gptq_format import PARTS
from tests.architectures import BOS_ID, VOCABULARY, tiny_tokenizer

WIDTH = 64
CALIBRATION = Calibration(samples=12, seq_len=48, seed=0)
WEIGHTS = "model.safetensors"

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": BOS_ID, "eos_token_id": BOS_ID}
_BLOCKS = {
    **_TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BLOCKS,
    "llama_gqa": {**_BLOCKS, "num_attention_heads": 4, "head_dim": 32},
    "llama_tied": {**_BLOCKS, "tie_word_embeddings": True},
    "qwen2": {**_BLOCKS, "tie_word_embeddings": True},
    "mixtral": {**_BLOCKS, "num_local_experts": 4},
    "gpt_neox": _BLOCKS,
    "gpt2": {**_TOKENS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def build(kind: str, dtype: torch.dtype = torch.float16) -> Any:
    """Return a float32 model whose checkpoint is in `dtype`; hidden states are correlated.

    Inputs of a layer that are independent of each other leave GPTQ nothing to make up with.
    """
    config = CONFIG_MAPPING[kind.partition("_")[0] if kind != "gpt_neox" else kind]
    model: Any = AutoModelForCausalLM.from_config(config.from_dict(dict(CONFIGS[kind])))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * 0.1 if parameter.ndim > 1 else 1 + 0.2 * drawn)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.sub_(1)
        embedding = model.get_input_embeddings().weight
        few = torch.randn((VOCABULARY, 8), generator=generator)
        mixed = few @ torch.randn((8, WIDTH), generator=generator)
        # Some channels are much larger than others, as in real models.
        loud = torch.logspace(-1, 1, WIDTH)[torch.randperm(WIDTH, generator=generator)]
        embedding.copy_((mixed + 0.3 * embedding) * loud * 0.1)
    model = model.eval().to(dtype).float()
    model.config.dtype = dtype
    return model


def calibration_text() -> Tensor:
    """Return int64 [12, 48]."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (CALIBRATION.samples, 48), generator=generator)


def quantized(method: Any, kind: str, folder: Path, **options: Any) -> QuantizeReport:
    """Quantize model `kind` with `method` into `folder`."""
    report: QuantizeReport = method.quantize(
        build(kind, **options), tiny_tokenizer(), calibration_text(), folder
    )
    return report


def parts_of(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the stored tensors of matrix `name`."""
    tensors = load_file(folder / WEIGHTS)
    return {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}


def stored_bits(folder: Path, report: QuantizeReport) -> int:
    """Return the bits on disk of the matrices of `report`, biases left out."""
    own = {matrix.name for matrix in report.quantized}
    return sum(
        8 * tensor.nbytes
        for name, tensor in load_file(folder / WEIGHTS).items()
        if name.rpartition(".")[0] in own and not name.endswith(".bias")
    )


def spoil(folder: Path, name: str) -> None:
    """Turn the bits of tensor `name` in `folder`."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = tensors[name].bitwise_not()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Return float32 logits [B, T, V]."""
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result.float()


@torch.no_grad()
def inputs_of(model: Any, name: str, ids: Tensor) -> Tensor:
    """Return float32 inputs [tokens, in] of module `name` while `model` reads `ids`."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].flatten(0, -2).clone())
    )
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return torch.cat(seen)
