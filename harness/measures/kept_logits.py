"""The unquantized model's logits, kept small: last hidden states and the head that reads them.

Logits of a long text would take tens of gigabytes; the hidden states in front of the output matrix
are smaller by vocabulary over hidden size, and the matrix is kept once. A window whose logits the
matrix does not rebuild (a model that caps or scales them afterwards) is kept as logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.context import Context, ReferenceMissingError
from harness.measures.windows import Windows, logit_pieces, row_slices
from kernels.errors import ConfigError
from methods.base import Engine
from methods.engine import TorchEngine

HEAD_KIND = "head"
WINDOW_KIND = "window"
FLOAT32_TOLERANCE = 1e-5


@dataclass(frozen=True)
class KeptLogits:
    """Reads the kept logits of the windows of one text.

    `head` is None where no window was kept as hidden states.
    """

    context: Context
    windows: Windows
    head: dict[str, Tensor] | None

    @classmethod
    def of(cls, context: Context, windows: Windows, device: torch.device) -> KeptLogits:
        """Open what `keep_logits` wrote.

        Raises:
            ReferenceMissingError: it is not there, or damaged.
        """
        head = context.reference(HEAD_KIND, None)
        moved = {name: tensor.to(device) for name, tensor in head.items()}
        return cls(context, windows, moved or None)

    def window(self, index: int) -> dict[str, Tensor]:
        """Return the entry of window `index`: `hidden` [T, H] or `logits` [T, V]."""
        return self.context.reference(WINDOW_KIND, _window_key(self.windows, index))

    def logits(self, entry: dict[str, Tensor], part: slice, device: torch.device) -> Tensor:
        """Return float32 logits [n, V] of the positions `part` of a window's entry."""
        if "logits" in entry:
            return entry["logits"][part].to(device)
        if self.head is None:
            raise ReferenceMissingError("the head of the unquantized model is not in the cache")
        return _apply_head(entry["hidden"][part].to(device), self.head)


def keep_logits(reference: Engine, context: Context, windows: Windows) -> None:
    """Write what rebuilds the reference's logits on every window, where it is not there yet.

    Raises:
        ConfigError: the unquantized model's own logits are not finite.
    """
    head = _head_of(reference)
    kept = context.keep_reference(HEAD_KIND, None, lambda: {} if head is None else _tensors(head))
    for index, ids in enumerate(windows.ids):
        build = partial(_window, reference, head, kept, ids)
        context.keep_reference(WINDOW_KIND, _window_key(windows, index), build)


def _window_key(windows: Windows, index: int) -> list[Any]:
    return [windows.digest, windows.length, index]


def _head_of(engine: Engine) -> nn.Linear | None:
    if not isinstance(engine, TorchEngine):
        return None
    head = engine.model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None


def _tensors(head: nn.Linear) -> dict[str, Tensor]:
    tensors = {"weight": head.weight.detach().cpu()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu()
    return tensors


def _apply_head(hidden: Tensor, head: dict[str, Tensor]) -> Tensor:
    return functional.linear(hidden, head["weight"], head.get("bias")).float()


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what `module` is called with."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    try:
        yield inputs
    finally:
        handle.remove()


def _window(
    reference: Engine, head: nn.Linear | None, kept: dict[str, Tensor], ids: Tensor
) -> dict[str, Tensor]:
    """Return `hidden` [T, H] of int64 `ids` [T], or `logits` [T, V] where they do not rebuild."""
    if head is None:
        return {"logits": torch.cat([piece for _, piece in _pieces(reference, ids)])}
    on_device = {name: tensor.to(head.weight.device) for name, tensor in kept.items()}
    hidden: list[Tensor] = []
    with _inputs_of(head) as inputs:
        for _, piece in _pieces(reference, ids):
            if not _rebuilds(inputs[-1][0], on_device, piece):
                break
            hidden.append(inputs.pop()[0].cpu())
        else:
            return {"hidden": torch.cat(hidden)}
    return _window(reference, None, kept, ids)


def _pieces(reference: Engine, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start, logits in logit_pieces(reference, ids[None], 0):
        if not bool(torch.isfinite(logits).all()):
            raise ConfigError(
                "the unquantized model's logits hold NaN or infinity, so nothing can be compared "
                "with them; the checkpoint is broken, or needs another reference_dtype"
            )
        yield start, logits[0].cpu()


def _rebuilds(hidden: Tensor, head: dict[str, Tensor], logits: Tensor) -> bool:
    """Whether `head` over `hidden` [n, H] gives `logits` [n, V], up to rounding."""
    tolerance = max(FLOAT32_TOLERANCE, 2 * torch.finfo(hidden.dtype).eps)
    if hidden.shape[0] != logits.shape[0]:
        return False
    worst = 0.0
    for part in row_slices(*logits.shape):
        difference = _apply_head(hidden[part], head).cpu() - logits[part]
        worst = max(worst, float(difference.abs().max()))
    return worst <= tolerance * max(1.0, float(logits.abs().max()))
