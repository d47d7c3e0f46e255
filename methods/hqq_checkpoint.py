"""HQQ checkpoints that transformers 4 saved, put into the container of `methods.hqq`.

Their tensors are those of `HQQLinear.state_dict()`, as in our own; transformers 5 no longer reads
them. A folder made by transformers 4.51.3 with hqq 0.2.8 on a small Llama was read and measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods.artefact import dtype_name


def adopt(checkpoint: Path, model: Any, into: Path) -> None:
    """Write an artefact of the checkpoint into `into`; `model` is its shape, on meta.

    Raises:
        ConfigError: it holds no such matrix, or options that this project does not write.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    layers: dict[str, artefacts.Facts] = {}
    for name in tensors:
        owner, _, part = name.rpartition(".")
        if part == "W_q":
            own = {key: t for key, t in tensors.items() if key.rpartition(".")[0] == owner}
            layers[owner] = _adopted_facts(owner, own)
    if not layers:
        raise ConfigError(f"{checkpoint} says it is quantized by hqq, but holds no matrix W_q")
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    apart = f"{head}.weight" in tensors or head in layers
    tied = {} if apart else {f"{head}.weight": f"{embedding}.weight"}
    save_file(tensors, into / artefacts.WEIGHTS, {"format": "pt"})
    facts = {"format": artefacts.FORMAT, "layers": layers, "tied": tied}
    (into / artefacts.LAYERS).write_text(json.dumps(facts, indent=1))


def _adopted_facts(owner: str, tensors: dict[str, Tensor]) -> artefacts.Facts:
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    for flag in ("view_as_float", "quant_scale", "quant_zero"):
        if flag in parts and bool(parts[flag].any()):
            raise ConfigError(
                f"{owner} was quantized by hqq with {flag}=True, which this project does not read;"
                " quantize the model anew with method=hqq"
            )
    return {"tensors": {name: [dtype_name(part), list(part.shape)] for name, part in parts.items()}}
