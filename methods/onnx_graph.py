"""An ONNX artefact's file: its names, its stored tensors, and which product is which matrix.

`model.onnx` holds the graph, `model.onnx.data` the large tensors. A linear map is one `MatMul` of
an input [..., in] and a tensor [in, out], the node named as the module of the Hugging Face model
(`model.layers.0.mlp.up_proj`), the tensor as its parameter (`....weight`). What a quantizer stores
instead has names that begin with the parameter's (`....weight_quantized`, `....weight_scale`).
`onnx.json` says what the graph does not: the shapes of the maps, and the model's width and context.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from methods import artefact as artefacts
from methods.base import Matrix
from methods.encoders import is_encoder
from methods.library import put_linear, require

MODEL = "model.onnx"
FACTS = "onnx.json"
FORMAT = 1
WEIGHT = ".weight"
DATA_THRESHOLD = 1024
"""Bytes from which a tensor is stored beside the graph, whose own file cannot exceed 2 GB."""


@dataclass(frozen=True)
class Facts:
    """What is known of an exported model beside its graph.

    Attributes:
        maps: name -> [out, in] of every linear map that is one MatMul of a tensor [in, out].
        matrices: the names among them that the method covers.
        vocab_size, context_length: of the model.
    """

    maps: dict[str, list[int]]
    matrices: list[str]
    vocab_size: int
    context_length: int
    format: int = FORMAT

    def matrix(self, name: str) -> Matrix:
        """Return the map `name`; its role is not known here."""
        return Matrix(name, "block", *self.maps[name])


def write_facts(folder: Path, facts: Facts) -> None:
    """Write `facts` beside the graph."""
    (folder / FACTS).write_text(json.dumps(asdict(facts), indent=1))


def read_facts(folder: Path) -> Facts:
    """Read what `write_facts` wrote."""
    document = json.loads((folder / FACTS).read_text())
    if document.get("format") != FORMAT:
        raise ValueError(f"{folder / FACTS} has format {document.get('format')!r}, not {FORMAT}")
    return Facts(**document)


def require_onnx(owner: str) -> None:
    """Raise ConfigError where a package that writes or runs ONNX is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, owner)


def read(folder: Path, with_data: bool = True) -> Any:
    """Return the ONNX model in `folder`; without data its large tensors are but described."""
    import onnx

    return onnx.load(folder / MODEL, load_external_data=with_data)


def write(model: Any, folder: Path) -> None:
    """Write `model` into `folder`, which must hold none, large tensors beside the graph."""
    import onnx

    onnx.save(
        model,
        folder / MODEL,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{MODEL}.data",
        size_threshold=DATA_THRESHOLD,
    )


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Return tensor name -> bytes of what `folder` stores; the large tensors are not read.

    Raises:
        ConfigError: the package onnx is not installed.
    """
    require("onnx", "reading an ONNX artefact")
    from onnx.helper import tensor_dtype_to_np_dtype

    sizes = {}
    for tensor in read(folder, with_data=False).graph.initializer:
        outside = {entry.key: entry.value for entry in tensor.external_data}
        if "length" in outside:
            sizes[tensor.name] = int(outside["length"])
        else:
            width = tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            sizes[tensor.name] = torch.Size(tensor.dims).numel() * width
    return sizes


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Return name -> stored tensor of an ONNX model that was read with its data."""
    from onnx.numpy_helper import to_array

    return {one.name: torch.from_numpy(to_array(one).copy()) for one in model.graph.initializer}


def matrix_of(tensor: str) -> str:
    """Return the matrix that the stored tensor belongs to: what stands before `.weight`."""
    return tensor.rpartition(WEIGHT)[0]


def name_maps(model: Any, maps: dict[str, list[int]]) -> None:
    """Name each MatMul of a linear map's weight as the map; quantizers and profiles keep the name.

    Raises:
        RuntimeError: a map is not one MatMul of a tensor [in, out].
    """
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    found = set()
    for node in model.graph.node:
        if node.op_type != "MatMul" or not node.input[1].endswith(WEIGHT):
            continue
        name = matrix_of(node.input[1])
        if name in maps and shapes[node.input[1]] == maps[name][::-1]:
            node.name = name
            found.add(name)
    if found != set(maps):
        lost = sorted(set(maps) - found)
        raise RuntimeError(f"the exported graph has no MatMul of {', '.join(lost[:3])}")


def plain_model(artefact: Path, stored: dict[str, Tensor], modules: dict[str, nn.Module]) -> Any:
    """Return the transformers model of an artefact in float32, without ONNX Runtime.

    `stored` are the graph's tensors; `modules` takes the place of maps that are quantized.

    Raises:
        RuntimeError: the graph lacks a parameter.
    """
    facts = read_facts(artefact)
    model = artefacts.skeleton(artefact)
    # As the graph has it: other implementations leave out what they cannot (soft caps of Gemma 2).
    model.set_attn_implementation("eager")
    for name in facts.maps:
        matrix = facts.matrix(name)
        if name in modules:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, modules[name])
        else:
            weight = stored[f"{name}{WEIGHT}"].float().T
            put_linear(model, matrix, weight, bias_of(stored, name))
    if is_encoder(model):
        _drop_unread(model, stored)
    inside = tuple(f"{name}." for name in facts.maps)
    embedding = model.get_input_embeddings().weight
    embeddings = [name for name, one in model.named_parameters() if one is embedding]
    pairs = getattr(model, "all_tied_weights_keys", {}).items()
    tied = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(inside):
            continue
        # A tied head is stored once, under the embedding's name; so is its bias, under one name.
        source = name if name in stored else tied.get(name, embeddings[0])
        if source not in stored or (name != source and parameter.shape != stored[source].shape):
            raise RuntimeError(f"the graph has no tensor {name}")
        state[name] = stored[source].float()
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval().requires_grad_(False)


def _drop_unread(model: Any, stored: dict[str, Tensor]) -> None:
    """Take away the parts of an encoder that its graph does not need: a pooler."""
    for name, child in list(model.named_children()):
        parameters = [f"{name}.{own}" for own, _ in child.named_parameters()]
        if parameters and not any(one in stored for one in parameters):
            setattr(model, name, None)


def bias_of(stored: dict[str, Tensor], name: str) -> Tensor | None:
    """Return the float32 bias [out] of the map `name`, or None."""
    bias = stored.get(f"{name}.bias")
    return None if bias is None else bias.float()
