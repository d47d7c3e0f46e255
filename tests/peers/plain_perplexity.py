"""Perplexity and divergence of one checkpoint, as a script written for that alone has them.

The other side of `tests.peers.sweep_cost`: transformers, windows without overlap, cross entropy,
and the KL divergence from the unquantized model's logits. One forward a window serves both figures.
The unquantized model's logits are computed once by `--keep` and read from a file from then on,
which is the cheaper way. Nothing of the project is imported.

`python -m tests.peers.plain_perplexity FOLDER ROWS --windows N (--keep | --reference) FILE`
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print one line of JSON: `perplexity`, and `kl` in nats (null with `--keep`)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=Path, help="WikiText-2 test, .jsonl.gz with a column text")
    parser.add_argument("--windows", type=int, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--keep", type=Path, help="where the logits of this model go")
    which.add_argument("--reference", type=Path, help="logits to compare with")
    asked = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    model = AutoModelForCausalLM.from_pretrained(asked.folder, dtype=torch.float32).eval()
    with gzip.open(asked.rows, "rt", encoding="utf-8") as rows:
        text = "\n\n".join(json.loads(row)["text"] for row in rows)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    length = min(2048, model.config.max_position_embeddings)
    windows = ids[:, : asked.windows * length].reshape(-1, 1, length)
    shape = (len(windows), length - 1, model.config.vocab_size)
    kept = np.memmap(
        asked.keep or asked.reference, np.float32, "w+" if asked.keep else "r", shape=shape
    )
    loss = divergence = 0.0
    with torch.inference_mode():
        for index, window in enumerate(windows):
            logits = model(window).logits[0, :-1].float()
            found = functional.log_softmax(logits, -1)
            loss += float(functional.nll_loss(found, window[0, 1:], reduction="sum"))
            if asked.keep:
                kept[index] = logits.numpy()
                continue
            expected = functional.log_softmax(torch.from_numpy(np.array(kept[index])), -1)
            divergence += float(
                functional.kl_div(found, expected, log_target=True, reduction="sum")
            )
    count = len(windows) * (length - 1)
    kl = None if asked.keep else divergence / count
    print(json.dumps({"perplexity": math.exp(loss / count), "kl": kl}))


if __name__ == "__main__":
    main()
