"""GPTQ and AWQ checkpoints that another program wrote: what they can hold, and taking them over.

Shared by `auto_round` and by the archived libraries (`methods/legacy.py`). GPTQModel runs what they
export (`methods/gptqmodel_engine.py`); the two formats are described in `methods/gptq_format.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods import awq, gptq, gptqmodel_quantize
from methods.artefact import checkpoint_dtype
from methods.base import Matrix
from methods.gptq_format import WORD, Format
from methods.layers import Scope, Selection, is_tied, select
from methods.library import check_covered

GROUP_SIZES: dict[Format, Sequence[int]] = {"gptq": gptq.GROUP_SIZES, "awq": awq.GROUP_SIZES}
"""Format -> the group sizes that GPTQModel runs."""

QWEIGHT = ".qweight"


def check_group_size(owner: str, kind: Format, group_size: int) -> None:
    """Raise ConfigError where GPTQModel does not run `group_size` in format `kind`."""
    gptqmodel_quantize.check_group_size(owner, group_size, GROUP_SIZES[kind])


def select_matrices(
    owner: str, model: nn.Module, kind: Format, group_size: int, keep: Sequence[str] = ()
) -> Selection:
    """Return the linear maps of the decoder blocks of `model` (may be on meta).

    Raises:
        ConfigError: there are experts in stacks, or a shape that the format has no form for; or
            a `keep` pattern matches nothing.
    """
    for matrix in select(model, Scope(keep=tuple(keep))).matrices:
        if matrix.count > 1:
            continue
        if isinstance(model.get_submodule(matrix.name), Conv1D):
            raise ConfigError(
                f"{matrix.name} is a transposed Conv1D, for which {owner} has no form here; "
                "use method=gptq or method=rtn"
            )
        if matrix.in_features % WORD or matrix.out_features % WORD:
            raise ConfigError(
                f"{matrix.name} is {matrix.out_features} x {matrix.in_features}; {owner} packs "
                f"both widths in multiples of {WORD}: use method=rtn"
            )
    return gptqmodel_quantize.select_matrices(model, owner, keep, group_size, GROUP_SIZES[kind])


@dataclass(frozen=True)
class Original:
    """What is kept of the unquantized model; exporters write into its configuration.

    `tied_head` is the name of the head's weight where it is the embedding's, else None.
    """

    config: Any
    generation: Any
    dtype: torch.dtype
    tied_head: str | None

    @staticmethod
    def of(model: Any) -> Original:
        """Return what `model` is, before anything is done to it."""
        tied = None
        if is_tied(model):
            names = {id(module): name for name, module in model.named_modules()}
            tied = f"{names[id(model.get_output_embeddings())]}.weight"
        dtype = checkpoint_dtype(model)
        config, generation = deepcopy(model.config), deepcopy(model.generation_config)
        return Original(config, generation, dtype, tied)


def take(
    owner: str,
    folder: Path,
    original: Original,
    matrices: Sequence[Matrix],
    into: Path,
) -> None:
    """Write the checkpoint in `folder` into folder `into`: one file, floats in their first type.

    The configuration is that of the `original` model with the exporter's `quantization_config`
    added to it; scales stay float16.

    Raises:
        RuntimeError: the checkpoint has other matrices quantized than `matrices`.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    if original.tied_head is not None:
        tensors.pop(original.tied_head, None)
    done = [name.removesuffix(QWEIGHT) for name in tensors if name.endswith(QWEIGHT)]
    check_covered(owner, matrices, done)
    scales = {f"{name}.scales" for name in done}
    stored = {
        name: tensor
        if name in scales or not tensor.is_floating_point()
        else tensor.to(original.dtype)
        for name, tensor in tensors.items()
    }
    save_file(stored, into / "model.safetensors", {"format": "pt"})
    exported = json.loads((folder / "config.json").read_text())
    # GPTQModel reads rules of its own and no other names of spared modules.
    spared = gptqmodel_quantize.keep_rules(artefacts.skeleton(folder), matrices)
    stated = {**exported["quantization_config"], "dynamic": spared}
    original.config.quantization_config = stated
    original.config.save_pretrained(into)
    if original.generation is not None:
        original.generation.save_pretrained(into)
