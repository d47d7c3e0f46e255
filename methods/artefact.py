"""A folder that holds a model in a method's own format, written and loaded without pickles.

`model.safetensors` holds every tensor once, `layers.json` the facts from which the replaced modules
are built again, `config.json` the architecture in Hugging Face layout. The folder is complete: it
can be copied elsewhere and loaded there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from kernels.errors import ConfigError
from methods.base import Matrix
from methods.encoders import auto_class
from methods.files import read_object
from methods.layers import bias_of

WEIGHTS = "model.safetensors"
LAYERS = "layers.json"
FORMAT = 1

Facts = dict[str, Any]


def save(
    model: Any, into: Path, layers: dict[str, Facts], dtype: torch.dtype | None = None
) -> None:
    """Write `model` into folder `into`.

    `layers` maps the names of replaced modules to JSON facts; their buffers are stored as they are.
    Every other floating tensor is stored in `dtype`, by default that of the model's checkpoint.
    """
    dtype = dtype or checkpoint_dtype(model)
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        inside = any(name.startswith(f"{layer}.") for layer in _parents(name) if layer in layers)
        tensors[name] = tensor if inside or not tensor.is_floating_point() else tensor.to(dtype)
    into.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, into / WEIGHTS, {"format": "pt"})
    facts = {"format": FORMAT, "layers": layers, "tied": tied}
    (into / LAYERS).write_text(json.dumps(facts, indent=1))
    model.config.save_pretrained(into)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(into)


def checkpoint_dtype(model: Any) -> torch.dtype:
    """Return the floating type the model's checkpoint is stored in (float32 where it says none)."""
    dtype = getattr(model.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def stored_bias(model: nn.Module, matrix: Matrix) -> Tensor | None:
    """Return the bias [out] of a linear map in the checkpoint's own floating type, or None."""
    bias = None if matrix.role == "embedding" else bias_of(model, matrix)
    return None if bias is None else bias.to(checkpoint_dtype(model))


def dtype_name(tensor: Tensor | None) -> str | None:
    """Return `float16` for a float16 tensor, and so on; None for None."""
    return None if tensor is None else str(tensor.dtype).removeprefix("torch.")


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def skeleton(folder: Path) -> Any:
    """Return the model of `folder`'s config.json with parameters on meta and real buffers."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # Replaced expert stacks are read expert by expert; grouped kernels want plain parameters.
    config._experts_implementation = "eager"
    with init_empty_weights(include_buffers=False):
        return auto_class(config).from_config(config)


def load(
    artefact: Path,
    build: Callable[[str, Facts], nn.Module],
    dtype: torch.dtype,
    device: str = "cpu",
) -> Any:
    """Load the model in folder `artefact`, in eval mode, on `device`.

    `build(name, facts)` returns the empty module for each replaced layer; its tensors keep the
    types they are stored in. All other floating tensors are converted to `dtype`.

    Raises:
        ConfigError: a file is of another format, or says something that cannot be.
    """
    layers, tied = read_layers(artefact)
    model = skeleton(artefact)
    for name, facts in layers.items():
        owner, attribute = _place(model, name, artefact)
        owner._parameters.pop(attribute, None)
        setattr(owner, attribute, _built(name, facts, build))
    try:
        tensors = load_file(artefact / WEIGHTS, device=device)
    except (SafetensorError, OSError, KeyError) as error:
        raise ConfigError(f"{artefact / WEIGHTS} cannot be read: {error}") from error
    for name in list(tensors):
        inside = any(parent in layers for parent in _parents(name))
        if tensors[name].is_floating_point() and not inside:
            tensors[name] = tensors[name].to(dtype)
    for name, source in tied.items():
        if source not in tensors:
            raise ConfigError(f"{artefact} ties {name!r:.80} to a tensor that it does not hold")
        tensors[name] = tensors[source]
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{artefact} does not fit its own model: {reason}") from error
    for name, source in tied.items():
        _tie(model, name, source)
    for buffer_owner in model.modules():
        for key, buffer in buffer_owner._buffers.items():
            if buffer is not None and buffer.device.type != torch.device(device).type:
                buffer_owner._buffers[key] = buffer.to(device)
    return model.eval().requires_grad_(False)


def read_layers(artefact: Path) -> tuple[dict[str, Facts], dict[str, str]]:
    """Return (facts of each replaced module by name, name -> source of tied tensors).

    Raises:
        ConfigError: the file is of another format, or says something that cannot be.
    """
    path = artefact / LAYERS
    document = read_object(path)
    if document.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {document.get('format')!r:.40}, not {FORMAT}")
    layers, tied = document.get("layers"), document.get("tied")
    if not isinstance(layers, dict) or not all(isinstance(one, dict) for one in layers.values()):
        raise ConfigError(f"{path} names no layers with their facts")
    if not isinstance(tied, dict) or not all(isinstance(one, str) for one in tied.values()):
        raise ConfigError(f"{path} does not say which tensors are tied")
    return layers, tied


def _place(model: nn.Module, name: str, artefact: Path) -> tuple[nn.Module, str]:
    """Return the module that holds layer `name`, and its name there; never another attribute."""
    parent, _, attribute = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        owner = None
    if owner is None or attribute not in {**owner._modules, **owner._parameters}:
        raise ConfigError(f"{artefact} holds a layer that its model lacks: {name!r:.80}")
    return owner, attribute


def _built(
    name: str, facts: Mapping[str, Any], build: Callable[[str, Facts], nn.Module]
) -> nn.Module:
    """Return the empty module of a layer; its facts can say anything."""
    try:
        return build(name, dict(facts))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the facts of layer {name!r:.80} are none: {reason}") from error


def _tie(model: nn.Module, name: str, source: str) -> None:
    """Make parameter `name` the very object that `source` is; assigning made one for each."""
    parent, _, attribute = name.rpartition(".")
    source_parent, _, source_attribute = source.rpartition(".")
    own = model.get_submodule(parent)._parameters
    other = model.get_submodule(source_parent)._parameters
    if attribute in own and source_attribute in other:
        own[attribute] = other[source_attribute]
