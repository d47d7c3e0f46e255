"""Checkpoints in GPTQ and AWQ format: what they hold, and their weights decoded by our own code.

A folder in Hugging Face layout. The codes of a matrix [out, in] are stored in int32 words, from the
lowest bits up; 3-bit codes lie across words (32 codes in 3 words):

- GPTQ: `qweight` [in * bits / 32, out], words along `in`; `qzeros` [groups, out * bits / 32];
  `scales` [groups, out]; `g_idx` int32 [in], the group of each input, which act_order permutes.
  Version `gptq` stores zero points less 1, subtracted from the packed words; `gptq_v2` as they are.
- AWQ, version `gemm`: `qweight` [in, out / 8], words along `out`, whose eight codes stand in the
  order 0, 2, 4, 6, 1, 3, 5, 7; `qzeros` [groups, out / 8] likewise; `scales` [groups, out].

weight = scale * (code - zero_point) in both. Nothing here uses the library that wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods.base import Matrix
from methods.files import opened, read_object, whole
from methods.patterns import check_patterns

Format = Literal["gptq", "awq"]

WORD = 32
AWQ_BITS = 4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
CONFIG_FILES = ("quantize_config.json", "quant_config.json")
READABLE = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
MOST_BITS, LARGEST_GROUP = 8, 1 << 20


@dataclass(frozen=True)
class Scheme:
    """What a checkpoint's own quantization config says.

    Attributes:
        kind: `gptq` or `awq`.
        version: of the layout: `gptq`, `gptq_v2`, `gemm`, or one that only the library reads.
        made_by: the tools that say they made it.
    """

    kind: str
    version: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    made_by: tuple[str, ...] = ()

    @property
    def zeros_in_doubt(self) -> bool:
        """Whether a zero point of 0 may have spoiled its neighbours: AutoGPTQ packs 0 less 1 so."""
        own = any("gptqmodel" in maker for maker in self.made_by)
        return self.version == "gptq" and not self.symmetric and not own


def scheme_of(folder: Path) -> Scheme:
    """Return the scheme of the checkpoint in `folder`.

    Raises:
        ConfigError: it has no quantization config, or one of another kind, or one that says
            something that cannot be.
    """
    stated = _quantization_config(folder)
    for key in ("modules_to_not_convert", "dynamic"):
        check_patterns(f"{key} of {folder}", stated.get(key))
    kind = str(stated.get("quant_method", stated.get("method", "gptq"))).lower()
    if kind not in READABLE:
        raise ConfigError(f"{folder} is quantized as {kind!r}; GPTQModel loads gptq and awq here")
    version = str(
        stated.get("checkpoint_format") or stated.get("format") or stated.get("version") or kind
    ).lower()
    try:
        bits, size = _first(stated, "bits", "w_bit"), _first(stated, "group_size", "q_group_size")
    except KeyError as error:
        raise ConfigError(
            f"the quantization config of {folder} does not say {error}; it must say bits and "
            "group_size"
        ) from error
    if not whole(bits, 1, MOST_BITS) or not (size == -1 or whole(size, 1, LARGEST_GROUP)):
        raise ConfigError(
            f"the quantization config of {folder} says {bits!r:.40} bits and group_size "
            f"{size!r:.40}; it must be 1 to {MOST_BITS} bits, and -1 or 1 and more inputs a group"
        )
    return Scheme(
        kind=kind,
        version="gemm" if version == "awq" else version,
        bits=bits,
        group_size=int(size),
        symmetric=bool(stated.get("sym", not stated.get("zero_point", False))),
        act_order=bool(stated.get("desc_act", False)),
        made_by=_makers(stated),
    )


def _makers(stated: Mapping[str, Any]) -> tuple[str, ...]:
    meta = stated.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    found = makers if isinstance(makers, list) else [makers]
    return tuple(maker for maker in found if isinstance(maker, str))


def _first(stated: Mapping[str, Any], name: str, other: str) -> Any:
    """Return what is said under `name`, or under AutoAWQ's `other`."""
    return stated[other] if other in stated else stated[name]


def _quantization_config(folder: Path) -> Mapping[str, Any]:
    stated = read_object(folder / "config.json").get("quantization_config")
    if isinstance(stated, Mapping):
        return stated
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            apart = read_object(folder / name)
            return {"quant_method": "awq", **apart} if "w_bit" in apart else apart
    raise ConfigError(f"{folder} says nowhere how it is quantized (quantization_config)")


