"""Sizes by arithmetic alone: what a method would store of a model that need not be here.

The model is on the meta device, so 70 B parameters cost nothing. Matrices that the method covers
count the bits it states for them; everything else counts in the floating type the method leaves it
in; tied parameters count once. Metadata (file headers, config.json, tokenizer) does not count.

As the child of a cell with `suite=size_only`, `main` writes the cell's record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from torch import nn

from harness.hardware import Hardware
from harness.launch import Stage
from harness.load import meta_model, model_facts
from harness.measure import Progress
from harness.models import ModelSource
from harness.record import Value
from methods.artefact import checkpoint_dtype
from methods.base import ForeseeingMethod, Matrix, Method
from methods.layers import Scope, select
from methods.unquantized import DTYPES

PROTOCOL = "computed"

Part = Literal["quantized", "head", "embedding", "other"]


@dataclass(frozen=True)
class Sizes:
    """Stored sizes of one model under one method.

    Attributes:
        quantized: the matrices that the method covers.
        quantized_bits: all bits stored for them, scales, zero points and indices included.
        part_bytes: stored bytes of the covered block matrices, of head and embedding (covered or
            not), and of the rest, as `harness.measures.size` splits a real artefact.
        left_out: (name, weights, reason) of every parameter the method does not cover.
    """

    quantized: tuple[Matrix, ...]
    quantized_bits: int
    part_bytes: dict[Part, int]
    left_out: tuple[tuple[str, int, str], ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(self.part_bytes.values())

    @property
    def quantized_weights(self) -> int:
        """Weights of the covered matrices."""
        return sum(matrix.weights for matrix in self.quantized)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the covered matrices over their weights."""
        return self.quantized_bits / self.quantized_weights


def compute(model: Any, method: Method) -> Sizes:
    """Return what `method` stores of `model` (a transformers causal LM, may be on meta).

    Raises:
        ConfigError: the method refuses a matrix (a width that its groups do not divide).
    """
    covered, left_out = method.select(model)
    # A method may store another shape than it is given: a student of fewer blocks.
    model = getattr(method, "handed_on", lambda same: same)(model)
    bits = {matrix.name: method.stored_bits(matrix) for matrix in covered}
    parts: dict[Part, int] = {"quantized": 0, "head": 0, "embedding": 0, "other": 0}
    for matrix in covered:
        parts[_part(matrix)] += math.ceil(bits[matrix.name] / 8)
    gone = {_parameter(model, matrix) for matrix in covered}
    everything = select(model, Scope(head=True, embeddings=True)).matrices
    ends = {_parameter(model, m): _part(m) for m in everything if m.role != "block"}
    dtype = _rest_dtype(model, method)
    tensors = model.state_dict(keep_vars=True)
    # An uncovered user of a tied parameter keeps it, since the covered one has a copy of its own;
    # except with a method that stores the pair once.
    keeps_ties = getattr(method, "keeps_ties", False)
    seen = {id(tensors[name]) for name in gone} if keeps_ties else set()
    for name, tensor in tensors.items():
        if name in gone or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        size = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
        parts[ends.get(name, "other")] += tensor.numel() * size
    return Sizes(tuple(covered), sum(bits.values()), parts, tuple(left_out))


def _part(matrix: Matrix) -> Part:
    return "quantized" if matrix.role == "block" else matrix.role


def _parameter(model: nn.Module, matrix: Matrix) -> str:
    """Return the name in the state dictionary of the parameter that holds `matrix`."""
    parent, _, attribute = matrix.name.rpartition(".")
    own = model.get_submodule(parent)._parameters
    return matrix.name if attribute in own else f"{matrix.name}.weight"


def _rest_dtype(model: Any, method: Method) -> torch.dtype:
    """Return the floating type of what `method` does not cover: its own, or the checkpoint's."""
    own = getattr(method, "rest_dtype", None)
    return checkpoint_dtype(model) if own is None else DTYPES[own]


def values(sizes: Sizes) -> list[Value]:
    """Return the sizes as values of protocol `computed`."""
    parts = sizes.part_bytes
    figures = {
        "computed_bytes": sizes.total_bytes,
        "quantized_bytes": parts["quantized"],
        "head_bytes": parts["head"],
        "embedding_bytes": parts["embedding"],
        "other_bytes": parts["other"],
    }
    return [
        Value("size", "computed_bits_per_weight", PROTOCOL, sizes.bits_per_weight, "bit", False),
        *(Value("size", name, PROTOCOL, float(n), "B", False) for name, n in figures.items()),
    ]


def main(job: dict[str, Any], stage: Stage) -> None:
    """Compute the sizes of the cell `job` and leave the record in `job["folder"]`."""
    config = job["config"]
    hardware: Hardware = instantiate(config["hardware"])
    source: ModelSource = instantiate(config["model"])
    method: Method = instantiate(config["method"])
    # The axes as the method has them: awq has 4 bits, though no option says so.
    axes = {"bits": method.bits, "group_size": method.group_size}
    progress = Progress({**job, "summary": {**job["summary"], **axes}}, hardware)
    stage("computing sizes")
    model = meta_model(source.architecture())
    sizes = compute(model, method)
    progress.values += values(sizes)
    left_out = [list(entry) for entry in sizes.left_out]
    progress.details["coverage"] = {
        "quantized_weights": sizes.quantized_weights,
        "total_weights": sizes.quantized_weights + sum(entry[1] for entry in sizes.left_out),
        "left_out": left_out,
    }
    progress.details["model"] = {**model_facts(model), **job["model_identity"]}
    if isinstance(method, ForeseeingMethod):
        progress.details["notes"] += method.foresee(model)
    progress.details["notes"].append("sizes computed from the configuration; no weight was read")
    progress.write("ok")
