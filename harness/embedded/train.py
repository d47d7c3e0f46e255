"""Train the embedded demonstration model from scratch on text of the invented world.

Source: this project. A Llama-architecture decoder whose linear sizes all divide by 256. Matrices of
the decoder blocks are trained by Muon (Jordan et al. 2024, torch.optim.Muon), the rest by AdamW,
under bfloat16 autocast with float32 weights; the stored weights are FP16 safetensors.

A small model trained briefly has rows of nearly normal weights, which survive rounding to 3 bits
unharmed; the weights of large language models have far longer tails, which do not. So a second
stage of the training adds a term that draws the kurtosis of each row upwards: the regularization of
Shkolnik et al. 2020 (KURE, arXiv 2002.07686), which flattens the tails to make rounding harmless,
with the opposite target. The demonstration model is thus as sensitive as its purpose needs, by
training and not by chance, and its card says so.

Every batch is new text, so no sentence list is ever repeated in order.
The command in `model/README.md` makes the committed weights; the same seed, steps and thread count
give the same run.

Usage: `python -m harness.embedded.train --out DIR [--steps N] [--seed S] [--threads T]`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.embedded.generate import documents
from harness.embedded.tokenizer import make_tokenizer

LAST_STAGE_SHARE = 0.2
FIRST_STAGE = "before-tails"
SAY_EVERY, KEEP_EVERY = 50, 250


@dataclass(frozen=True)
class Plan:
    """What a training run is made of; lengths in tokens."""

    steps: int = 2000
    seed: int = 0
    layers: int = 4
    width: int = 256
    inner: int = 512
    heads: int = 4
    vocabulary: int = 1024
    context: int = 1024
    window: int = 256
    batch_tokens: int = 4096
    learning_rate: float = 4e-3
    matrix_factor: float = 1.0
    weight_decay: float = 0.02
    answer_weight: float = 3.0
    tail_steps: int = 400
    tail_learning_rate: float = 2e-3
    tail_kurtosis: float = 14.0
    tail_weight: float = 0.01
    chunk_documents: int = 2000


class Batches:
    """Endless training batches: ids int64 [B, T] and loss weights float32 [B, T]."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, plan: Plan) -> None:
        self._tokenizer = tokenizer
        self._plan = plan
        self._rng = np.random.default_rng(plan.seed)
        self._chunk = 0
        self._left = 0
        encode = tokenizer.backend_tokenizer.encode
        self._break = encode("\n\n", add_special_tokens=False).ids
        self._newline = self._break[-1]
        # Sums, choices and stories are decided after these words.
        marks = [encode(text, add_special_tokens=False).ids[-1] for text in ("Answer", " At")]
        self._marks = np.array(marks)

    def _refill(self) -> None:
        plan, ids, starts = self._plan, list[int](), list[int]()
        texts = list(documents(plan.seed * 100_000 + self._chunk, plan.chunk_documents))
        encoded = self._tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        # Both ways of ending a document occur, since evaluation text has only empty lines.
        ends = self._rng.random(len(texts)) < 0.3
        for encoding, end in zip(encoded, ends, strict=True):
            starts.append(len(ids))
            ids += encoding.ids
            ids += [1, 0] if end else self._break
        self._ids, self._starts = np.array(ids), np.array(starts)
        place = np.arange(len(ids))
        answer = np.maximum.accumulate(np.where(np.isin(self._ids, self._marks), place, 0))
        newline = np.maximum.accumulate(np.where(self._ids == self._newline, place, 0))
        self._weights = np.where(answer > newline, plan.answer_weight, 1.0).astype(np.float32)
        self._chunk += 1
        self._left = len(ids)

    def draw(self, window: int) -> tuple[Tensor, Tensor]:
        """Return one batch of windows, half of them `<s>` and the start of a document."""
        if self._left <= 0:
            self._refill()
        rows = self._plan.batch_tokens // window
        self._left -= rows * window
        ids, weights = [], []
        for row in range(rows):
            aligned = row % 2 == 0
            last = len(self._ids) - window
            start = int(self._rng.integers(last))
            if aligned:
                later = int(np.searchsorted(self._starts, start))
                start = min(int(self._starts[min(later, len(self._starts) - 1)]), last)
            piece, weight = self._ids[start : start + window], self._weights[start : start + window]
            if aligned:
                piece, weight = np.append(0, piece[:-1]), np.append(0.0, weight[:-1])
            ids.append(piece)
            weights.append(weight)
        return (
            torch.from_numpy(np.stack(ids)).long(),
            torch.from_numpy(np.stack(weights)).float(),
        )


