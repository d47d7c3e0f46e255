"""Quantizing with GPTQModel: what `gptq` and `awq` share, from float model to artefact.

GPTQModel reads the model from files, so it is written once as floats. It computes in float32, what
the file holds is exact in it. Its artefact is written again with everything that it left alone in
the checkpoint's own floating type, and with the model's own configuration, which it also changes.
Its fallback to round-to-nearest is off; where it falls back nevertheless, that is an error.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, chdir, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.base import Matrix
from methods.gptq_format import matrices
from methods.gptqmodel_engine import library
from methods.layers import Scope, Selection, bias_of, check_finite, select, weight_of
from methods.library import check_covered, drop_weights, write_checkpoint
from methods.options import need_calibration

WORD = 32
"""GPTQModel packs blocks of 32 inputs and 32 outputs; a width between would be cut silently."""

Log = Mapping[str, str]
"""What the library says of one matrix: `layer`, `module`, `loss`, `samples`, `damp`."""


@dataclass(frozen=True)
class Recipe:
    """How one method uses GPTQModel; the three are called when it can be imported.

    Attributes:
        owner: name of the method.
        config: makes the library's configuration.
        guard: the library works inside it.
        inspect: is shown the folder of the float model and the quantized model, when it is made.
    """

    owner: str
    config: Callable[[], Any]
    guard: Callable[[], AbstractContextManager[None]] = nullcontext
    inspect: Callable[[Path, Any], None] = lambda source, model: None


def select_matrices(
    model: nn.Module, owner: str, keep: Sequence[str], group_size: int, sizes: Sequence[int]
) -> Selection:
    """Return the matrices of the decoder blocks but `keep`; `sizes` are the group sizes there are.

    Raises:
        ConfigError: the model keeps experts in stacks, or a width cannot be divided or packed.
    """
    selection = select(model, Scope(keep=tuple(keep)))
    for matrix in selection.matrices:
        if matrix.count > 1:
            raise ConfigError(
                f"{matrix.name} is a stack of experts, which GPTQModel takes apart and stores "
                f"under other names; method={owner} takes no such models, use method=rtn"
            )
        if group_size > 0 and matrix.in_features % group_size:
            fitting = [size for size in sizes if size > 0 and matrix.in_features % size == 0]
            raise ConfigError(
                f"layer {matrix.name}: its width {matrix.in_features} is not a multiple of "
                f"group_size {group_size}; group sizes that fit it: "
                f"{', '.join(map(str, [*fitting, -1]))} (-1 is per channel)"
            )
        if matrix.in_features % WORD or matrix.out_features % WORD:
            raise ConfigError(
                f"layer {matrix.name} is {matrix.out_features} x {matrix.in_features}; the format "
                f"of {owner} packs both widths in multiples of {WORD}; keep it with "
                f"keep=['{matrix.name}']"
            )
    return selection


def check_group_size(owner: str, size: int, sizes: Sequence[int]) -> None:
    """Raise ConfigError where `size` is none of `sizes`."""
    if size not in sizes:
        raise ConfigError(
            f"group_size is {size}; {owner} takes {', '.join(map(str, sizes))} (-1 is per channel)"
        )


def device() -> str:
    """Return where GPTQModel quantizes: a CUDA device where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_rules(model: nn.Module, selected: Sequence[Matrix]) -> dict[str, dict[str, Any]]:
    """Return GPTQModel's rules that spare the matrices of the blocks outside `selected`."""
    names = {matrix.name for matrix in selected}
    spared = [m.name for m in select(model, Scope()).matrices if m.name not in names]
    return {f"-:^{re.escape(name)}$": {} for name in spared}


