"""Readers of weights: artefacts, cache entries, GPTQ, AWQ and bitsandbytes, safetensors headers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.cache import DIGEST_BYTES, Cache
from harness.measures.size import SizeMismatchError, header_sizes
from kernels.errors import ConfigError
from kernels.reference import dequantize_packed
from methods import artefact, bitsandbytes_engine, checkpoint, gptq_format, linear
from methods.affine import Affine, quantize
from methods.base import Matrix
from tests.fuzz.bundle import packed, safetensors, unpacked
from tests.fuzz.mutation import change, json_changes, words
from tests.fuzz.target import Target

KIND, KEY = "tokens", "key"
ARTEFACT_FILES = (artefact.LAYERS, artefact.WEIGHTS)
CHECKPOINT_FILES = ("config.json", "quantize_config.json", "model.safetensors")
MOST_DECODED = 1 << 16


class _Tiny(nn.Module):
    """Two maps, of which one is replaced by stored weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(32, 4, bias=False)
        self.two = nn.Linear(4, 2)


def _skeleton(folder: Path) -> Any:
    """Stand in for that of a whole architecture, which takes transformers milliseconds to build."""
    with torch.device("meta"):
        return _Tiny()


def _artefact_seeds(folder: Path) -> Sequence[bytes]:
    torch.manual_seed(0)
    made = []
    for bits, symmetric, dtype in ((4, False, "float16"), (3, True, "float32")):
        affine = Affine(bits, 16, symmetric, scale_dtype=dtype)
        stored = quantize("one", torch.randn(4, 32), affine)
        layout = linear.Layout.of(Matrix("one", "block", 4, 32), affine)
        module = linear.module_of(layout).fill(stored, None)
        model = _Tiny()
        model.one = module  # type: ignore[assignment]
        save_file(dict(model.state_dict()), folder / artefact.WEIGHTS)
        facts = {"format": artefact.FORMAT, "layers": {"one": module.facts()}, "tied": {}}
        (folder / artefact.LAYERS).write_text(json.dumps(facts))
        made.append(packed(folder, ARTEFACT_FILES))
    return made


def _read_artefact(data: bytes, folder: Path) -> None:
    unpacked(data, folder, ARTEFACT_FILES)
    artefact.skeleton, real = _skeleton, artefact.skeleton
    try:
        model = artefact.load(folder, lambda name, facts: linear.empty(facts), torch.float32)
    finally:
        artefact.skeleton = real
    for module in model.modules():
        if isinstance(module, linear.QuantizedModule):
            layout = module.layout
            if layout.weights <= MOST_DECODED:
                stored = module.stored()
                dequantize_packed(*stored, layout.bits, layout.group_size, layout.in_features)


def _cache_seeds(folder: Path) -> Sequence[bytes]:
    cache = Cache(folder)
    cache.write(KIND, KEY, {"ids": torch.arange(8), "half": torch.zeros(2, 3, dtype=torch.float16)})
    return [cache.path(KIND, KEY).read_bytes()]


def _cache_folder(folder: Path) -> None:
    (folder / KIND).mkdir()


def _read_cache(data: bytes, folder: Path) -> None:
    cache = Cache(folder)
    cache.path(KIND, KEY).write_bytes(data)
    found = cache.read(KIND, KEY)
    for tensor in (found or {}).values():
        tensor.numel()


def _change_cache(data: bytes, generator: random.Random) -> bytes:
    """Change header or body of an entry and put the right digest before it."""
    body = _change_safetensors(data[DIGEST_BYTES:], generator)
    return hashlib.sha256(body).digest() + body