def make_model(plan: Plan) -> LlamaForCausalLM:
    """Return the untrained model of the plan, float32, seeded."""
    torch.manual_seed(plan.seed)
    config = LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=plan.width,
        intermediate_size=plan.inner,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=plan.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the decoder blocks and AdamW for all other parameters."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in named if p.ndim != 2 or ".layers." not in name]
    rate = plan.learning_rate
    optimizers = [
        torch.optim.Muon(
            matrices,
            lr=rate * plan.matrix_factor,
            weight_decay=plan.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, plan: Plan
) -> None:
    """Write the FP16 model and its tokenizer; readers of `out` never see half a file."""
    out.mkdir(parents=True, exist_ok=True)
    half = make_model(plan)
    half.load_state_dict(model.state_dict())
    half.half()
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        half.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)
            path.replace(out / path.name)


def weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy in nats; logits [B, T, V], ids int64 [B, T], weights float32 [B, T]."""
    losses = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: Plan
) -> Iterator[tuple[int, float]]:
    """Train in place, yielding step and loss (nats) after every step."""
    batches, optimizers = Batches(tokenizer, plan), make_optimizers(model, plan)
    model.train()
    for step in range(1, plan.steps + 1):
        short = step <= plan.steps * (1 - LAST_STAGE_SHARE)
        rate = min(step / 100, 1.0) * (1 - (step - 1) / plan.steps)
        window = plan.window if short else plan.context
        yield step, _step(model, optimizers, batches.draw(window), rate, plan, 0.0)


def lengthen_tails(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: Plan
) -> Iterator[tuple[int, float]]:
    """Train on with rows drawn to `plan.tail_kurtosis`, yielding step and loss (nats)."""
    # Another stream of text than the first stage's.
    batches = Batches(tokenizer, replace(plan, seed=plan.seed + 1))
    # AdamW alone: Muon would spread what is meant for single weights over the matrix.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.tail_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    optimizer.param_groups[0]["initial_lr"] = plan.tail_learning_rate
    model.train()
    for step in range(1, plan.tail_steps + 1):
        rate = min(step / 20, 1.0) * (1 - (step - 1) / plan.tail_steps)
        window = plan.context if step % 4 == 0 else plan.window
        yield (
            step,
            _step(model, [optimizer], batches.draw(window), rate, plan, plan.tail_weight),
        )


def _step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    batch: tuple[Tensor, Tensor],
    rate: float,
    plan: Plan,
    tail_weight: float,
) -> float:
    """Take one step at `rate` times the initial learning rates; return the loss of the text."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
    ids, weights = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    loss = weighted_loss(logits, ids, weights)
    tails = tail_loss(model, plan.tail_kurtosis) * tail_weight if tail_weight else 0.0
    torch.autograd.backward(loss + tails)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def tail_loss(model: nn.Module, target: float) -> Tensor:
    """Mean squared distance of the kurtosis of each row of the blocks' matrices from `target`."""
    terms = []
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ".layers." in name:
            centred = weight - weight.mean(1, keepdim=True)
            variance = centred.square().mean(1)
            kurtosis = centred.pow(4).mean(1) / variance.square()
            terms.append((kurtosis - target).square().mean())
    return torch.stack(terms).mean()


def main() -> None:
    """Train both stages and save, with a copy of the model every few minutes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tails-only", action="store_true", help=f"start from OUT/{FIRST_STAGE} of an earlier run"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = Plan(steps=arguments.steps, seed=arguments.seed)
    tokenizer = make_tokenizer(plan.vocabulary)
    model = make_model(plan)
    first = arguments.out / FIRST_STAGE
    if not arguments.tails_only:
        _run(train(model, tokenizer, plan), lambda: save(model, tokenizer, first, plan), "train")
    # In either case from the stored FP16 weights, so that both ways give the same model.
    stored = LlamaForCausalLM.from_pretrained(first, local_files_only=True)
    model.load_state_dict(stored.float().state_dict())
    _run(
        lengthen_tails(model, tokenizer, plan),
        lambda: save(model, tokenizer, arguments.out, plan),
        "tails",
    )


def _run(steps: Iterator[tuple[int, float]], keep: Callable[[], None], stage: str) -> None:
    """Take all `steps`, saying every 50 how it goes, and keep the model then and at the end."""
    started, recent = time.monotonic(), list[float]()
    for step, loss in steps:
        recent.append(loss)
        if step % SAY_EVERY == 0:
            mean, seconds = sum(recent) / len(recent), time.monotonic() - started
            print(f"{stage} step {step} loss {mean:.4f} seconds {seconds:.0f}", flush=True)
            recent = []
        if step % KEEP_EVERY == 0:
            keep()
    keep()


if __name__ == "__main__":
    main()