def stored_bits(matrix: Matrix, kind: Format, bits: int, group_size: int) -> int:
    """Return the bits of `matrix`: codes; a zero point and a scale a group; GPTQ: 32 an input."""
    groups = 1 if group_size == -1 else matrix.in_features // group_size
    stored = bits * matrix.weights + (bits + 16) * groups * matrix.out_features
    return stored + (32 * matrix.in_features if kind == "gptq" else 0)


def tensor_names(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield (file, tensor name) of the safetensors files in `folder`."""
    for path in sorted(folder.glob("*.safetensors")):
        with opened(path) as tensors:
            names = list(tensors.keys())
        for name in names:
            yield path, name


def matrices(folder: Path) -> list[Matrix]:
    """Return the matrices that the checkpoint in `folder` holds quantized, by name.

    Raises:
        ConfigError: it holds none as safetensors, or parts that do not fit together.
    """
    scheme = scheme_of(folder)
    awq = scheme.kind == "awq"
    shapes: dict[str, tuple[int, ...]] = {}
    for path, name in tensor_names(folder):
        if name.rpartition(".")[2] in PARTS:
            with opened(path) as tensors:
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    found = []
    for name in sorted(shapes):
        owner, _, part = name.rpartition(".")
        if part != "qweight":
            continue
        scales = shapes.get(f"{owner}.scales", ())
        if len(scales) != 2 or len(shapes[name]) != 2:
            raise ConfigError(f"{folder}: {owner} has no scales and codes of two dimensions")
        out_features = scales[-1]
        in_features = shapes[name][0] if awq else _inputs(owner, shapes, scheme.bits)
        # A head stands outside the numbered decoder blocks.
        inside = any(piece.isdigit() for piece in owner.split("."))
        found.append(Matrix(owner, "block" if inside else "head", out_features, in_features))
    if not found:
        raise ConfigError(f"{folder} holds no safetensors file with quantized matrices (qweight)")
    return found


def _inputs(owner: str, shapes: Mapping[str, tuple[int, ...]], bits: int) -> int:
    if len(shapes.get(f"{owner}.g_idx", ())) == 1:
        return shapes[f"{owner}.g_idx"][0]
    return shapes[f"{owner}.qweight"][0] * WORD // bits


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes int64 [..., n * 32 / bits] of words int32 [..., n], lowest bits first."""
    stream = words.to(torch.int64) & 0xFFFFFFFF
    count = words.shape[-1] * WORD // bits
    start = torch.arange(count, device=words.device) * bits
    word, shift = start // WORD, start % WORD
    following = stream[..., (word + 1).clamp(max=words.shape[-1] - 1)]
    # Two neighbouring words hold every code whole; 64-bit integers hold the two.
    wide = stream[..., word] | (following << WORD)
    codes: Tensor = (wide >> shift) & ((1 << bits) - 1)
    return codes


@dataclass(frozen=True)
class Integers:
    """What is stored for a matrix: weight[o, i] = scale[o, g] * (code[o, i] - zero_point[o, g]).

    Attributes:
        codes: uint8 [out, in].
        scale: [out, groups], in the type it is stored in.
        zero_point: uint8 [out, groups].
        groups: int64 [in], the group g of each input i.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    groups: Tensor

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [out, in]."""
        scale, zero_point = self.scale.float(), self.zero_point.float()
        return scale[:, self.groups] * (self.codes.float() - zero_point[:, self.groups])


def read_gptq(parts: Mapping[str, Tensor], version: str) -> Integers:
    """Return what the tensors `PARTS` of one matrix hold.

    Raises:
        ConfigError: `version` is not one that is read here, or the tensors do not fit together.
    """
    if version not in READABLE["gptq"]:
        raise ConfigError(f"GPTQ checkpoints of format {version!r} are not decoded here")
    _check_types(parts)
    qweight, scales, qzeros = parts["qweight"], parts["scales"], parts["qzeros"]
    bits = qzeros.shape[1] * WORD // scales.shape[1]
    fits = 1 <= bits <= MOST_BITS and qzeros.shape[1] == -(-scales.shape[1] * bits // WORD)
    if not fits or qzeros.shape[0] != scales.shape[0] or qweight.shape[1] != scales.shape[1]:
        raise _misfit(parts)
    codes = unpack(qweight.T.contiguous(), bits)
    groups = _groups(parts.get("g_idx"), codes.shape[1], scales.shape[0])
    zeros = _zero_points(parts["qzeros"], bits, version)
    return _integers(bits, codes[:, : groups.numel()], scales, zeros, groups)


def _groups(stored: Tensor | None, columns: int, count: int) -> Tensor:
    """Return the group of each of `columns` inputs, as stored or in their order, int64 [in]."""
    if stored is None:
        if columns % count:
            raise ConfigError(f"{count} groups do not divide {columns} inputs")
        return torch.arange(columns) // (columns // count)
    groups = stored.long()
    if groups.ndim != 1 or not 0 < len(groups) <= columns:
        raise ConfigError(f"g_idx has shape {list(groups.shape)}, and there are {columns} inputs")
    if int(groups.min()) < 0 or int(groups.max()) >= count:
        raise ConfigError(f"g_idx names a group that is none of the {count} there are")
    return groups


def _check_types(parts: Mapping[str, Tensor]) -> None:
    """Raise ConfigError where a part is missing, empty, or of another type than the format's."""
    for part in ("qweight", "qzeros", "scales"):
        if part not in parts:
            raise ConfigError(f"a quantized matrix has no {part}")
        tensor = parts[part]
        if (tensor.dtype == torch.int32) == (part == "scales") or tensor.ndim != 2:
            raise _misfit(parts)
        if not tensor.numel() or tensor.is_complex():
            raise _misfit(parts)


def _misfit(parts: Mapping[str, Tensor]) -> ConfigError:
    said = (f"{name} {part.dtype} {list(part.shape)}" for name, part in parts.items())
    return ConfigError(f"the parts of a quantized matrix do not fit together: {', '.join(said)}")


def decode_gptq(parts: Mapping[str, Tensor], version: str) -> Tensor:
    """Return the float32 weight [out, in] of the tensors `PARTS` of one matrix; see `read_gptq`."""
    return read_gptq(parts, version).dequantize()


def _integers(bits: int, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Integers:
    """Return codes [out, in], scales and zero points [groups, out] as `Integers`."""
    return Integers(
        bits,
        codes.to(torch.uint8).contiguous(),
        scales.T.contiguous(),
        zeros.T.to(torch.uint8).contiguous(),
        groups,
    )


def _zero_points(qzeros: Tensor, bits: int, version: str) -> Tensor:
    """Return zero points int64 [groups, out]."""
    if version == "gptq_v2":
        return unpack(qzeros, bits)
    if WORD % bits:
        return (unpack(qzeros, bits) + 1) & ((1 << bits) - 1)
    # The 1s were subtracted from whole words: a zero point of 0 borrowed from its neighbour.
    ones = sum(1 << shift for shift in range(0, WORD, bits))
    return unpack((qzeros.to(torch.int64) + ones) & 0xFFFFFFFF, bits)


def read_awq(parts: Mapping[str, Tensor], version: str) -> Integers:
    """Return what the tensors `PARTS` of one matrix of 4 bits hold.

    Raises:
        ConfigError: `version` is not one that is read here, or the tensors do not fit together.
    """
    if version not in READABLE["awq"]:
        raise ConfigError(f"AWQ checkpoints of version {version!r} are not decoded here")
    _check_types(parts)
    scales = parts["scales"]
    codes, zeros = (_awq_codes(parts[part]) for part in ("qweight", "qzeros"))
    if zeros.shape != scales.shape or codes.shape[1] != scales.shape[1]:
        raise _misfit(parts)
    groups = _groups(None, codes.shape[0], scales.shape[0])
    return _integers(AWQ_BITS, codes.T, scales, zeros, groups)


def decode_awq(parts: Mapping[str, Tensor], version: str) -> Tensor:
    """Return the float32 weight [out, in] of the tensors `PARTS` of one matrix; see `read_awq`."""
    return read_awq(parts, version).dequantize()


def _awq_codes(words: Tensor) -> Tensor:
    stored = unpack(words, AWQ_BITS).reshape(*words.shape, len(AWQ_ORDER))
    codes = torch.empty_like(stored)
    codes[..., list(AWQ_ORDER)] = stored
    return codes.flatten(-2)
