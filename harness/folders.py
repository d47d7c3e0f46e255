"""A folder in Hugging Face layout: which files count, what is in them, and their digest.

Torch-free. Weights are safetensors, one file or shards with an index; pickles only where allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import json_file as check
from harness.artefacts import sha256
from harness.record import digest
from harness.remembered import recall, remember
from kernels.errors import ConfigError

CONFIG = "config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER_MODELS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *TOKENIZER_MODELS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
QUANTIZATION_CONFIGS = ("quantize_config.json", "quant_config.json")
"""Where AutoGPTQ and AutoAWQ once said how a checkpoint is quantized: not in its config.json."""
POOLING = "1_Pooling/config.json"
"""Where sentence-transformers says how an encoder's tokens become one vector."""
POOLINGS = ("mean", "cls", "max")
POOLING_FLAG = "pooling_mode_"
POOLING_FLAGS = ("mean_tokens", "cls_token", "max_tokens")
FILES = (CONFIG, "generation_config.json", *QUANTIZATION_CONFIGS, *TOKENIZER_FILES)
SAFETENSORS_PATTERNS = (WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors")
PICKLE_PATTERNS = (PICKLE, PICKLE_INDEX, "pytorch_model-*.bin")
REMEMBERED_FROM_BYTES = 1 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of `folder`'s config.json; raises ConfigError where it cannot be read.

    A quantization config in a file of its own counts as part of it.
    """
    config = checked_config(read_json(folder / CONFIG, CONFIG))
    for name in QUANTIZATION_CONFIGS:
        if (folder / name).is_file():
            config.setdefault("quantization_config", read_json(folder / name, name))
    return config


def read_pooling(folder: Path) -> str:
    """Return how the encoder in `folder` makes one vector of its tokens': mean, cls or max.

    The mean where the folder does not say.

    Raises:
        ConfigError: it says something else, or several things.
    """
    path = folder / POOLING
    if not path.is_file():
        return POOLINGS[0]
    said = read_json(path, "the encoder's pooling")
    if not isinstance(said, dict):
        raise ConfigError(f"{path} holds no JSON object")
    chosen = {key.removeprefix(POOLING_FLAG) for key, value in said.items() if value is True}
    found = [name for name, flag in zip(POOLINGS, POOLING_FLAGS, strict=True) if chosen == {flag}]
    if not found:
        raise ConfigError(
            f"{path} pools by {', '.join(sorted(chosen)) or 'nothing'}; what is known here is one "
            f"of {', '.join(POOLING_FLAGS)} alone"
        )
    return found[0]


def read_json(path: Path, role: str) -> Any:
    """Return the content of a JSON file; ConfigError (`role` named) where it cannot be read."""
    try:
        return check.read_json(path)
    except OSError as error:
        raise ConfigError(f"{role} {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{role} {path} is not JSON: {error}") from error


def checked_config(config: Any) -> dict[str, Any]:
    """Return `config` in plain dictionaries and lists; it must name its architecture."""
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise ConfigError(
            "the model's configuration names no model_type; it must be an object as in a "
            "config.json of transformers, with model_type (llama, gpt2, ...)"
        )
    plain: dict[str, Any] = _plain(config)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """Return the files of `folder` that hold the weights: safetensors, or pickles where allowed.

    Raises:
        ConfigError: there are none, a shard is missing, or only pickles are there and not allowed.
    """
    names = [(WEIGHTS, WEIGHTS_INDEX)] + ([(PICKLE, PICKLE_INDEX)] if allow_pickle else [])
    for single, index in names:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder, index)
    if (folder / PICKLE).is_file() or (folder / PICKLE_INDEX).is_file():
        raise ConfigError(f"{folder} {no_weights(allow_pickle)}")
    raise ConfigError(f"{folder} holds no weights: there is no {WEIGHTS} and no {WEIGHTS_INDEX}")


def no_weights(allow_pickle: bool) -> str:
    """Return what a folder without usable weights lacks, as the end of a sentence."""
    if allow_pickle:
        return f"has no weights: neither {WEIGHTS} nor {PICKLE}"
    return (
        f"has no weights in safetensors ({WEIGHTS}); a pickle ({PICKLE}) is read only with "
        "model.allow_pickle=true"
    )


def _shards(folder: Path, index: str) -> list[Path]:
    content = read_json(folder / index, "the weights' index")
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"{folder / index} has no weight_map; download it again")
    for name in table.values():
        if not check.plain_name(name):
            raise ConfigError(
                f"{folder / index} names {check.shown(name)} as a weight file; it must be the name "
                "of a file beside it"
            )
    shards = [folder / name for name in sorted(set(table.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of {len(shards)} weight files that {index} names, "
            f"the first is {missing[0]}; download them again"
        )
    return shards


def folder_digest(folder: Path, allow_pickle: bool, digests: Path) -> str:
    """Return one SHA-256 over configuration, tokenizer and weights of `folder`.

    Digests of large files are remembered in the file `digests` by path, size and time.
    """
    weights = weight_files(folder, allow_pickle)
    # The index says which tensor is in which file, so it counts with them.
    names = (*FILES, WEIGHTS_INDEX, PICKLE_INDEX)
    found = files_digest([*present(folder, names), *weights], digests)
    pooling = present(folder, [POOLING])
    return digest([found, sha256(pooling[0])]) if pooling else found


def present(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of `names` that `folder` has."""
    return [folder / name for name in names if (folder / name).is_file()]


def files_digest(files: Sequence[Path], digests: Path) -> str:
    """Return one SHA-256 over names and contents of `files`; `digests` as in `folder_digest`."""
    return digest({path.name: _remembered_sha256(path, digests) for path in files})


def _remembered_sha256(path: Path, digests: Path) -> str:
    facts = path.stat()
    if facts.st_size < REMEMBERED_FROM_BYTES:
        return sha256(path)
    known = recall(digests)
    known = known if isinstance(known, dict) else {}
    stamp = [facts.st_size, facts.st_mtime_ns]
    entry = known.get(str(path))
    if isinstance(entry, list) and len(entry) == 3 and entry[:2] == stamp:
        return str(entry[2])
    sha = sha256(path)
    known[str(path)] = [*stamp, sha]
    remember(digests, known)
    return sha
