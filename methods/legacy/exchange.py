"""What the scripts of this folder share: reading a job, and proof that the model is the same here.

They run under the interpreter of `make legacy-env` (transformers 4.51.3), know nothing of this
project, and talk to it by files only. A job is a JSON file:

- `checkpoint`: folder with the float model in Hugging Face layout;
- `inputs`: safetensors file with `tokens`, int64 [samples, seq_len], and `logits`, float32 [T, V]:
  what the newer transformers, which wrote the checkpoint, gets for the first T tokens of sample 0;
- `output`: folder to write; `threads`: of PyTorch; `seed`; `options`: the library's own.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file

TOLERANCE = 0.005
"""Largest difference of the logits, root mean square over theirs. Both are computed in float32:
1e-6 seen, up to 1e-3 where a float32 checkpoint is read as float16. Rotary embeddings with another
theta gave 0.07 to 0.3 in tiny random models."""


def read_job() -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return (job, tokens, logits) of the job file named on the command line; seed everything."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    inputs = load_file(job["inputs"])
    torch.set_num_threads(job["threads"])
    random.seed(job["seed"])
    numpy.random.seed(job["seed"])  # the libraries use the global one
    torch.manual_seed(job["seed"])
    return job, inputs["tokens"], inputs["logits"]


@torch.no_grad()
def check_same_model(model: Any, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise ValueError where `model` is another function here than where it comes from.

    The two versions of transformers read one configuration, and the older one ignores what it does
    not know.
    """
    device = next(model.parameters()).device
    ids = tokens[:1, : expected.shape[0]].to(device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    difference = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    # Written so that NaN, too, is a difference.
    if not difference <= TOLERANCE:
        raise ValueError(
            f"transformers 4.51.3 reads this model otherwise than the version that wrote it: the "
            f"logits differ by {difference:.2g} of their size"
        )
