"""A transformers causal language model as an ONNX graph with a cache, through torch.export.

Of an encoder (`methods.onnx_encoder`) the graph has another signature, and no cache.

Inputs: `input_ids` int64 [B, T]; `logits_to_keep` int64 [L], the positions among the T whose logits
are wanted, so that a prefill for the last token's does not multiply the head with all; and for each
layer `past_key_values.N.key` and `.value` float32 [B, kv heads, P, head_dim], P zero at first (the
names other tools for ONNX models use). Outputs: `logits` float32 [B, L, V] and `present.N.key` and
`.value` [B, kv heads, P + T, head_dim].

Positions and masks are what the model itself makes of the cache's length, sliding windows included;
keys beyond a window are kept and masked. Every linear map is written as `x @ weight` with the
weight [in, out], GPT-2's Conv1D too: one kind of node, which every quantizer of ONNX Runtime knows.
The exporter's own optimizer is left out: it may fold parameters into nameless constants. ONNX
Runtime does the same when it loads the graph.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kernels.errors import ConfigError
from methods import onnx_graph
from methods.artefact import checkpoint_dtype
from methods.base import Matrix
from methods.encoders import context_length, is_encoder
from methods.layers import (
    Scope,
    Selection,
    bias_of,
    check_finite,
    end_names,
    is_tied,
    replace,
    select,
    weight_of,
)
from methods.onnx_encoder import Encoded, tracing
from methods.onnx_graph import MODEL, Facts

EXAMPLE_BATCH, EXAMPLE_PAST, EXAMPLE_TOKENS = 2, 3, 5
"""Sizes the graph is traced with: all different, and none 1, which would be taken as fixed."""

PREPROCESSED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""What tells ONNX Runtime's quantizers not to ask for their preparation, which names no maps."""


