"""Tiny models for the tests of the ONNX methods; each is exported once for all of them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from methods import onnx_graph
from methods.base import Matrix, Method, QuantizeReport
from methods.onnx_export import export
from tests.architectures import CONFIGS, tiny

WINDOW = 8
"""Tokens that each layer of `mistral` sees: fewer than the tests read."""

_FOLDERS: list[TemporaryDirectory[str]] = []


def small(kind: str) -> Any:
    """Return `qwen2` (tied, biases, 2 layers), `gpt2` (1 layer) or `mistral` (windows, untied)."""
    if kind == "qwen2":
        return tiny(kind)
    config = {**CONFIGS["gpt2"], "n_layer": 1}
    if kind == "mistral":
        config = {**CONFIGS["llama"], "model_type": "mistral", "sliding_window": WINDOW}
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@cache
def exported(kind: str, head: bool) -> tuple[Path, list[str]]:
    """Return a folder with the float32 graph of model `kind`, and the notes of exporting it."""
    _FOLDERS.append(TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name)
    model = small(kind)
    role = Matrix("lm_head", "head", 1, 1)
    return folder, export(model, [role] if head else [], folder)


def copied(kind: str) -> Callable[[Any, list[Matrix], Path], list[str]]:
    """Return what stands in for `export` with model `kind`: a copy of what it wrote before."""

    def copy(model: Any, matrices: list[Matrix], into: Path) -> list[str]:
        head = any(matrix.role == "head" for matrix in matrices)
        source, notes = exported(kind, head)
        for path in source.iterdir():
            shutil.copy(path, into)
        names = [matrix.name for matrix in matrices]
        onnx_graph.write_facts(into, replace(onnx_graph.read_facts(source), matrices=names))
        return notes

    return copy


def quantize(
    method: Method, kind: str, into: Path, calibration: Tensor | None = None
) -> QuantizeReport:
    """Quantize model `kind` into the folder `into`, with the graph that was exported before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(method).__module__], "export", copied(kind))
        return method.quantize(small(kind), None, calibration, into)


def bits_on_disk(report: QuantizeReport, folder: Path) -> int:
    """Return the bits of all tensors of the quantized matrices in `folder`, biases left out."""
    own = tuple(f"{matrix.name}." for matrix in report.quantized)
    return sum(
        8 * size
        for name, size in onnx_graph.tensor_bytes(folder).items()
        if name.startswith(own) and not name.endswith(".bias")
    )


def change_tensor(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Store `change` of the array `name` in the graph in `folder`."""
    import onnx

    graph = onnx_graph.read(folder)
    for tensor in graph.graph.initializer:
        if tensor.name == name:
            array = change(onnx.numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    for path in folder.glob(f"{onnx_graph.MODEL}*"):
        path.unlink()
    onnx_graph.write(graph, folder)
