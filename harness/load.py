"""From a model's source to a model in memory, whole and sound or not at all.

transformers initialises weights that a checkpoint lacks and ignores those it does not know; here
both are errors. Models are float32 on the CPU, in eval mode, and `model.config.dtype` is the
floating type that the checkpoint is stored in.
"""

from __future__ import annotations

import logging
import math
import pickle  # nosec B403  # for the name of its exception
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoTokenizer
from transformers.utils import logging as transformers_logging

from harness.folders import TOKENIZER_MODELS, read_config, read_pooling, weight_files
from harness.models import ModelSource
from harness.shape_model import ShapeModel
from kernels.errors import ConfigError
from methods.encoders import (
    POOLING,
    auto_class,
    context_length,
    is_encoder,
    kind_of,
    other_heads,
)
from methods.engine import cap_attention
from methods.layers import check_finite, end_names, is_tied

STORED_DTYPES = {
    "F64": torch.float32,  # transformers has no models in float64
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)
UNREADABLE_WEIGHTS = (*UNREADABLE, SafetensorError, pickle.UnpicklingError, RuntimeError)
NAMES_SHOWN = 3
DEVIATION = 0.02


def load_model(source: ModelSource) -> tuple[Any, Any]:
    """Return (model in float32 on the CPU, tokenizer); a bare shape may have no tokenizer: None.

    Raises:
        ConfigError: a file is missing, truncated or damaged, a tensor is missing, unknown, of
            another shape or not finite, or the tokenizer does not fit; the sentence says which.
    """
    with _quiet():
        if isinstance(source, ShapeModel):
            model = random_model(source)
            folder = source.tokenizer_folder()
            tokenizer = load_tokenizer(folder) if folder is not None else None
        else:
            folder = source.folder()
            if folder is None:
                raise ConfigError(f"model {source.name} has neither a folder nor a shape")
            model = _checkpoint_model(folder, source.allow_pickle)
            tokenizer = load_tokenizer(folder)
            if tokenizer is None:
                raise ConfigError(
                    f"{folder} holds no tokenizer ({', '.join(TOKENIZER_MODELS)}); put the "
                    "model's own tokenizer beside its weights"
                )
    if tokenizer is not None:
        _check_tokenizer(tokenizer, model, source.name)
    # What methods calibrate on is computed by this model.
    cap_attention(model)
    return model, tokenizer


def meta_model(config: Mapping[str, Any]) -> Any:
    """Return the model of a configuration (as in config.json) on the meta device.

    That of a quantized checkpoint is the shape it was made from.

    Raises:
        ConfigError: transformers knows no such architecture, or refuses a value.
    """
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with _quiet(), torch.device("meta"):
        configuration = _configuration(plain)
        return auto_class(configuration).from_config(configuration).eval()


def random_model(source: ShapeModel, device: str = "cpu") -> Any:
    """Return a shape's model in float32: matrices uniform with the deviation of fresh ones.

    Vectors named `weight` (norms) are 1, others (biases) 0. The values are rounded to the shape's
    floating type, so that storing them in it loses nothing; another `device` draws others.
    """
    config = _configuration(source.architecture())
    with _quiet(), init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config)
    # Uniform: drawing normal values takes five times as long and no kernel can tell them apart.
    deviation = getattr(config, "initializer_range", None) or DEVIATION
    bound = math.sqrt(3) * float(deviation)
    generator = torch.Generator(device).manual_seed(source.seed)
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            values = torch.empty(empty.shape, device=device)
            if empty.ndim > 1:
                values.uniform_(-bound, bound, generator=generator)
                values.copy_(values.to(config.dtype))
            else:
                values.fill_(1.0 if name == "weight" else 0.0)
            module._parameters[name] = nn.Parameter(values, requires_grad=False)
    # Making parameters empty has separated those that are one.
    model.tie_weights()
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in `folder`, or None where the folder holds none.

    Raises:
        ConfigError: its files cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_MODELS):
        return None
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # tokenizers raises no narrower class
        raise ConfigError(f"the tokenizer in {folder} cannot be read: {_line(error)}") from error


def model_facts(model: Any) -> dict[str, Any]:
    """Return what a record says of a model: architecture, parameters, tied ends, stored type."""
    return {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tied_embeddings": is_tied(model),
        "stored_dtype": str(model.config.dtype).removeprefix("torch."),
        "context_length": (
            context_length(model)
            if is_encoder(model)
            else getattr(model.config, "max_position_embeddings", None)
        ),
        "vocab_size": model.config.vocab_size,
        "ends": end_names(model),
    }