def quantize(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    calibration: Tensor | None,
    selected: Sequence[Matrix],
    into: Path,
) -> tuple[list[Log], list[str]]:
    """Quantize `model` with GPTQModel on int64 `calibration`, and write the artefact into `into`.

    Returns what the library logged of each matrix, and notes. `model` loses its weights.

    Raises:
        ConfigError: no tokenizer or text, a weight is not finite, or an architecture that
            GPTQModel does not know.
        RuntimeError: the library left out matrices or text.
    """
    calibration = _check_inputs(recipe.owner, model, tokenizer, calibration, selected)
    into = into.absolute()
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name}.") as scratch:
        source, made = Path(scratch, "float"), Path(scratch, "quantized")
        dtype = write_checkpoint(model, tokenizer, source)
        biased = any(bias_of(model, matrix) is not None for matrix in selected)
        drop_weights(model)
        with library():
            # GPTQModel keeps a log of its own in the folder `logs` of wherever it runs.
            with recipe.guard(), chdir(scratch):
                log, done = _run(source, made, recipe.config(), calibration)
            recipe.inspect(source, done)
        check_covered(f"GPTQModel ({recipe.owner})", selected, [m.name for m in matrices(made)])
        _check_text(log, calibration)
        _finish(source, made, into, dtype)
        tokenizer.save_pretrained(into)
    return log, _notes(dtype, biased)


def _check_inputs(
    owner: str,
    model: Any,
    tokenizer: Any,
    calibration: Tensor | None,
    selected: Sequence[Matrix],
) -> Tensor:
    calibration = need_calibration(owner, calibration)
    if tokenizer is None:
        raise ConfigError(
            f"{owner} needs the model's tokenizer, without which GPTQModel loads no model"
        )
    for matrix in selected:
        check_finite(matrix.name, weight_of(model, matrix))
    with library():
        from gptqmodel.models.auto import SUPPORTED_MODELS
    kind = model.config.model_type
    if kind not in SUPPORTED_MODELS:
        raise ConfigError(
            f"GPTQModel has no definition for models of type {kind!r}; use method=rtn"
        )
    return calibration


def _run(source: Path, made: Path, config: Any, calibration: Tensor) -> tuple[list[Log], Any]:
    """Return what the library logged of each matrix, and the quantized model."""
    from gptqmodel import GPTQModel

    quantizer = GPTQModel.load(str(source), config, dtype=torch.float32)
    ones = [1] * calibration.shape[1]
    samples = [{"input_ids": row.tolist(), "attention_mask": ones} for row in calibration]
    logs = quantizer.quantize(
        samples,
        batch_size=1,
        # By default it drops samples of fewer than 10 tokens.
        calibration_data_min_length=1,
        # The class that packs, which runs on every device.
        backend=f"{config.method.value}_torch",
    )
    quantizer.save(str(made), max_shard_size=None)
    return [entry for entries in logs.values() for entry in entries], quantizer.model


def _check_text(log: Sequence[Log], calibration: Tensor) -> None:
    """Raise RuntimeError where a matrix was not shown all tokens."""
    for entry in log:
        seen = int(entry["samples"])
        if seen != calibration.numel():
            raise RuntimeError(
                f"GPTQModel showed layer {entry['layer']} {entry['module']} {seen} of "
                f"{calibration.numel()} calibration tokens"
            )


def _finish(source: Path, made: Path, into: Path, dtype: torch.dtype) -> None:
    """Write the artefact: packed tensors as they are, other floats in `dtype`."""
    inside = {matrix.name for matrix in matrices(made)}
    (file,) = made.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] in inside:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"{name} does not fit the float16 that the format stores it in")
        elif tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
    into.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        into / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    own = json.loads((made / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = own["quantization_config"]
    (into / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in (made / "quantize_config.json", source / "generation_config.json"):
        if path.is_file():
            shutil.copyfile(path, into / path.name)


def _notes(dtype: torch.dtype, biased: bool) -> list[str]:
    notes = []
    if device() == "cuda":
        notes.append("quantized on the CUDA device")
    if biased and dtype != torch.float16:
        kind = str(dtype).removeprefix("torch.")
        notes.append(f"biases of the quantized matrices are stored in float16; they were {kind}")
    return notes
