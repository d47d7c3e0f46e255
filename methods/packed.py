"""Artefacts of packed modules: loading them, and holding the packed path against the plain one.

A method that stores its weights as `methods.linear` has them needs no more than this to be
deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from methods import artefact as artefacts
from methods.base import Engine, Hardware, KernelUse
from methods.decode import fast_decode
from methods.encoder_engine import engine_of
from methods.encoders import is_encoder
from methods.engine import TorchEngine, relative_difference
from methods.fused import fuse, told
from methods.linear import QuantizedModule, empty

PATH_TOLERANCE = 0.05
"""Largest difference of the logits of the two paths, root mean square over that of the logits. The
packed kernels round activations, results and some scales to bfloat16: 0.004 to 0.02 (the most where
an expert is routed otherwise). A wrong nibble order or zero point gives 1 and more."""

DECODED_TOKENS = 4
"""Tokens that are fed one at a time, so that the kernels of one row are seen."""


class PathDisagreementError(RuntimeError):
    """The packed kernels do not compute what the stored weights say."""


@dataclass(frozen=True)
class PathComparison:
    """Relative differences of the logits of packed and dequantized weights."""

    prefill: float
    decode: float
    tolerance: float


def load_engine(
    artefact: Path,
    hardware: Hardware,
    packed: bool = True,
    build: Callable[[artefacts.Facts], QuantizedModule] = empty,
    others: Sequence[KernelUse] = (),
) -> Engine:
    """Load an artefact for `hardware`; `packed=False` dequantizes every matrix at each call.

    `build` makes the empty module of each layer from its facts; `others` are matrices in the
    method's scope that are stored in floating point. Where every matrix is dequantized
    the model itself decodes, too: the packed path is held against it.

    Raises:
        ConfigError: a packed kernel refuses a matrix and `hardware` allows no fallback.
    """
    dtype = getattr(torch, hardware.compute_dtype)
    model = artefacts.load(artefact, lambda name, facts: build(facts), dtype, hardware.device)
    # A launch costs as much as a small matrix on a card; the C code shares activations anyway.
    groups = fuse(model) if packed and hardware.device == "cuda" else []
    uses = list(others)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            module.prepare(name, hardware, packed)
            uses.append(module.use(name))
    if not packed or is_encoder(model):
        return engine_of(model, hardware.device, told(uses, groups))
    fast, remark = fast_decode(model, hardware)
    return TorchEngine(model, hardware.device, told(uses, groups), fast=fast, remark=remark)


def compare_paths(
    packed: Engine, dequantized: Engine, input_ids: Tensor, tolerance: float
) -> PathComparison:
    """Compare two engines of one artefact on int64 `input_ids` [B, T], T above `DECODED_TOKENS`.

    The last `DECODED_TOKENS` tokens are decoded one by one behind a prefill of the others.

    Raises:
        PathDisagreementError: the logits of prefill or decode differ by more than `tolerance`.
    """
    split = input_ids.shape[1] - DECODED_TOKENS
    one, other = (_logits(engine, input_ids, split) for engine in (packed, dequantized))
    comparison = PathComparison(
        prefill=relative_difference(one[0], other[0]),
        decode=relative_difference(one[1], other[1]),
        tolerance=tolerance,
    )
    for stage, difference in (("prefill", comparison.prefill), ("decode", comparison.decode)):
        # Written so that NaN, too, is a disagreement.
        if not difference <= tolerance:
            raise PathDisagreementError(
                f"{stage}: logits of the packed and the dequantized weights differ by "
                f"{difference:.3g} of their size; {tolerance:.3g} is tolerated"
            )
    return comparison


def _logits(engine: Engine, input_ids: Tensor, split: int) -> tuple[Tensor, Tensor]:
    prefill, cache = engine.prefill(input_ids[:, :split])
    steps = []
    for position in range(split, input_ids.shape[1]):
        logits, cache = engine.decode(input_ids[:, position : position + 1], cache)
        steps.append(logits)
    return prefill, torch.cat(steps, dim=1)