def describes_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a configuration (as in config.json) is an encoder's; False where it is unreadable."""
    try:
        return kind_of(_configuration(config)) in ("masked", "bare")
    except ConfigError:
        return False


def _configuration(config: Mapping[str, Any]) -> Any:
    """Return the transformers configuration of a plain one."""
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"transformers knows no architecture {kind!r} (model_type); models that bring their "
            "own code are not run"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(config))
    except UNREADABLE as error:
        raise ConfigError(
            f"the configuration of the {kind} model does not work: {_line(error)}"
        ) from error


def _checkpoint_model(folder: Path, allow_pickle: bool) -> Any:
    config = read_config(folder)
    if "quantization_config" in config:
        raise ConfigError(
            f"the checkpoint in {folder} is quantized already (quantization_config in its "
            "config.json); take the unquantized one, or method=checkpoint"
        )
    configuration = _configuration(config)
    if kind_of(configuration) is None:
        raise ConfigError(
            f"{folder} holds a {config['model_type']} model, which is no causal language model, "
            "and no encoder with a masked-language head in transformers"
        )
    files = weight_files(folder, allow_pickle)
    pickled = files[0].suffix == ".bin"
    stored = configuration.dtype or torch.float32 if pickled else _stored_dtype(files)
    try:
        model, info = auto_class(configuration).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=not pickled,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except UNREADABLE_WEIGHTS as error:
        # Too little memory is no fault of the files.
        if "memory" in str(error):
            raise
        raise ConfigError(f"the weights in {folder} cannot be read: {_line(error)}") from error
    if is_encoder(model):
        if info["unexpected_keys"]:
            info["unexpected_keys"] = set(info["unexpected_keys"]) - other_heads(model.config)
        # In its configuration, so that the artefact says it, too.
        setattr(model.config, POOLING, read_pooling(folder))
    _check_complete(folder, info)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            check_finite(name, tensor)
    model.config.dtype = stored
    return model.eval().requires_grad_(False)


def _stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """Return the floating type of most weights in safetensors `files`, each read to its header.

    Raises:
        ConfigError: a file is truncated or no safetensors file, or holds quantized weights.
    """
    counts: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a mapping
                    part = tensors.get_slice(name)
                    counts[part.get_dtype()] += math.prod(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{file} is truncated or damaged ({_line(error)}); download or copy it again"
            ) from error
    if not counts:
        raise ConfigError(f"{files[0]} holds no tensors; download or copy it again")
    (most, _), *_ = counts.most_common(1)
    if most not in STORED_DTYPES:
        raise ConfigError(
            f"most weights in {files[0].parent} are stored as {most}: the checkpoint is quantized "
            "already, or no language model; take the unquantized one"
        )
    return STORED_DTYPES[most]


def _check_complete(folder: Path, info: Mapping[str, Any]) -> None:
    mismatched = [f"{name} is {list(has)}, not {list(wants)}" for name, has, wants in _sized(info)]
    findings = {
        "lacks": sorted(info["missing_keys"]),
        "holds unknown": sorted(info["unexpected_keys"]),
        "does not fit its config.json in": sorted(mismatched),
    }
    for what, names in findings.items():
        if names:
            shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
            raise ConfigError(
                f"the checkpoint in {folder} {what} {len(names)} "
                f"tensor{'s' if len(names) > 1 else ''}: {shown}; "
                "weights and config.json must belong together: download or copy them again"
            )


def _sized(info: Mapping[str, Any]) -> list[tuple[str, Sequence[int], Sequence[int]]]:
    return [(entry[0], entry[1], entry[2]) for entry in info["mismatched_keys"]]


def _check_tokenizer(tokenizer: Any, model: Any, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise ConfigError(
            f"the tokenizer of model {name} does not fit: its token {token!r} has id {largest}, but"
            f" the model's vocabulary has {rows} entries; take the tokenizer the model was made for"
        )


def _line(error: Exception) -> str:
    """Return the first line of an error as part of a sentence."""
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()]
    # Strict configurations name the field in the first line and the reason in the second.
    text = ": ".join(lines[:2]) if isinstance(error, StrictDataclassError) else "".join(lines[:1])
    return text or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars, load reports and warnings of the libraries off standard error."""
    level = logging.root.manager.disable
    bars = transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            transformers_logging.enable_progress_bar()
