"""An encoder as an ONNX graph, and that graph run by ONNX Runtime.

Inputs: `input_ids` and `attention_mask`, int64 [B, T]. Outputs: `last_hidden_state` float32
[B, T, H], and where the model has a masked-language head `logits` [B, T, V]. Everything else is as
in `methods.onnx_export`; what no output needs (a pooler) is not in the graph.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import KernelUse
from methods.encoder_engine import NoNextToken
from methods.encoders import EMBED, FILL, MEAN, MEMORY, POOLING, kind_of, pool
from methods.onnx_graph import read_facts, tensor_bytes

IDS, MASK = "input_ids", "attention_mask"
HIDDEN, LOGITS = "last_hidden_state", "logits"
EXAMPLE = (2, 5)
"""Sequences and tokens that the graph is traced with: neither is 1, which would be taken as
fixed."""


class Encoded(nn.Module):
    """`model` as a function of tokens and mask, with the head's logits where it `fills`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.fills = kind_of(model.config) == "masked"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return hidden states [B, T, H], and logits [B, T, V] where there is a head."""
        if not self.fills:
            return (self.model(input_ids, attention_mask).last_hidden_state,)
        found = self.model(input_ids, attention_mask, output_hidden_states=True)
        return found.hidden_states[-1], found.logits


def tracing(model: Encoded) -> dict[str, Any]:
    """Return what `torch.onnx.export` is told of `model`: arguments, names and open sizes."""
    ids = torch.zeros(EXAMPLE, dtype=torch.int64)
    mask = torch.ones_like(ids)
    # A mask without a zero would be taken as none.
    mask[0, -1] = 0
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    return {
        "args": (ids, mask),
        "input_names": [IDS, MASK],
        "output_names": [HIDDEN, LOGITS] if model.fills else [HIDDEN],
        "dynamic_shapes": (sizes, sizes),
    }


class OnnxEncoder(NoNextToken):
    """Runs a session of an encoder's graph over padded batches."""

    def __init__(self, session: Any, device: str, artefact: Path) -> None:
        self.session = session
        self.device = device
        self.artefact = artefact
        self.facts = read_facts(artefact)
        self.uses: list[KernelUse] = []
        self.couples_rows = False
        self.reads_stored = True
        self._fills = LOGITS in [one.name for one in session.get_outputs()]
        config = json.loads((artefact / "config.json").read_text())
        self._pooling = config.get(POOLING) or MEAN

    @property
    def capabilities(self) -> frozenset[str]:
        """Embeddings; masked positions where the graph has the head."""
        return frozenset({EMBED, MEMORY, FILL} if self._fills else {EMBED, MEMORY})

    @property
    def runtime(self) -> str:
        """ONNX Runtime."""
        return "onnxruntime"

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.facts.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens the model takes at once."""
        return self.facts.context_length

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read int64 [B, T] and its mask; return the last hidden states, float32 [B, T, H]."""
        return self._run(HIDDEN, input_ids, attention_mask)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read the same; return float32 [B, H], pooled as the model says."""
        return pool(self.encode(input_ids, attention_mask), attention_mask, self._pooling)

    def fill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read the same; return float32 logits [B, T, V]."""
        return self._run(LOGITS, input_ids, attention_mask)

    def first_run(self) -> None:
        """Read one token, so that the session's profile has every matrix."""
        token = torch.zeros(1, 1, dtype=torch.int64)
        self._run(LOGITS if self._fills else HIDDEN, token, torch.ones_like(token))

    def _run(self, output: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        feeds = {IDS: input_ids.cpu().numpy(), MASK: attention_mask.cpu().numpy()}
        return torch.from_numpy(self.session.run([output], feeds)[0])

    def stored_bytes(self) -> dict[str, int]:
        """Return the bytes of each tensor of the graph, from its description."""
        return tensor_bytes(self.artefact)

    def kernels(self) -> list[KernelUse]:
        """Return what runs each matrix."""
        return list(self.uses)

    def close(self) -> None:
        """Drop the session and with it the weights."""
        self.session = None
