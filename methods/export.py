"""`python -m methods.export ARTEFACT INTO --format gptq`: packed artefacts as GPTQ or AWQ files.

An artefact of `rtn` becomes a checkpoint in GPTQ or AWQ format (`methods.gptq_format`), which
GPTQModel loads. Codes, zero points and scales are carried over as they are, so the dequantized
weights are equal bit for bit; what a format cannot hold is refused. Biases become float16, as both
formats have them.

GPTQ: a symmetric artefact becomes version `gptq`, which stores zero points less 1, an asymmetric
`gptq_v2`, where they can be 0. AWQ: 4 bits, version `gemm`; symmetric: zero points of 8.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.errors import ConfigError
from kernels.pack import unpack
from kernels.reference import unpack_zero_point
from methods.artefact import LAYERS, WEIGHTS, Facts
from methods.gptq_format import AWQ_BITS, AWQ_ORDER, WORD, Format
from methods.linear import Layout

FORMATS: tuple[Format, ...] = ("gptq", "awq")
BUFFERS = ("packed", "scale", "zero_point")
MULTIPLE = 32
"""Both widths of a matrix in the two formats, as GPTQModel reads them."""

EXIT_USER_ERROR = 2


@dataclass(frozen=True)
class Exported:
    """One stored matrix: codes uint8 [out, in], scale and zero_point uint8 [out, groups]."""

    layout: Layout
    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def export(artefact: Path, into: Path, kind: Format) -> None:
    """Write the artefact in folder `artefact` as a checkpoint of format `kind` into folder `into`.

    Raises:
        ConfigError: there is no such artefact, or the format cannot hold what it stores.
    """
    layers = _layers(artefact)
    layouts = {name: _layout(name, facts, kind) for name, facts in layers.items()}
    common = _common(layouts)
    document = json.loads((artefact / LAYERS).read_text(encoding="utf-8"))
    tensors = load_file(artefact / WEIGHTS)
    tied: Mapping[str, str] = document["tied"]
    written: dict[str, Tensor] = {}
    for name, layout in layouts.items():
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in BUFFERS}
        matrix = _unpacked(name, layout, parts)
        bias = tensors.pop(f"{name}.bias", None)
        if bias is not None:
            written[f"{name}.bias"] = bias.to(torch.float16)
        packed = gptq_parts(matrix) if kind == "gptq" else awq_parts(matrix)
        written |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
    # A model that ties its head loads the one parameter and ties it again.
    written |= {name: tensor for name, tensor in tensors.items() if name not in tied}
    into.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in written.items()}, into / WEIGHTS, {"format": "pt"})
    stated = _stated(common, kind, _spared(written, layouts))
    _write_configuration(artefact, into, stated)


def _layers(artefact: Path) -> dict[str, Facts]:
    try:
        document = json.loads((artefact / LAYERS).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{artefact} is no artefact of this project (no {LAYERS}); give the folder that a run "
            "of method=rtn left under runs_dir/cache/artefacts"
        ) from error
    layers: dict[str, Facts] = document["layers"]
    return layers


def _layout(name: str, facts: Facts, kind: Format) -> Layout:
    """Return the layout of a matrix; raises ConfigError where the format cannot hold it."""
    if facts.get("ordered"):
        raise ConfigError(
            f"layer {name} has its inputs in another order (act_order); it came from a GPTQ "
            "checkpoint: use that one"
        )
    try:
        layout = Layout(**facts)
    except TypeError as error:
        raise ConfigError(
            f"layer {name} is not stored as method=rtn stores matrices; export artefacts of rtn"
        ) from error
    if layout.kind != "linear":
        what = {"embedding": "an embedding", "experts": "a stack of experts"}[layout.kind]
        raise ConfigError(f"{name} is {what}, and the {kind} format holds linear maps alone")
    if not any(piece.isdigit() for piece in name.split(".")):
        raise ConfigError(
            f"{name} is the head, which this export leaves in floating point; quantize with "
            "method.head=false"
        )
    if layout.scale_dtype != "float16":
        raise ConfigError(
            f"layer {name} has scales in {layout.scale_dtype}, and the {kind} format stores "
            "float16; quantize with method.scale_dtype=float16"
        )
    if kind == "awq" and layout.bits != AWQ_BITS:
        raise ConfigError(
            f"layer {name} has {layout.bits} bits, and the awq format has {AWQ_BITS}; "
            "use --format gptq"
        )
    if layout.covered != layout.in_features:
        raise ConfigError(
            f"layer {name}: rows of {layout.in_features} inputs are padded to {layout.covered}, "
            f"which the {kind} format cannot say; choose a group_size that divides the width"
        )
    if layout.in_features % MULTIPLE or layout.out_features % MULTIPLE:
        raise ConfigError(
            f"layer {name} is {layout.out_features} x {layout.in_features}; the {kind} format "
            f"packs both widths in multiples of {MULTIPLE}; keep it with method.keep=['{name}']"
        )
    return layout


def _common(layouts: Mapping[str, Layout]) -> Layout:
    """Return a layout that speaks for all; raises ConfigError where they differ in their scheme."""
    schemes = {(one.bits, one.group_size, one.symmetric) for one in layouts.values()}
    if len(schemes) != 1:
        raise ConfigError(
            f"the artefact has matrices of {len(schemes)} schemes (bits, group size, symmetric), "
            "and a checkpoint states one; export artefacts of one scheme"
        )
    return next(iter(layouts.values()))


def _unpacked(name: str, layout: Layout, parts: Mapping[str, Tensor | None]) -> Exported:
    packed, scale = parts["packed"], parts["scale"]
    if packed is None or scale is None:
        raise ConfigError(f"{WEIGHTS} lacks the tensors of layer {name}; quantize it again")
    zeros = unpack_zero_point(parts["zero_point"], scale, layout.bits)
    if zeros is None:
        zeros = torch.full(scale.shape, 2 ** (layout.bits - 1), dtype=torch.uint8)
    # One scale a matrix is one for each row.
    shape = (layout.out_features, scale.shape[-1])
    codes = unpack(packed, layout.bits, layout.in_features)
    return Exported(layout, codes, scale.expand(shape), zeros.expand(shape))


def gptq_parts(matrix: Exported) -> dict[str, Tensor]:
    """Return the tensors of a matrix in GPTQ format: version 1 where symmetric, else 2."""
    bits, layout = matrix.layout.bits, matrix.layout
    # Version 1 stores zero points less 1.
    zeros = matrix.zero_point.to(torch.int64) - int(layout.symmetric)
    size = layout.in_features if layout.group_size == -1 else layout.group_size
    return {
        "qweight": pack_words(matrix.codes, bits).T,
        "qzeros": pack_words(zeros.T, bits),
        "scales": matrix.scale.T,
        "g_idx": torch.arange(layout.in_features, dtype=torch.int32) // size,
    }


def awq_parts(matrix: Exported) -> dict[str, Tensor]:
    """Return the tensors of a matrix of 4 bits in the gemm version of the AWQ format."""
    return {
        "qweight": _awq_words(matrix.codes.T),
        "qzeros": _awq_words(matrix.zero_point.T),
        "scales": matrix.scale.T,
    }


def _awq_words(codes: Tensor) -> Tensor:
    eights = codes.reshape(codes.shape[0], -1, len(AWQ_ORDER))[..., list(AWQ_ORDER)]
    return pack_words(eights.flatten(1), AWQ_BITS)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [rows, n] into int32 words [rows, n * bits / 32], lowest bits first.

    32 codes fill `bits` words, so `n` is a multiple of 32 where 32 is none of `bits`; the inverse
    of `methods.gptq_format.unpack`.
    """
    start = torch.arange(codes.shape[1]) * bits
    word, shift = start // WORD, start % WORD
    wide = codes.to(torch.int64) << shift
    # One word more, for what the last code does not have beyond the end.
    words = torch.zeros(codes.shape[0], codes.shape[1] * bits // WORD + 1, dtype=torch.int64)
    words.index_add_(1, word, wide & 0xFFFFFFFF)
    words.index_add_(1, word + 1, wide >> WORD)
    words = words[:, :-1]
    # The same 32 bits as a signed number.
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).to(torch.int32)