class Product(nn.Module):
    """A linear map whose weight is stored as ONNX multiplies it: [..., in] @ [in, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add."""
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class Cached(nn.Module):
    """`model` as a function of tokens, wanted positions and the cache's tensors, as tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, kept: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Return logits [B, L, V] and keys and values of each layer."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        output = self.model(
            input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=kept
        )
        kept_tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (output.logits, *kept_tensors)


def select_maps(model: Any, scope: Scope, owner: str) -> Selection:
    """Return the matrices of `model` (may be on meta) inside `scope`.

    Raises:
        ConfigError: the graph could not express the model: experts in stacks, a cache that is not
            keys and values, or a forward that gives all logits only.
    """
    selection = select(model, scope)
    kind = type(model).__name__
    stacks = [matrix.name for matrix in selection.matrices if matrix.count > 1]
    if stacks:
        raise ConfigError(
            f"{owner} cannot export {kind}: it keeps its experts in stacks ({stacks[0]}), which "
            "torch.onnx does not translate; use method=rtn"
        )
    if is_encoder(model):
        return selection
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not layers <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ConfigError(
            f"{owner} cannot export {kind}: its cache is not keys and values of every layer "
            f"({', '.join(sorted(one.__name__ for one in layers))}); use method=rtn"
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{owner} cannot export {kind}: its forward takes no logits_to_keep; use method=rtn"
        )
    return selection


def select_finite(model: Any, scope: Scope, owner: str) -> Selection:
    """Return what `select_maps` does; raise ConfigError where a weight of it is not finite."""
    selection = select_maps(model, scope, owner)
    for matrix in selection.matrices:
        check_finite(matrix.name, weight_of(model, matrix))
    return selection


def copy_facts(source: Path, into: Path) -> None:
    """Copy what stands beside the graph in the export `source`."""
    for path in source.glob("*.json"):
        (into / path.name).write_bytes(path.read_bytes())


def export(model: Any, matrices: list[Matrix], into: Path) -> list[str]:
    """Write `model` (float32, changed in place) as a float32 graph into folder `into`.

    `matrices` are those the method covers; a tied head among them is stored apart. Returns notes.
    """
    apart = is_tied(model) and any(matrix.role == "head" for matrix in matrices)
    tied = is_tied(model) and not apart
    ends = end_names(model)
    maps = {}
    for matrix in select(model, Scope(head=not tied)).matrices:
        maps[matrix.name] = [matrix.out_features, matrix.in_features]
        # A copy: the transposed view of a tied head would still be the embedding's.
        weight = weight_of(model, matrix).T.clone(memory_format=torch.contiguous_format)
        replace(model, matrix, Product(weight, bias_of(model, matrix)))
    _write_graph(model, into, dict.fromkeys(ends.values(), ends["embedding"]) if tied else {}, maps)
    config = model.config
    config.save_pretrained(into)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(into)
    facts = Facts(
        maps,
        [matrix.name for matrix in matrices],
        int(config.vocab_size),
        context_length(model) if is_encoder(model) else int(config.max_position_embeddings),
    )
    onnx_graph.write_facts(into, facts)
    if apart:
        return ["the head, tied to the embedding until now, is stored apart"]
    if tied:
        size = 4 * model.get_input_embeddings().weight.numel()
        return [
            "head and embedding are one tensor in the file; onnxruntime makes a transposed copy of "
            f"{size:,} bytes when it loads it"
        ]
    return []


def float32_notes(model: Any) -> list[str]:
    """Return, for a checkpoint of another type, that what is not quantized is stored in float32."""
    dtype = checkpoint_dtype(model)
    if dtype == torch.float32:
        return []
    said = str(dtype).removeprefix("torch.")
    return [f"what is not quantized is stored in float32, which the checkpoint has in {said}"]


def _write_graph(model: Any, into: Path, tied: dict[str, str], maps: dict[str, list[int]]) -> None:
    """Trace `model` and write the graph with the names of this project."""
    program = _trace_encoder(Encoded(model)) if is_encoder(model) else _trace(Cached(model))
    with TemporaryDirectory(dir=into) as folder:
        with _quiet():
            program.save(Path(folder) / MODEL, external_data=True)
        graph = onnx_graph.read(Path(folder))
    names = {tensor.name: tensor.name.removeprefix("model.") for tensor in graph.graph.initializer}
    for head, embedding in tied.items():
        names[f"model.{head}.weight"] = f"{embedding}.weight"
    for tensor in graph.graph.initializer:
        tensor.name = names[tensor.name]
    for node in graph.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        # Where in the source a node comes from: ten times the graph, and paths of this machine.
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx_graph.name_maps(graph, maps)
    entry = graph.metadata_props.add()
    entry.key, entry.value = PREPROCESSED
    onnx_graph.write(graph, into)


def _trace(model: Cached) -> Any:
    """Return the ONNX program of `model` with all sizes but the model's own left open."""
    model.model.set_attn_implementation("eager")
    model.requires_grad_(False)  # traced a fifth faster
    ids = torch.zeros(EXAMPLE_BATCH, EXAMPLE_TOKENS, dtype=torch.int64)
    with torch.no_grad():
        # Without the configuration no window crops it.
        cache = DynamicCache()
        model.model(input_ids=ids[:, :EXAMPLE_PAST], past_key_values=cache, use_cache=True)
    past = [t.contiguous() for layer in cache.layers for t in (layer.keys, layer.values)]
    names = [f"{n}.{part}" for n in range(len(cache.layers)) for part in ("key", "value")]
    batch, tokens, read, kept = (torch.export.Dim(n) for n in ("batch", "tokens", "past", "kept"))
    with _quiet(), _refusals(type(model.model).__name__):
        return torch.onnx.export(
            model.eval(),
            (ids, torch.tensor([3, 4]), *past),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=["input_ids", "logits_to_keep", *(f"past_key_values.{n}" for n in names)],
            output_names=["logits", *(f"present.{n}" for n in names)],
            dynamic_shapes=(
                {0: batch, 1: tokens},
                {0: kept},
                tuple({0: batch, 2: read} for _ in past),
            ),
        )


def _trace_encoder(model: Encoded) -> Any:
    """Return the ONNX program of the encoder `model`, batch and length left open."""
    model.model.set_attn_implementation("eager")
    model.requires_grad_(False)
    with _quiet(), _refusals(type(model.model).__name__):
        return torch.onnx.export(
            model.eval(), dynamo=True, optimize=False, verbose=False, **tracing(model)
        )


@contextmanager
def _refusals(kind: str) -> Iterator[None]:
    """Say in one sentence that PyTorch cannot write the model called `kind` as a graph."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        causes = [error.__cause__, error]
        reason = str(next(one for one in causes if one is not None)).strip().splitlines()[0]
        raise ConfigError(
            f"torch.onnx cannot export {kind} ({reason}); use another method than those of ONNX"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off standard error what the exporter says of PyTorch's own code and of torchvision."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx._internal.exporter._registration", "torch.utils._pytree")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # All inputs share their axes, as asked.
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
