"""A stand-in for nanoGPT's model.py: its two names and calls over this project's network.

Put beside listings as `model.py`. Defaults are those of GPT-2 with nanoGPT's padded vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from harness.nanogpt_network import Network, Shape


@dataclass
class GPTConfig:
    """What nanoGPT's configuration holds."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(torch.nn.Module):
    """The network with nanoGPT's calls; its parameters bear nanoGPT's names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        network = Network(Shape(**asdict(config)))
        self.transformer, self.lm_head = network.transformer, network.lm_head
        self.config = config

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits, of the last position alone without `targets`, and the loss."""
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"].children():
            x = block(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int) -> Tensor:
        """Return `ids` with `max_new_tokens` drawn ones behind them."""
        for _ in range(max_new_tokens):
            logits = self(ids[:, -self.config.block_size :])[0][:, -1] / temperature
            best = torch.topk(logits, min(top_k, logits.shape[-1]))
            drawn = torch.multinomial(best.values.softmax(-1), 1)
            ids = torch.cat([ids, best.indices.gather(-1, drawn)], 1)
        return ids
