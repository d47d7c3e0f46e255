"""A ready-made GGUF file as an artefact: what it stores is read from its header."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.errors import ConfigError
from methods.base import Matrix, QuantizeReport
from methods.files import take
from methods.gguf import FILE
from methods.gguf_header import StoredTensor
from methods.gguf_read import read_config, stored_tensors, tokenizer_files
from methods.gguf_types import FLOATS, TENSOR_TYPES
from methods.layers import Scope, is_tied, select


def adopt(path: Path, model: Any, into: Path) -> QuantizeReport:
    """Put the file `path` into the folder `into`; `model` is its shape, on meta.

    Raises:
        ConfigError: it is no file that can be read, or has other matrices or types than known here.
    """
    stored = stored_tensors(path)
    (into / "config.json").write_text(json.dumps(read_config(path), indent=1))
    take(path, into / FILE)
    everything = select(model, Scope(head=True, embeddings=True)).matrices
    tied = is_tied(model)
    matrices = [matrix for matrix in everything if not (tied and matrix.role == "head")]
    types = {matrix.name: _type(path, matrix, stored) for matrix in matrices}
    weights: Counter[str] = Counter()
    for matrix in matrices:
        weights[types[matrix.name]] += matrix.weights
    floats = [kind for kind in weights if kind in FLOATS]
    plain = FLOATS[floats[0]] if len(weights) == 1 and floats else None
    quantized = [m for m in matrices if plain or types[m.name] not in FLOATS]
    ends = {m.role for m in quantized}
    spared = tuple(m.name for m in matrices if m not in quantized and m.role == "block")
    left_out = select(
        model, Scope(head="head" in ends, embeddings="embedding" in ends, keep=spared)
    ).left_out
    only = TENSOR_TYPES[next(iter(weights))] if len(weights) == 1 else None
    listed = ", ".join(f"{kind} {100 * n / weights.total():.0f} %" for kind, n in weights.items())
    notes = [f"a ready-made GGUF file, not quantized here; types of its weights: {listed}"]
    try:
        tokenizer_files(path, into)
    except ConfigError as error:
        # Its original's may be there.
        notes.append(str(error))
    bits = sum(8 * stored[f"{matrix.name}.weight"].bytes for matrix in quantized)
    width, group = (float(only.bits), only.group) if only else (None, None)
    return QuantizeReport(quantized, bits, left_out, notes, width, group, unquantized=plain)


def _type(path: Path, matrix: Matrix, stored: Mapping[str, StoredTensor]) -> str:
    """Return the type of a matrix, which must be there in its shape and in a type known here."""
    tensor = stored.get(f"{matrix.name}.weight")
    wanted = (matrix.out_features, matrix.in_features)
    if tensor is None or sorted(tensor.shape) != sorted(wanted):
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        raise ConfigError(
            f"{path}: the matrix {matrix.name} {list(wanted)} is {found}; the file is damaged, or "
            "of a structure that is not known here"
        )
    if tensor.type not in TENSOR_TYPES:
        raise ConfigError(
            f"{path} stores {matrix.name} as {tensor.type}; known here are "
            f"{', '.join(TENSOR_TYPES)}"
        )
    return tensor.type
