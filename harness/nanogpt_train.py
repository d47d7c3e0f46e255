"""Train a small model of characters from scratch and leave it as karpathy's nanoGPT does.

The recipe is that of nanoGPT's README for a computer without a GPU (4 layers, 4 heads, 128 wide,
64 characters, 12 crops a step, 2000 steps, no dropout): AdamW with betas 0.9 and 0.99, weight decay
0.1 on matrices, 100 steps of warm-up, cosine to a tenth, gradients clipped at 1. The first nine
tenths of the text are trained on, the rest is held out.

Left in `--out`: `ckpt.pt` and `meta.pkl` with the keys that nanoGPT writes, and the two parts of
the text, `train.txt` and `validation.txt`: what `data.calibration` and `data.path` of
`python run.py model=nanogpt data.source=text` want.

Usage: `python -m harness.nanogpt_train --data FILE --out DIR [--steps N] [--threads T] ...`. FILE
is UTF-8 text, or rows with a column `text` (.jsonl, .jsonl.gz, .parquet).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.nanogpt_network import Network, Shape
from harness.nanogpt_vocabulary import write_meta
from harness.rows import ROW_FORMATS, column, read_text
from kernels.errors import ConfigError

TRAINED_SHARE = 0.9
WARM_UP, CLIP, WEIGHT_DECAY, BETAS = 100, 1.0, 0.1, (0.9, 0.99)
LAST_RATE = 0.1
SCORED_CROPS, SAY_EVERY = 200, 250


@dataclass(frozen=True)
class Plan:
    """What a run is made of; `block_size` in characters."""

    steps: int = 2000
    batch: int = 12
    layers: int = 4
    heads: int = 4
    width: int = 128
    block_size: int = 64
    bias: bool = False
    dropout: float = 0.0
    learning_rate: float = 1e-3
    seed: int = 1337

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "layers", "heads", "width", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more")
        if self.width % self.heads:
            raise ConfigError(
                f"--width {self.width} is not divided by --heads {self.heads}; every head has "
                "the same width"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a line up, then a cosine down to a tenth."""
        warm_up = min(WARM_UP, self.steps)
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        share = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * share


def crops(ids: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return `count` random pieces of `length` + 1 ids, int64 [count, length + 1]."""
    starts = torch.randint(0, len(ids) - length, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length + 1)]


def loss_of(network: Network, pieces: Tensor) -> Tensor:
    """Return the mean cross entropy in nats of every id of `pieces` [B, T + 1] but the first."""
    logits = network(pieces[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())


def train(text: str, plan: Plan, out: Path) -> float:
    """Train on `text`, write the four files into `out`, and return the held-out loss in nats.

    Raises:
        ConfigError: the text is too short to be cut.
    """
    at = int(len(text) * TRAINED_SHARE)
    parts = {"train": text[:at], "validation": text[at:]}
    if len(parts["validation"]) <= plan.block_size + 1:
        raise ConfigError(
            f"--data has {len(text)} characters; the last tenth, which is held out, must be "
            f"longer than --block-size {plan.block_size}"
        )
    characters = sorted(set(text))
    known = {character: id for id, character in enumerate(characters)}
    ids = {name: torch.tensor([known[c] for c in part]) for name, part in parts.items()}
    torch.manual_seed(plan.seed)
    shape = Shape(
        plan.layers,
        plan.heads,
        plan.width,
        plan.block_size,
        plan.bias,
        len(characters),
        plan.dropout,
    )
    network = Network(shape)
    optimizer = _fit(network, ids["train"], plan)
    held_out = _held_out(network, ids["validation"], plan)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": asdict(shape),
        "iter_num": plan.steps,
        "best_val_loss": torch.tensor(held_out),
        "config": asdict(plan),
    }
    torch.save(content, out / "ckpt.pt")
    write_meta(characters, out / "meta.pkl")
    for name, part in parts.items():
        (out / f"{name}.txt").write_text(part, encoding="utf-8")
    return held_out


def _fit(network: Network, ids: Tensor, plan: Plan) -> torch.optim.Optimizer:
    """Run all steps, and return the optimizer with its state."""
    generator = torch.Generator().manual_seed(plan.seed)
    parameters = list(network.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=BETAS)
    started = time.monotonic()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        loss = loss_of(network, crops(ids, plan.batch, plan.block_size, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if step % SAY_EVERY == 0:
            taken = time.monotonic() - started
            print(f"step {step} of {plan.steps}: loss {loss.item():.4f}, {taken:.0f} s", flush=True)
    return optimizer


@torch.no_grad()
def _held_out(network: Network, ids: Tensor, plan: Plan) -> float:
    network.eval()
    generator = torch.Generator().manual_seed(plan.seed)
    pieces = crops(ids, SCORED_CROPS, plan.block_size, generator)
    return float(loss_of(network, pieces))


def _read(path: Path) -> str:
    if path.name.endswith(ROW_FORMATS):
        return "\n\n".join(column([path], "text"))
    return read_text(path, "--data")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description="Train a small model of characters.")
    parser.add_argument("--data", type=Path, required=True, help="text, or rows with column text")
    parser.add_argument("--out", type=Path, required=True, help="folder for ckpt.pt and meta.pkl")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name, value in asdict(Plan()).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    data, out, threads = given.pop("data"), given.pop("out"), given.pop("threads")
    torch.set_num_threads(threads)
    try:
        held_out = train(_read(data), Plan(**given), out)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"held-out loss {held_out:.4f} nats a character; {out / 'ckpt.pt'}, {out / 'meta.pkl'}")


if __name__ == "__main__":
    main()
