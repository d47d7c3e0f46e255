"""From a nanoGPT checkpoint to a folder in Hugging Face layout that every method reads.

A nanoGPT is a GPT-2 with exact GELU, and is stored here as transformers' `GPT2LMHeadModel`:
linear maps transposed (its Conv1D holds [in, out]), the compiler's prefix `_orig_mod.` and the
causal masks of old checkpoints left out, a head that is the embedding stored once. GPT-2 has every
bias; the ones that a checkpoint lacks are stored as zeros: 11 * n_embd a block and n_embd at the
end, 25,728 values or 0.24 per cent of the character model of nanoGPT's README. `config.json` says
how many, under `nanogpt`. No other decoder of transformers comes nearer: OPT can do without the
biases of linear maps but not of norms, and splits the attention's map in three.

Nothing but tensors and plain data is unpickled (`torch.load(weights_only=True)`).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from harness.folders import CONFIG, TOKENIZER_FILES, WEIGHTS, present
from harness.nanogpt_vocabulary import character_tokenizer, read_meta
from kernels.errors import ConfigError
from methods.layers import check_finite

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
LARGEST_SIZE = 1 << 24
"""Of any of them; the largest GPT-2 has a vocabulary of 50,257, and shapes are products."""
PREFIX = "_orig_mod."
MASKS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
LINEARS = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
"""Linear map of a block -> its outputs and inputs as multiples of n_embd."""
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
GPT2_END, GPT2_TOKENS = "<|endoftext|>", 50257


@dataclass(frozen=True)
class Checkpoint:
    """What of a checkpoint counts: `sizes` is `model_args`, `tensors` its weights by name."""

    sizes: dict[str, int]
    tensors: dict[str, Tensor]
    dropout: float


def convert(checkpoint: Path, meta: Path | None, tokenizer: Path | None, into: Path) -> None:
    """Write the model of `checkpoint` as the folder `into`, whole or not at all.

    The tokenizer is that of the characters in `meta`, else GPT-2's from the folder `tokenizer`.

    Raises:
        ConfigError: a file cannot be read, holds more than plain data, or the parts do not fit.
    """
    read = read_checkpoint(checkpoint)
    weights, zeros, tied = hugging_face(read, checkpoint)
    made = _tokenizer(meta, tokenizer, read.sizes["vocab_size"])
    into.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
    try:
        made.save_pretrained(temporary)
        end = made.eos_token_id
        config = {**_configuration(read, tied), "bos_token_id": end, "eos_token_id": end}
        config["nanogpt"] = {"zero_biases": zeros, "tied": tied}
        (temporary / CONFIG).write_text(json.dumps(config, indent=1))
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        temporary.chmod(0o755)
        try:
            temporary.rename(into)
        except OSError:
            # Another process was faster; what it made has the same name, so the same content.
            if not (into / CONFIG).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Return what is in nanoGPT's `ckpt.pt`.

    Raises:
        ConfigError: the file is missing, damaged, holds more than tensors and plain data, or is no
            nanoGPT checkpoint.
    """
    where = f"model.checkpoint={path}"
    _check_archive(path, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch makes of a damaged file can be any error
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is not None:
            raise ConfigError(
                f"{where} is refused: it holds more than tensors and plain data ({named[1]}), and "
                "nothing else is unpickled; save it again with torch.save({'model': "
                "model.state_dict(), 'model_args': model_args}, FILE)"
            ) from error
        raise ConfigError(
            f"{where} cannot be read as a file of torch.save ({type(error).__name__}); it must be "
            "the ckpt.pt that nanoGPT's train.py wrote"
        ) from error
    args, state = (
        content.get(key) if isinstance(content, dict) else None for key in ("model_args", "model")
    )
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise ConfigError(
            f"{where} is no nanoGPT checkpoint: it holds no model and model_args; it must be the "
            "ckpt.pt that nanoGPT's train.py wrote"
        )
    for name in SIZES:
        if type(args.get(name)) is not int or not 1 <= args[name] <= LARGEST_SIZE:
            raise ConfigError(
                f"{where}: model_args has {name} {args.get(name)!r}; it must be a whole number"
            )
    dropout = args.get("dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(
            f"{where}: model_args has dropout {dropout!r:.60}; it must be at least 0 and below 1"
        )
    tensors = {str(name).removeprefix(PREFIX): tensor for name, tensor in state.items()}
    kept = {name: tensor for name, tensor in tensors.items() if not MASKS.fullmatch(name)}
    for name, tensor in kept.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ConfigError(f"{where}: {name} is no tensor of floating point numbers")
        check_finite(name, tensor)
    return Checkpoint({name: args[name] for name in SIZES}, kept, float(dropout))


def _check_archive(path: Path, where: str) -> None:
    """Refuse what is no archive as torch.save writes it, whose parts are stored as they are.

    Its older format is one pickle behind another, with sizes that torch believes; a compressed
    part can be a thousand times as large as the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        held = sum(part.file_size for part in parts)
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("a part is compressed")
        if held > path.stat().st_size:
            raise ValueError("its parts overlap")
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{where} cannot be read as a file of torch.save ({error}); it must be the ckpt.pt "
            "that nanoGPT's train.py wrote"
        ) from error


def hugging_face(read: Checkpoint, path: Path) -> tuple[dict[str, Tensor], int, bool]:
    """Return (weights as GPT2LMHeadModel names and lays them out, zeros added, head tied).

    Raises:
        ConfigError: a tensor is missing, unknown or of another shape than `model_args` say.
    """
    shapes = _shapes(read.sizes)
    unknown = sorted(set(read.tensors) - set(shapes) - {HEAD})
    missing = sorted(
        name for name in shapes if name not in read.tensors and not name.endswith(".bias")
    )
    for what, names in (("lacks", missing), ("holds unknown", unknown)):
        if names:
            raise ConfigError(
                f"model.checkpoint={path} {what} {len(names)} of nanoGPT's tensors, the first is "
                f"{names[0]}; the file must be the ckpt.pt that nanoGPT's train.py wrote"
            )
    head = read.tensors.get(HEAD)
    tied = head is None or torch.equal(head, read.tensors[EMBEDDING])
    if not tied:
        shapes[HEAD] = shapes[EMBEDDING]
    weights, zeros = {}, 0
    transposed = tuple(f"{name}.weight" for name in LINEARS)
    for name, shape in shapes.items():
        tensor = read.tensors.get(name)
        if tensor is None:
            zeros += shape[0]
            tensor = torch.zeros(shape, dtype=read.tensors[EMBEDDING].dtype)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"model.checkpoint={path}: {name} is {list(tensor.shape)}, but model_args say "
                f"{list(shape)}"
            )
        # A clone: tensors that share memory with a larger one cannot be stored as safetensors.
        weights[name] = (tensor.T if name.endswith(transposed) else tensor).clone().contiguous()
    return weights, zeros, tied


def _shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter as nanoGPT lays it out, all biases included."""
    width = sizes["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (sizes["vocab_size"], width),
        "transformer.wpe.weight": (sizes["block_size"], width),
    }
    norms = ["transformer.ln_f"]
    for index in range(sizes["n_layer"]):
        block = f"transformer.h.{index}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        for name, (out, into) in LINEARS.items():
            shapes[f"{block}.{name}.weight"] = (out * width, into * width)
            shapes[f"{block}.{name}.bias"] = (out * width,)
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    return shapes


def _configuration(read: Checkpoint, tied: bool) -> dict[str, Any]:
    """Return the content of config.json; nanoGPT's GELU is the exact one, unlike GPT-2's."""
    sizes = read.sizes
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu",
        "vocab_size": sizes["vocab_size"],
        "n_positions": sizes["block_size"],
        "n_embd": sizes["n_embd"],
        "n_layer": sizes["n_layer"],
        "n_head": sizes["n_head"],
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": tied,
        "dtype": str(read.tensors[EMBEDDING].dtype).removeprefix("torch."),
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), read.dropout),
    }


