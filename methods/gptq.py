"""GPTQ through GPTQModel: weights rounded one input at a time, each error made up for by the rest.

Frantar et al. 2022 (arXiv 2210.17323). For each matrix the Hessian of the layer's squared error,
H = 2/n * sum of x x^T over the calibration tokens, is damped by a share of its mean diagonal and
inverted by Cholesky; column i is rounded to its group's grid, and its error, divided by the
diagonal, is taken off the columns behind it along the row of the factor. Within a block the inputs
of a matrix are those that the matrices quantized before it leave (`true_sequential`).

Stored in the GPTQ format (`methods.gptq_format`). A symmetric one is version `gptq`, which every
runtime reads. Asymmetric: `gptq_v2`, since version 1 stores zero points less 1, and has no zero.
GPTQModel's own changes of the order of columns (`act_group_aware`) are off.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from kernels.errors import ConfigError
from methods import gptqmodel_engine, repack
from methods.affine import Affine
from methods.base import Calibration, Engine, Hardware, Matrix, QuantizeReport
from methods.gptq_format import stored_bits
from methods.gptqmodel_quantize import (
    Log,
    Recipe,
    check_group_size,
    device,
    keep_rules,
    quantize,
    select_matrices,
)
from methods.library import require
from methods.options import names, require_flags
from methods.packed import load_engine

BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, -1)
FAILED_LOSS = 999999999.0
"""What GPTQModel logs as the loss where the Hessian had no factor and it rounded to nearest."""


@dataclass(frozen=True)
class GPTQ:
    """GPTQ with its options.

    Attributes:
        calibration: how much of the calibration text the Hessians are measured on.
        symmetric: grids around zero, without zero points of their own.
        act_order: round the inputs of largest activation first; the groups' members are then
            scattered, and stored by index.
        damping: share of the Hessian's mean diagonal that is added to the diagonal. Raised in
            steps of 0.01 where the Cholesky factorization fails, which a note then says.
        backend: kernels: auto, torch (dequantize at each call), exllama_v2, marlin.
        keep: shell patterns of module names that stay as they are.
        kernel: library: GPTQModel's kernels run it; quantbench: it is stored and run as this
            project stores and runs matrices (`methods.repack`).
    """

    name: str
    calibration: Calibration
    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    act_order: bool = False
    damping: float = 0.01
    backend: str = "auto"
    keep: Sequence[str] = ()
    kernel: str = "library"

    needs_calibration: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = gptqmodel_engine.PATH_TOLERANCE

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits is {self.bits}; gptq takes {', '.join(map(str, BITS))}")
        check_group_size("gptq", self.group_size, GROUP_SIZES)
        if not 0 < self.damping < 1:
            raise ConfigError(f"method.damping is {self.damping}; it must be between 0 and 1")
        if self.backend not in gptqmodel_engine.BACKENDS:
            raise ConfigError(
                f"method.backend of gptq is {self.backend!r}; it must be one of "
                f"{', '.join(gptqmodel_engine.BACKENDS)}"
            )
        require_flags(self.name, {"symmetric": self.symmetric, "act_order": self.act_order})
        repack.check_kernel(self.name, self.kernel, self.backend)
        object.__setattr__(self, "keep", names(self.keep))

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where there is no kernel for these options on `hardware`."""
        if self.kernel == "quantbench":
            repack.check(self.name, self.bits, self.group_size, hardware)
            return
        gptqmodel_engine.check(
            "gptq", hardware, self.backend, self.bits, self.group_size, self.symmetric
        )

    def stored_bits(self, matrix: Matrix) -> int:
        """Those of the GPTQ format, or of this project's."""
        if self.kernel == "quantbench":
            affine = Affine(self.bits, self.group_size, self.symmetric)
            return repack.stored_bits(matrix, affine, self._ordered(matrix))
        return stored_bits(matrix, "gptq", self.bits, self.group_size)

    def _ordered(self, matrix: Matrix) -> bool:
        """Whether the inputs of `matrix` lie in another order than that of their groups."""
        return self.act_order and self.group_size not in (-1, matrix.in_features)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the matrices of the decoder blocks, and what is left out.

        Raises:
            ConfigError: the model has stacks of experts, or a width does not fit.
        """
        selection = select_matrices(model, "gptq", self.keep, self.group_size, GROUP_SIZES)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Write the artefact; see `methods.gptqmodel_quantize`."""
        require("gptqmodel", "method=gptq")
        matrices, left_out = self.select(model)
        rules = keep_rules(model, matrices)
        recipe = Recipe("gptq", lambda: self._config(rules))
        with repack.target(self.kernel, into) as folder:
            log, notes = quantize(recipe, model, tokenizer, calibration, matrices, folder)
        notes += repack.notes(self.kernel, "GPTQ")
        stored = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, stored, left_out, [*notes, *self._damping_notes(log)])

    def modules(
        self, model: nn.Module, matrices: Sequence[Matrix], calibration: Tensor | None
    ) -> Mapping[str, nn.Module]:
        """Return name -> packed module of each of `matrices`, repacked without loss.

        They are quantized one behind the other, all of them: each saw the inputs that those before
        it leave. `model` is left as it was.

        Raises:
            ConfigError: their inputs would lie in another order, which other readers of a module's
                weight do not know of.
        """
        require("gptqmodel", "method=gptq")
        if any(self._ordered(matrix) for matrix in matrices):
            raise ConfigError(
                "gptq with act_order=true stores the inputs of a matrix in another order, so its "
                "matrices are not taken singly; set act_order=false, or group_size=-1"
            )
        rules = keep_rules(model, matrices)
        recipe = Recipe("gptq", lambda: self._config(rules))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "checkpoint")
            log, _ = quantize(
                recipe, copy.deepcopy(model), _no_tokenizer(), calibration, matrices, folder
            )
            found = repack.read_modules(folder)[1]
        self._damping_notes(log)
        return found

    def _config(self, rules: dict[str, dict[str, Any]]) -> Any:
        from gptqmodel.quantization.config import FORMAT, GPTQConfig

        return GPTQConfig(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.symmetric,
            desc_act=self.act_order,
            act_group_aware=False,
            damp_percent=self.damping,
            format=FORMAT.GPTQ if self.symmetric else FORMAT.GPTQ_V2,
            dynamic=rules or None,
            fallback=None,
            offload_to_disk=False,
            device=device(),
        )

    def _damping_notes(self, log: Sequence[Log]) -> list[str]:
        """Return a note where damping was raised.

        Raises:
            RuntimeError: a matrix was rounded to nearest instead.
        """
        raised = []
        for entry in log:
            try:
                # Written so that NaN, too, is a failure.
                failed = not float(entry["loss"]) < FAILED_LOSS
            except ValueError:
                failed = True
            if failed:
                raise RuntimeError(
                    f"GPTQModel rounded layer {entry['layer']} {entry['module']} to nearest: its "
                    f"Hessian has no Cholesky factor with damping {self.damping} and above"
                )
            # Logged with five digits.
            if float(entry["damp"]) > self.damping + 1e-5:
                raised.append(float(entry["damp"]))
        if not raised:
            return []
        return [
            f"{len(raised)} Hessians had no Cholesky factor with damping {self.damping}; "
            f"GPTQModel raised it, to {max(raised)} at most"
        ]

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with GPTQModel's kernels, or this project's."""
        if self.kernel == "quantbench":
            return load_engine(artefact, hardware, build=repack.build)
        return gptqmodel_engine.load(artefact, hardware, self.backend)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with the weights decoded by our own code, to compare with."""
        if self.kernel == "quantbench":
            return load_engine(artefact, hardware, packed=False, build=repack.build)
        return gptqmodel_engine.load_dequantized(artefact, hardware)


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one word: GPTQModel loads no model without one, and is shown tokens."""
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