def _change_safetensors(data: bytes, generator: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return words(data, generator)
    if generator.random() < 0.2:
        return words(data, generator)
    return safetensors(change(header, generator), data[8 + length :].hex())


def _safetensors_seeds(folder: Path) -> Sequence[bytes]:
    path = folder / "model.safetensors"
    save_file({"a": torch.arange(4), "b.c": torch.zeros(2, 2, dtype=torch.bfloat16)}, path)
    return [path.read_bytes()]


def _read_header(data: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    sum(header_sizes(path).values())


def _gptq_tensors(groups: int, bits: int = 4) -> dict[str, Tensor]:
    name = "model.layers.0.mlp.up_proj"
    return {
        f"{name}.qweight": torch.arange(32 * bits // 32 * 8, dtype=torch.int32).view(-1, 8),
        f"{name}.qzeros": torch.zeros(groups, 8 * bits // 32, dtype=torch.int32),
        f"{name}.scales": torch.ones(groups, 8, dtype=torch.float16),
        f"{name}.g_idx": torch.arange(32, dtype=torch.int32) // (32 // groups),
        "model.norm.weight": torch.ones(4),
    }


def _awq_tensors() -> dict[str, Tensor]:
    name = "model.layers.0.mlp.up_proj"
    return {
        f"{name}.qweight": torch.arange(32, dtype=torch.int32).view(32, 1),
        f"{name}.qzeros": torch.zeros(2, 1, dtype=torch.int32),
        f"{name}.scales": torch.ones(2, 8, dtype=torch.float16),
    }


def _nf4_tensors() -> dict[str, Tensor]:
    name = "model.layers.0.mlp.up_proj"
    facts = {"shape": [4, 32], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.5}
    state = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return {
        f"{name}.weight": torch.zeros(64, 1, dtype=torch.uint8),
        f"{name}.weight.quant_map": torch.linspace(-1, 1, 16),
        f"{name}.weight.absmax": torch.zeros(2, dtype=torch.uint8),
        f"{name}.weight.nested_absmax": torch.ones(1),
        f"{name}.weight.nested_quant_map": torch.linspace(-1, 1, 256),
        f"{name}.weight.quant_state.bitsandbytes__nf4": state,
    }


def _checkpoint_seeds(folder: Path) -> Sequence[bytes]:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
    gptq |= {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.6"]}}
    awq = {"w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM"}
    awq |= {"modules_to_not_convert": ["lm_head", "model.layers.0.*"]}
    group = {"targets": ["re:.*proj$"], "weights": {"num_bits": 8, "strategy": "channel"}}
    compressed = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    compressed |= {"ignore": ["lm_head"]}
    hqq = {"quant_method": "hqq"}
    hqq |= {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}
    made = []
    for tensors, files in (
        (_gptq_tensors(2), {"config.json": {"model_type": "llama", "quantization_config": gptq}}),
        (_awq_tensors(), {"config.json": {"model_type": "llama"}, "quantize_config.json": awq}),
        (
            _nf4_tensors(),
            {"config.json": {"quantization_config": {"quant_method": "bitsandbytes"}}},
        ),
        ({"a": torch.zeros(1)}, {"config.json": {"quantization_config": compressed}}),
        ({"a": torch.zeros(1)}, {"config.json": {"quantization_config": hqq}}),
    ):
        for name in CHECKPOINT_FILES:
            (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        save_file(tensors, folder / "model.safetensors")
        made.append(packed(folder, CHECKPOINT_FILES))
    return made


def _read_checkpoint(data: bytes, folder: Path) -> None:
    unpacked(data, folder, CHECKPOINT_FILES)
    scheme = checkpoint.scheme_of(folder)
    checkpoint._stored(folder)
    if scheme.kind == "bitsandbytes":
        _decode_bitsandbytes(folder)
    if scheme.kind not in ("gptq", "awq"):
        return
    found = gptq_format.scheme_of(folder)
    read = gptq_format.read_gptq if found.kind == "gptq" else gptq_format.read_awq
    for matrix in gptq_format.matrices(folder):
        parts = {}
        for path, name in gptq_format.tensor_names(folder):
            owner, _, part = name.rpartition(".")
            if owner == matrix.name and part in gptq_format.PARTS:
                with gptq_format.opened(path) as tensors:
                    parts[part] = tensors.get_tensor(name)
        integers = read(parts, found.version)
        integers.dequantize()


def _decode_bitsandbytes(folder: Path) -> None:
    stored = bitsandbytes_engine._stored(folder)
    for matrix in bitsandbytes_engine.matrices(folder):
        if matrix.out_features * matrix.in_features <= MOST_DECODED:
            parts = bitsandbytes_engine._read(matrix.name, stored[matrix.name])
            bitsandbytes_engine.decode(parts)


TARGETS = (
    Target("artefact", _read_artefact, (ConfigError,), _artefact_seeds, json_changes()),
    Target("cache", _read_cache, (), _cache_seeds, _change_cache, setup=_cache_folder),
    Target(
        "safetensors", _read_header, (SizeMismatchError,), _safetensors_seeds, _change_safetensors
    ),
    Target("checkpoint", _read_checkpoint, (ConfigError,), _checkpoint_seeds, json_changes()),
)