def _tokenizer(meta: Path | None, folder: Path | None, rows: int) -> Any:
    """Return the transformers tokenizer for a vocabulary of `rows`."""
    if meta is not None:
        known = read_meta(meta)
        if max(known.values()) >= rows:
            raise ConfigError(
                f"model.meta={meta} does not fit the checkpoint: it has id {max(known.values())}, "
                f"but the model's vocabulary has {rows} entries"
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=character_tokenizer(known), clean_up_tokenization_spaces=False
        )
    if rows < GPT2_TOKENS:
        raise ConfigError(
            f"the checkpoint's vocabulary has {rows} entries, GPT-2's has {GPT2_TOKENS}: it is a "
            "model of characters; give its vocabulary with model.meta=meta.pkl"
        )
    assert folder is not None
    files = {path.name: path for path in present(folder, TOKENIZER_FILES)}
    try:
        if "tokenizer.json" in files:
            return PreTrainedTokenizerFast(
                tokenizer_file=str(files["tokenizer.json"]), eos_token=GPT2_END
            )
        return GPT2Tokenizer(vocab=str(files["vocab.json"]), merges=str(files["merges.txt"]))
    except Exception as error:  # tokenizers raises no narrower class
        raise ConfigError(
            f"model.tokenizer: GPT-2's tokenizer in {folder} cannot be read: {error}"
        ) from error