def _spared(written: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> list[str]:
    """Return the matrices beside those of the artefact that lie in numbered blocks."""
    found = []
    for name, tensor in written.items():
        owner, _, part = name.rpartition(".")
        inside = any(piece.isdigit() for piece in owner.split("."))
        if part == "weight" and tensor.ndim == 2 and inside and owner not in layouts:
            found.append(owner)
    return found


def _stated(layout: Layout, kind: Format, spared: Sequence[str]) -> dict[str, Any]:
    """Return the quantization config of the checkpoint."""
    version = "gemm" if kind == "awq" else "gptq" if layout.symmetric else "gptq_v2"
    stated: dict[str, Any] = {
        "quant_method": kind,
        "bits": layout.bits,
        "group_size": layout.group_size,
        "sym": layout.symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["quantbench"]},
    }
    if kind == "awq":
        stated |= {"zero_point": not layout.symmetric, "version": version}
        if spared:
            stated["modules_to_not_convert"] = list(spared)
    if spared:
        stated["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in spared}
    return stated


def _write_configuration(artefact: Path, into: Path, stated: Mapping[str, Any]) -> None:
    config = json.loads((artefact / "config.json").read_text(encoding="utf-8"))
    whole = json.dumps({**config, "quantization_config": stated}, indent=2)
    (into / "config.json").write_text(whole, encoding="utf-8")
    (into / "quantize_config.json").write_text(json.dumps(stated, indent=2), encoding="utf-8")
    for path in sorted(artefact.glob("*.json")):
        # The tokenizer's, and the settings of generation; the manifest is this project's own.
        if path.name not in ("config.json", LAYERS, "manifest.json"):
            shutil.copyfile(path, into / path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint and print where it is; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m methods.export",
        description="Write the artefact in folder ARTEFACT (of method=rtn) as a checkpoint in GPTQ "
        "or AWQ format into folder INTO.",
    )
    parser.add_argument("artefact", metavar="ARTEFACT", type=Path, help="folder with layers.json")
    parser.add_argument("into", metavar="INTO", type=Path, help="folder to write")
    parser.add_argument("--format", choices=FORMATS, required=True, help="gptq, or awq (4 bits)")
    options = parser.parse_args(arguments)
    try:
        export(options.artefact, options.into, options.format)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{options.format} checkpoint: {options.into}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
