"""Bytes of the artefact on disk, and stored bits per weight of the quantized matrices.

`artefact_bytes` counts what running the model needs: every file of the artefact except the
tokenizer's, which no method changes, and the manifest, which is this project's own bookkeeping.
`bits_per_weight` counts every stored bit of the quantized matrices (scales, zero points, indices
and padding included, biases not) over their weights, read from the headers of the files
and checked against what the method said it stored.

Head and embedding are listed apart, quantized or not, so the four parts add up to the artefact:
quantized (matrices of the decoder blocks), head, embedding, and everything else (vectors, matrices
outside the scope, file headers, configuration).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness import json_file as check
from harness.artefacts import MANIFEST, Manifest, read_manifest
from harness.context import Context
from harness.measures.execution import is_simulated
from harness.record import Value
from methods.artefact import LAYERS
from methods.base import Engine, Storing

TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)


LENGTH_BYTES = 8


class SizeMismatchError(Exception):
    """The artefact does not hold what its method said it stored."""


@dataclass(frozen=True)
class Size:
    """What the artefact takes on disk."""

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the sizes; none where weights are only rounded and stored as floats, or elsewhere.

        Raises:
            SizeMismatchError: bits on disk and bits in the manifest differ.
        """
        if is_simulated(engine):
            return []
        manifest = read_manifest(context.artefact)
        if not manifest.matrices:
            return []  # a server's: nothing of the model is here
        total = sum(path.stat().st_size for path in model_files(context.artefact))
        values = {"artefact_bytes": float(total)}
        stored_bits = manifest.stored_bits
        tensors = tensor_bytes(engine, context.artefact)
        if tensors:
            stored_bits = _matching_bits(context.artefact, manifest, tensors)
            values |= _parts(context, manifest, tensors, total)
        weights = weights_of(manifest.matrices)
        values["bits_per_weight"] = stored_bits / weights
        return [
            Value("size", metric, "stored", value, _unit(metric), False)
            for metric, value in values.items()
        ]


def _unit(metric: str) -> str:
    return "B" if metric.endswith("_bytes") else "bits"


def model_files(artefact: Path) -> list[Path]:
    """Return the files of `artefact` that running the model needs, the tokenizer's left out."""
    return [
        path
        for path in sorted(artefact.rglob("*"))
        if path.is_file() and path.name not in TOKENIZER_FILES and path.name != MANIFEST
    ]


def tensor_bytes(engine: Engine, artefact: Path) -> dict[str, int]:
    """Return tensor name -> bytes, from the headers of the artefact's files.

    The engine says it for a format of its own; else the safetensors files do. Empty where neither.
    """
    if isinstance(engine, Storing):
        return engine.stored_bytes()
    sizes: dict[str, int] = {}
    for path in sorted(artefact.glob("*.safetensors")):
        sizes |= header_sizes(path)
    return sizes


def header_sizes(path: Path) -> dict[str, int]:
    """Return tensor -> bytes by the header of a safetensors file: its length (8 bytes), then JSON.

    Raises:
        SizeMismatchError: the header is none, or speaks of more than the file has.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > total - LENGTH_BYTES:
            raise SizeMismatchError(f"{path} says that its header has {length} bytes")
        try:
            header = check.parse_json(file.read(length))
        except ValueError as error:
            raise SizeMismatchError(f"{path} has no header: {error}") from error
    if not isinstance(header, dict):
        raise SizeMismatchError(f"{path} has no header: it is no object")
    sizes = {}
    for name in header.keys() - {"__metadata__"}:
        facts = header[name] if isinstance(header[name], dict) else {}
        offsets: Any = facts.get("data_offsets")
        if not check.list_of(check.count)(offsets) or len(offsets) != 2:
            raise SizeMismatchError(f"{path} does not say where {check.shown(name)} lies")
        begin, end = offsets
        if not begin <= end <= total - LENGTH_BYTES - length:
            raise SizeMismatchError(f"{path} has no room for {check.shown(name)}")
        sizes[name] = end - begin
    return sizes


def weights_of(matrices: list[dict[str, Any]]) -> int:
    """Return the number of weights of a manifest's matrices."""
    return sum(m["count"] * m["out_features"] * m["in_features"] for m in matrices)


