"""What the fork server imports once a sweep, so that no cell pays for it.

Imports only: no tensor is made, no thread pool started, no CUDA touched, or children could not
be forked safely. A method's own library is imported by the child that needs it.
"""

# ruff: noqa: E402  # what libraries say at import is silenced first

from __future__ import annotations

import gc
import logging
import threading

# Optional libraries tell at import what they lack; that is of no use to whoever runs a sweep.
logging.disable(logging.WARNING)

import accelerate  # noqa: F401
import lm_eval.evaluator
import lm_eval.tasks  # noqa: F401
import torch
import torch._dynamo  # the first call of an op of ours would import it, a second or two each cell
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401
from tqdm import tqdm

import harness.measure
import harness.measures.lm_eval_model
import harness.quantize
import harness.reference  # noqa: F401

logging.disable(logging.NOTSET)
# Its default lock is shared between processes, which a child that ends at once never gives back.
tqdm.set_lock(threading.RLock())
# Objects alive now are never collected in a child, so their pages stay shared.
gc.freeze()


def limit_threads(threads: int) -> None:
    """Let torch use `threads` CPU threads in this process."""
    torch.set_num_threads(threads)
