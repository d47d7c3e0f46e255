"""llama.cpp's importance matrix: how much each input column of a matrix matters.

For each matrix the mean over the calibration tokens of the squares of its inputs, a number for
each column. Rounding then minimizes the squared error of the weights, each weighted by its column's
number. Source: `tools/imatrix/imatrix.cpp` of llama.cpp (`in_sum2` / `counts`), which takes the
matrices of the blocks and, asked to, the head. Inputs here are those of the float32 PyTorch model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError


@torch.no_grad()
def importance(model: Any, calibration: Tensor, modules: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean square of each input column of the named modules: float32 [in], by name.

    `calibration` is int64 [samples, seq_len], a sample a batch; `model` is left as it was. The mean
    of an embedding, whose rows are looked up, is that of the head it is tied to; it is 1 everywhere
    where the head is a matrix of its own.

    Raises:
        ConfigError: an input is NaN or infinite.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    sums: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    watched: dict[str, nn.Module] = {}
    for name in modules:
        module = model.get_submodule(name)
        if module is embedding and head.weight is not embedding.weight:
            means[name] = torch.ones(embedding.weight.shape[1])
        else:
            watched[name] = head if module is embedding else module
    # The head alone reads every position only where its input is wanted.
    kept = 0 if any(module is head for module in watched.values()) else 1
    with ExitStack() as hooks:
        for name, module in watched.items():
            hooks.callback(module.register_forward_pre_hook(_adding(name, sums)).remove)
        for sample in calibration:
            model(input_ids=sample[None], use_cache=False, logits_to_keep=kept)
    for name, total in sums.items():
        means[name] = (total / calibration.numel()).float()
        if not bool(torch.isfinite(means[name]).all()):
            raise ConfigError(
                f"calibration met activations that are NaN or infinite at {name}; "
                "check that the unquantized model gives a finite perplexity"
            )
    return {name: means[name] for name in modules}


def _adding(name: str, sums: dict[str, Tensor]) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        x = inputs[0].detach().flatten(0, -2)
        squares = x.square().sum(0, dtype=torch.float64)
        sums[name] = squares + sums[name] if name in sums else squares

    return hook
