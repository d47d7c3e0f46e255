"""Sizes by arithmetic alone: what a method would store of a model that need not be here.

The model is on the meta device, so 70 B parameters cost nothing. Matrices that the method covers
count the bits it states for them; everything else counts in the floating type the method leaves it
in; tied parameters count once. Metadata (file headers, config.json, tokenizer) does not count.
`read_bytes_per_token` is what decoding reads of all that for one token, without a batch.

As the child of a cell with `suite=size_only`, `main` writes the cell's record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from kernels.errors import ConfigError
from methods.artefact import checkpoint_dtype
from methods.base import ForeseeingMethod, Matrix, Method
from methods.layers import Scope, is_tied, select
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
        read_bytes: what decoding one token alone (batch 1) reads of them: every matrix of the
            blocks, of a stack of experts those that answer a token (all, where config.json has no
            num_experts_per_tok), the head, norms and biases; of an embedding, of tokens or
            positions, one row. An embedding that is the head, too, is read whole. Each weight is
            used once a token, so that the memory's bandwidth over this bounds the speed (Williams
            et al. 2009, the roofline model; Pope et al. 2022, arXiv 2211.05102). As stored: an
            engine that unpacks at loading reads more. Keys, values and activations are not in it.
    """

    quantized: tuple[Matrix, ...]
    quantized_bits: int
    part_bytes: dict[Part, int]
    left_out: tuple[tuple[str, int, str], ...]
    read_bytes: int

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
        ConfigError: the method refuses a matrix (a width that its groups do not divide), or covers
            none, so that nothing of it can be computed.
    """
    covered, left_out = method.select(model)
    if not covered:
        raise ConfigError(
            f"suite=size_only computes what is stored here of a model, and method {method.name} "
            "stores nothing of it; choose another method"
        )
    # A method may store another shape than it is given: a student of fewer blocks.
    model = getattr(method, "handed_on", lambda same: same)(model)
    bits = {matrix.name: method.stored_bits(matrix) for matrix in covered}
    everything = select(model, Scope(head=True, embeddings=True)).matrices
    matrices = {_parameter(model, matrix): matrix for matrix in everything}
    stored = {_parameter(model, m): math.ceil(bits[m.name] / 8) for m in covered}
    gone = frozenset(stored)
    stored |= _rest(model, method, gone)
    parts: dict[Part, int] = {"quantized": 0, "head": 0, "embedding": 0, "other": 0}
    for name, size in stored.items():
        matrix = matrices.get(name)
        uncovered = matrix is None or (matrix.role == "block" and name not in gone)
        parts["other" if matrix is None or uncovered else _part(matrix)] += size
    return Sizes(
        tuple(covered), sum(bits.values()), parts, tuple(left_out), _read(model, stored, matrices)
    )


def _rest(model: Any, method: Method, gone: frozenset[str]) -> dict[str, int]:
    """Return parameter -> bytes of all tensors but those in `gone`; of tied ones the first."""
    dtype = _rest_dtype(model, method)
    tensors = model.state_dict(keep_vars=True)
    # An uncovered user of a tied parameter keeps it, since the covered one has a copy of its own;
    # except with a method that stores the pair once.
    keeps_ties = getattr(method, "keeps_ties", False)
    seen = {id(tensors[name]) for name in gone} if keeps_ties else set()
    rest = {}
    for name, tensor in tensors.items():
        if name in gone or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        size = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
        rest[name] = tensor.numel() * size
    return rest


def _read(model: Any, stored: Mapping[str, int], matrices: Mapping[str, Matrix]) -> int:
    """Return the bytes of `stored` (parameter -> bytes) that decoding one token reads: see `Sizes`.

    `matrices` are all of the model by parameter, covered or not.
    """
    ends = {matrix.role: name for name, matrix in matrices.items() if matrix.role != "block"}
    # What is stored once for both ends is read whole, as the head.
    stored_once = is_tied(model) and ends["head"] not in stored
    rows = {
        f"{name}.weight": module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    if stored_once:
        del rows[ends["embedding"]]
    experts = {name: matrix.count for name, matrix in matrices.items() if matrix.count > 1}
    total = 0
    for name, size in stored.items():
        if name in rows:
            total += math.ceil(size / rows[name])
        elif name in experts:
            answering = getattr(model.config, "num_experts_per_tok", experts[name])
            total += math.ceil(size * answering / experts[name])
        else:
            total += size
    return total


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
        "read_bytes_per_token": sizes.read_bytes,
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
