"""The archived AutoGPTQ 0.7.1 and AutoAWQ 0.2.9, in an environment of their own.

Both stopped before transformers 5, so neither can be imported here. `make legacy-env` builds
`.venv-legacy` with transformers 4.51.3; its interpreter runs one script of `methods/legacy/` for
an artefact. Only files are exchanged: the float checkpoint and the calibration tokens go in, a
checkpoint in GPTQ or AWQ format comes out. It is loaded by GPTQModel, as are those of `gptq` and
`awq`, with which these two can be compared row by row.

transformers 5 writes configurations that 4.51.3 misreads without a word (`rope_parameters`): they
are translated (`older_config`), and the child holds the logits of its model against ours before it
quantizes. Of what comes out, the weights are kept; the configuration is ours with the library's
`quantization_config` added.

The scope is the libraries' own: the linear maps of the decoder blocks.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import gptqmodel_engine
from methods.base import Calibration, Engine, Hardware, Matrix, QuantizeReport
from methods.exported import (
    Original,
    check_group_size,
    select_matrices,
    take,
)
from methods.gptq_format import stored_bits
from methods.layers import check_finite, weight_of
from methods.library import write_checkpoint
from methods.options import need_calibration, require_flags

PROJECT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).with_suffix("")
GPTQ_BITS = (2, 3, 4, 8)
MEMORY_APART = (
    "the memory of quantizing is that of the process which asked; the archived library ran in "
    "another"
)
COPIED_WEIGHTS = (
    "AutoAWQ's search was handed copies of the weights: on a CPU it keeps none, and the scales of "
    "its first trial would stay in them"
)
SHOWN_TOKENS = 64
"""Tokens whose logits the child must find again; a wrong rotary embedding shows in so many."""


@dataclass(frozen=True)
class Child:
    """The interpreter and the script that quantize for method `owner`."""

    owner: str
    environment: str
    script: str

    @property
    def interpreter(self) -> Path:
        """Return the Python of the environment, a folder relative to the project's root."""
        return PROJECT / self.environment / "bin" / "python"

    def check(self) -> None:
        """Raise ConfigError where the environment is not there."""
        if not self.interpreter.exists():
            raise ConfigError(
                f"{self.owner} runs in an environment of its own, and there is none at "
                f"{self.environment}; make it: make legacy-env"
            )

    def run(self, job: Mapping[str, Any], folder: Path) -> None:
        """Run the script on `job`, written into `folder`.

        Raises:
            RuntimeError: the script failed; its last line says why.
        """
        path = folder / "job.json"
        path.write_text(json.dumps(job))
        done = subprocess.run(
            [self.interpreter, SCRIPTS / self.script, path],
            env=_clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            cause = lines[-1] if lines else "it said nothing"
            raise RuntimeError(
                f"{self.owner}: {self.script} in {self.environment} ended with "
                f"{done.returncode}: {cause}"
            )


def _clean_environment() -> dict[str, str]:
    """Return the variables of this process without what points at its own packages, offline."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # Compiled files beside the scripts would count as part of the method.
    own = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | own


def older_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as transformers 4.51 reads it from one that transformers 5 wrote.

    Raises:
        ConfigError: it has rotary embeddings that differ between layers.
    """
    older = dict(config)
    rope = older.pop("rope_parameters", None)
    if rope is not None:
        if "rope_type" not in rope:
            raise ConfigError(
                "the model's rotary embedding differs between layers, which the archived libraries "
                "cannot be told; use method=gptq or method=awq"
            )
        older["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            older["partial_rotary_factor"] = rope["partial_rotary_factor"]
        rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        older["rope_scaling"] = None if rest["rope_type"] == "default" else rest
    if "dtype" in older:
        older["torch_dtype"] = older.pop("dtype")
    return older


@torch.no_grad()
def _quantize(
    child: Child,
    model: Any,
    tokens: Tensor,
    seed: int,
    options: Mapping[str, Any],
    matrices: Sequence[Matrix],
    into: Path,
) -> None:
    """Let `child` quantize `model` on int64 `tokens` [samples, seq_len] and write folder `into`.

    Raises:
        ConfigError: there is no environment, or a weight is not finite.
        RuntimeError: the child failed, or quantized other matrices than `matrices`.
    """
    child.check()
    for matrix in matrices:
        check_finite(matrix.name, weight_of(model, matrix))
    original = Original.of(model)
    logits = model(input_ids=tokens[:1, :SHOWN_TOKENS], use_cache=False).logits[0].float()
    # Beside the artefact, since a model may be larger than the folder for temporary files.
    with TemporaryDirectory(prefix="child-", dir=into) as name:
        folder = Path(name).resolve()
        inputs, checkpoint, output = folder / "in.safetensors", folder / "float", folder / "out"
        save_file({"tokens": tokens.contiguous(), "logits": logits.contiguous()}, inputs)
        write_checkpoint(model, None, checkpoint)
        path = checkpoint / "config.json"
        path.write_text(json.dumps(older_config(json.loads(path.read_text()))))
        job = {
            "checkpoint": str(checkpoint),
            "inputs": str(inputs),
            "output": str(output),
            "threads": torch.get_num_threads(),
            "seed": seed,
            "options": dict(options),
        }
        child.run(job, folder)
        take(child.owner, output, original, matrices, into)


@dataclass(frozen=True)
class AutoAWQ:
    """AutoAWQ 0.2.9: activation-aware weight quantization, 4 bits, GEMM format.

    Attributes:
        group_size: inputs that share a scale and a zero point; -1: one group a row.
        calibration: the text it is shown; the paper has 128 samples of 512 tokens of the Pile.
        duo_scaling: choose scales by weights and activations; false: by activations alone.
        clip: search for clipping thresholds of the weights, too.
        environment: folder of the environment, relative to the project's root.
        backend: kernel of GPTQModel that runs the checkpoint.
    """

    name: str
    group_size: int
    calibration: Calibration
    duo_scaling: bool = True
    clip: bool = True
    environment: str = ".venv-legacy"
    backend: str = "auto"

    needs_calibration: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = gptqmodel_engine.PATH_TOLERANCE

    def __post_init__(self) -> None:
        require_flags(self.name, {"duo_scaling": self.duo_scaling, "clip": self.clip})
        check_group_size(self.name, "awq", self.group_size)

    @property
    def bits(self) -> float:
        """4, the only width of its format."""
        return 4.0

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where GPTQModel has no kernel for the checkpoint."""
        gptqmodel_engine.check(self.name, hardware, self.backend, 4, self.group_size, False)

    def stored_bits(self, matrix: Matrix) -> int:
        """Those of the AWQ format."""
        return stored_bits(matrix, "awq", 4, self.group_size)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps of the decoder blocks, and what is left out.

        Raises:
            ConfigError: there is one that the format has no form for.
        """
        selection = select_matrices(self.name, model, "awq", self.group_size)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Let AutoAWQ quantize `model` in its own environment.

        Raises:
            ConfigError: no environment, no calibration text, or a weight that is not finite.
            RuntimeError: the child failed; its last line says why.
        """
        tokens = need_calibration(self.name, calibration)
        matrices, left_out = self.select(model)
        options = {
            "group_size": self.group_size,
            "duo_scaling": self.duo_scaling,
            "clip": self.clip,
        }
        child = Child(self.name, self.environment, "quantize_awq.py")
        _quantize(child, model, tokens, self.calibration.seed, options, matrices, into)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, left_out, [COPIED_WEIGHTS, MEMORY_APART])

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the checkpoint with GPTQModel's kernels."""
        return gptqmodel_engine.load(artefact, hardware, self.backend)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with weights decoded by this project, to compare with."""
        return gptqmodel_engine.load_dequantized(artefact, hardware)


@dataclass(frozen=True)
class AutoGPTQ:
    """AutoGPTQ 0.7.1: GPTQ on grids around 0; it quantizes on CUDA only.

    Its asymmetric checkpoints are not offered: it stores zero points less 1, which spoils those
    beside a zero point of 0 (`methods.gptq_format`).

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; -1: one group a row.
        calibration: the text it is shown; the paper has 128 samples of 2048 tokens of C4.
        act_order: quantize the inputs with large activations first (its `desc_act`).
        damping: share of the mean diagonal that is added to the Hessian's.
        environment: folder of the environment, relative to the project's root.
        backend: kernel of GPTQModel that runs the checkpoint.
    """

    name: str
    bits: int
    group_size: int
    calibration: Calibration
    act_order: bool = False
    damping: float = 0.01
    environment: str = ".venv-legacy"
    backend: str = "auto"

    needs_calibration: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = gptqmodel_engine.PATH_TOLERANCE

    def __post_init__(self) -> None:
        require_flags(self.name, {"act_order": self.act_order})
        check_group_size(self.name, "gptq", self.group_size)
        if self.bits not in GPTQ_BITS:
            raise ConfigError(f"bits is {self.bits}; {self.name} has 2, 3, 4 and 8")
        if not 0 < self.damping < 1:
            raise ConfigError(f"method.damping is {self.damping}; it must be between 0 and 1")

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError on a machine without CUDA, or where GPTQModel has no kernel."""
        if not torch.cuda.is_available():
            raise ConfigError(
                "AutoGPTQ 0.7.1 quantizes on CUDA only, and torch sees no CUDA card here; use "
                "method=gptq, its successor GPTQModel"
            )
        gptqmodel_engine.check(
            self.name, hardware, self.backend, self.bits, self.group_size, symmetric=True
        )

    def stored_bits(self, matrix: Matrix) -> int:
        """Those of the GPTQ format."""
        return stored_bits(matrix, "gptq", self.bits, self.group_size)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps of the decoder blocks, and what is left out.

        Raises:
            ConfigError: there is one that the format has no form for.
        """
        selection = select_matrices(self.name, model, "gptq", self.group_size)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Let AutoGPTQ quantize `model` in its own environment.

        Raises:
            ConfigError: no environment, no calibration text, or a weight that is not finite.
            RuntimeError: the child failed; its last line says why.
        """
        tokens = need_calibration(self.name, calibration)
        matrices, left_out = self.select(model)
        options = {
            "bits": self.bits,
            "group_size": self.group_size,
            "act_order": self.act_order,
            "damping": self.damping,
        }
        child = Child(self.name, self.environment, "quantize_gptq.py")
        _quantize(child, model, tokens, self.calibration.seed, options, matrices, into)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, left_out, [MEMORY_APART])

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the checkpoint with GPTQModel's kernels."""
        return gptqmodel_engine.load(artefact, hardware, self.backend)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with weights decoded by this project, to compare with."""
        return gptqmodel_engine.load_dequantized(artefact, hardware)
