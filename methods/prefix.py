"""A model whose matrices are replaced for a moment, run from the first block that this changes.

What the blocks before a replaced matrix compute does not depend on it. So the hidden states between
the decoder blocks of one window are kept once, the blocks before the replaced one hand on the kept
state instead of computing, and embedding, masks, positions, last norm and head run as the model
runs them, whatever its architecture. A weight is put in as a parameter of its own while its block
runs, and the old parameter, which is never written to, is put back: nothing is copied.

Kept for one window of T tokens: the states [1, T, width] behind each block, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kernels.reference import dequantize_packed
from methods.layers import decoder_blocks, stack_is_transposed
from methods.linear import QuantizedModule


def dense(module: nn.Module) -> Tensor:
    """Return the weight of a packed module, dequantized in float32: [out, in], [count, out, in].

    Raises:
        TypeError: it is no `methods.linear.QuantizedModule`.
    """
    if not isinstance(module, QuantizedModule):
        raise TypeError(f"a {type(module).__name__} has no packed weight to dequantize")
    layout = module.layout
    return dequantize_packed(*module.stored(), layout.bits, layout.group_size, layout.in_features)


class Prefixed:
    """Runs `model` (in eval mode) on windows, from any of its decoder blocks on.

    Attributes:
        blocks: how many there are.
        forwards: calls of a block so far, one window each.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prefix, self._blocks = decoder_blocks(model)
        self.blocks = len(self._blocks)
        self.forwards = 0
        # What each block returns beside the hidden state, which a block that is left out repeats.
        self._tuples = [False] * self.blocks

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that holds the matrix `name`; None outside of them."""
        head, _, rest = name.partition(f"{self.prefix}.")
        number = rest.partition(".")[0]
        return int(number) if not head and number.isdecimal() else None

    def entry(self, names: Sequence[str]) -> int:
        """Return the first block that has to run where the matrices `names` are replaced.

        0 for the embedding, the number of blocks for the head alone, or for no matrix at all.
        """
        found = [self.blocks]
        for name in names:
            block = self.block_of(name)
            if block is not None:
                found.append(block)
            elif self.model.get_submodule(name) is self.model.get_input_embeddings():
                found.append(0)
        return min(found)

    @torch.no_grad()
    def reference(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits [B, T, V] of int64 [B, T], and states [B, T, width] behind each block."""
        states: list[Tensor] = []

        def keep(number: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(block: nn.Module, given: Any, output: Any) -> None:
                self._tuples[number] = isinstance(output, tuple)
                states.append(output[0] if isinstance(output, tuple) else output)

            return hook

        hooks = [b.register_forward_hook(keep(i)) for i, b in enumerate(self._blocks)]
        try:
            logits = self._logits(ids)
        finally:
            for hook in hooks:
                hook.remove()
        self.forwards += self.blocks * len(ids)
        return logits, states

    @torch.no_grad()
    def resume(
        self, ids: Tensor, states: Sequence[Tensor], start: int, replaced: Mapping[str, nn.Module]
    ) -> Tensor:
        """Return the logits of `ids` with the matrices `replaced`, computed from block `start` on.

        `states` are those of `reference` for the same `ids`; `start` is at most `entry(replaced)`.
        """
        with self._handing_on(states, start), self._replacing(replaced):
            logits = self._logits(ids)
        self.forwards += (self.blocks - start) * len(ids)
        return logits

    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()

    @contextmanager
    def _handing_on(self, states: Sequence[Tensor], start: int) -> Iterator[None]:
        """Let the blocks before `start` return the kept states.

        Their `forward` is hidden behind one of the instance, since models slice their list of
        blocks and read attributes of a block (`attention_type`) before they call it.
        """

        def stub(number: int) -> Callable[..., Any]:
            def forward(*given: Any, **named: Any) -> Any:
                # A copy: a block may write into what it is given.
                state = states[number].clone()
                return (state,) if self._tuples[number] else state

            return forward

        hidden = [(block, vars(block).get("forward")) for block in self._blocks[:start]]
        try:
            for number, (block, _) in enumerate(hidden):
                vars(block)["forward"] = stub(number)
            yield
        finally:
            for block, own in hidden:
                if own is None:
                    vars(block).pop("forward", None)
                else:
                    vars(block)["forward"] = own

    @contextmanager
    def _replacing(self, replaced: Mapping[str, nn.Module]) -> Iterator[None]:
        """Put the weights of `replaced` in while the block, or the end, that holds them runs.

        One block's weights are there at a time; a tied head keeps its own while the embedding is
        replaced.
        """
        holders: dict[int, tuple[nn.Module, dict[str, nn.Module]]] = {}
        for name, module in replaced.items():
            block = self.block_of(name)
            holder = self.model.get_submodule(name) if block is None else self._blocks[block]
            holders.setdefault(id(holder), (holder, {}))[1][name] = module
        kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []

        def put_in(members: Mapping[str, nn.Module]) -> Callable[[nn.Module, Any], None]:
            def hook(holder: nn.Module, given: Any) -> None:
                for name, module in members.items():
                    owner, attribute = self._place(name)
                    old = owner._parameters[attribute]
                    kept.append((owner, attribute, old))
                    owner._parameters[attribute] = _like(cast(nn.Parameter, old), owner, module)

            return hook

        def put_back(*of_hook: Any) -> None:
            while kept:
                owner, attribute, old = kept.pop()
                owner._parameters[attribute] = old

        hooks = []
        try:
            for holder, members in holders.values():
                hooks.append(holder.register_forward_pre_hook(put_in(members)))
                hooks.append(holder.register_forward_hook(put_back))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            put_back()

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that owns the parameter of the matrix `name`, and its name there."""
        parent, _, attribute = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        target = getattr(owner, attribute)
        return (target, "weight") if isinstance(target, nn.Module) else (owner, attribute)


def _like(old: nn.Parameter, owner: nn.Module, module: nn.Module) -> nn.Parameter:
    """Return the weight of the packed `module` in type, device and orientation of `old`."""
    weight = dense(module)
    if isinstance(owner, Conv1D):
        weight = weight.T
    elif weight.ndim == 3 and stack_is_transposed(owner):
        weight = weight.transpose(1, 2)
    if weight.shape != old.shape:
        raise ValueError(f"a weight {tuple(weight.shape)} cannot stand for {tuple(old.shape)}")
    return nn.Parameter(torch.empty_like(old).copy_(weight), requires_grad=False)