def bytes_of_matrix(name: str, tensors: dict[str, int], tied: dict[str, str]) -> int:
    """Return the stored bytes of matrix `name` (a module or a parameter) without its bias."""
    found: dict[str, int] = {}
    for tensor in [*tensors, *tied]:
        if tensor == name or (tensor.startswith(f"{name}.") and tensor != f"{name}.bias"):
            source = tied.get(tensor, tensor)
            found[source] = tensors[source]
    return sum(found.values())


def tied_tensors(artefact: Path) -> dict[str, str]:
    """Return the tensors that are stored under another's name, name -> source."""
    path = artefact / LAYERS
    if not path.exists():
        return {}
    tied: dict[str, str] = json.loads(path.read_text()).get("tied", {})
    return tied


def _matching_bits(artefact: Path, manifest: Manifest, tensors: dict[str, int]) -> int:
    tied = tied_tensors(artefact)
    on_disk = 8 * sum(bytes_of_matrix(m["name"], tensors, tied) for m in manifest.matrices)
    if on_disk != manifest.stored_bits:
        raise SizeMismatchError(
            f"the quantized matrices take {on_disk:,} bits on disk, but {manifest.method} says it "
            f"stored {manifest.stored_bits:,}: one of the two counts is wrong"
        )
    return on_disk


def _parts(
    context: Context, manifest: Manifest, tensors: dict[str, int], total: int
) -> dict[str, float]:
    tied = tied_tensors(context.artefact)
    ends: dict[str, str] = manifest.model.get("ends", {})
    blocks = [m["name"] for m in manifest.matrices if m["name"] not in ends.values()]
    parts = {"quantized_bytes": sum(bytes_of_matrix(name, tensors, tied) for name in blocks)}
    # A tied matrix is stored once, under one of the two names, and counted there.
    own = {role: bytes_of_matrix(name, tensors, {}) for role, name in ends.items()}
    parts |= {f"{role}_bytes": size for role, size in own.items()}
    if ends:
        context.details["size"] = {"tied_embeddings": 0 in own.values()}
    parts["other_bytes"] = total - sum(parts.values())
    return {metric: float(value) for metric, value in parts.items()}


def bytes_read_per_token(engine: Engine, artefact: Path) -> int | None:
    """Return the stored bytes of the weights that one decoded token has to read, at least.

    All tensors but the embedding, of which one row is read (a tied one is read as the head); of a
    stack of experts the share that a token is sent to. None where that cannot be told, or where
    the engine reads something else than what is stored (`reads_stored` false).
    """
    if not getattr(engine, "reads_stored", True):
        return None
    manifest = read_manifest(artefact)
    tensors, tied = tensor_bytes(engine, artefact), tied_tensors(artefact)
    if not tensors:
        return None
    total = sum(tensors.values())
    ends: dict[str, str] = manifest.model.get("ends", {})
    own = {role: bytes_of_matrix(n, tensors, {}) for role, n in ends.items()}
    if own.get("head"):
        total -= own["embedding"]
    stacks = [m for m in manifest.matrices if m["count"] > 1]
    if stacks:
        used = _experts_per_token(artefact)
        if used is None:
            return None
        for stack in stacks:
            stored = bytes_of_matrix(stack["name"], tensors, tied)
            total -= stored * (stack["count"] - used) // stack["count"]
    return total


def _experts_per_token(artefact: Path) -> int | None:
    try:
        facts = json.loads((artefact / "config.json").read_text())
    except FileNotFoundError:
        return None
    used = facts.get("num_experts_per_tok")
    return int(used) if used is not None else None
