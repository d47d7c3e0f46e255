"""What the methods that call a quantization library share.

A library is imported inside the method that needs it, so that only its cells pay for it, and asked
for first (`require`), so that where it is missing one sentence says how to install it. What a
library writes is a folder in Hugging Face layout (`config.json` with a `quantization_config`,
safetensors files): it can be deployed as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from kernels.errors import ConfigError
from methods.artefact import checkpoint_dtype
from methods.base import Execution, KernelUse, Matrix
from methods.layers import bias_of, replace, weight_of


def require(package: str, owner: str, distribution: str | None = None) -> None:
    """Raise ConfigError with the command that installs `package` where it cannot be imported.

    `package` is the module's name, `distribution` what pip calls it where that is another. Called
    when a cell is about to use it, so that a missing optional library costs its own cells only.
    """
    if find_spec(package) is None:
        wanted = distribution or package
        raise ConfigError(
            f"{owner} needs the package {wanted}, which is not installed here; install it: "
            f"python -m pip install --constraint constraints.txt {wanted}"
        )


def whole_maps_only(owner: str) -> str:
    """Return why a library leaves stacks of experts alone, for `methods.layers.select_linears`."""
    return f"stack of experts: {owner} takes whole linear maps"


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the progress bars of transformers off standard error."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def write_checkpoint(model: Any, tokenizer: Any, into: Path) -> torch.dtype:
    """Write `model`, changed to its checkpoint's own floating type, for a library that reads files.

    Returns that type. `into` becomes a folder in Hugging Face layout, unquantized.
    """
    dtype = checkpoint_dtype(model)
    model.to(dtype).save_pretrained(into)
    if tokenizer is not None:
        tokenizer.save_pretrained(into)
    return dtype


def drop_weights(model: nn.Module) -> None:
    """Free the weights of `model`, which a library has read again from files."""
    model.to("meta")


def put_linear(model: nn.Module, matrix: Matrix, weight: Tensor, bias: Tensor | None) -> None:
    """Put an `nn.Linear` of floating `weight` [out, in] where `matrix` is."""
    linear = nn.Linear(
        matrix.in_features, matrix.out_features, bias=bias is not None, device="meta"
    )
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    replace(model, matrix, linear)


def linears_only(model: nn.Module, matrices: Iterable[Matrix]) -> None:
    """Put an `nn.Linear` for each transposed Conv1D (GPT-2), the only kind most libraries know."""
    for matrix in matrices:
        if matrix.role == "embedding" or matrix.count > 1:
            continue
        if not isinstance(model.get_submodule(matrix.name), nn.Linear):
            put_linear(model, matrix, weight_of(model, matrix), bias_of(model, matrix))


def uses_of(
    model: nn.Module, matrices: Sequence[Matrix], kernel: str, execution: Execution
) -> list[KernelUse]:
    """Return one KernelUse a matrix, all run by `kernel`; the layer class is read off `model`."""
    return [
        KernelUse(
            matrix.name,
            type(model.get_submodule(matrix.name)).__name__,
            kernel,
            execution,
            matrix.weights,
        )
        for matrix in matrices
    ]


def check_covered(owner: str, wanted: Iterable[Matrix], found: Iterable[str]) -> None:
    """Raise RuntimeError where a library quantized other modules than it was asked to.

    A layer that a library skips without a word would be measured as if it were quantized.
    """
    asked, done = {matrix.name for matrix in wanted}, set(found)
    if asked == done:
        return
    parts = [
        f"{what} {len(names)} ({', '.join(sorted(names)[:3])})"
        for what, names in (("skipped", asked - done), ("added", done - asked))
        if names
    ]
    raise RuntimeError(f"{owner} did not quantize the matrices it was asked to: {'; '.join(parts)}")
