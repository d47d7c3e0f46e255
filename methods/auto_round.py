"""AutoRound (Cheng et al. 2023, arXiv 2309.05516): rounding learnt by signed gradient descent.

Each weight gets an offset in -0.5..0.5 that is added before rounding, each group two factors for
the ends of its range; block by block they are tuned to reproduce the float block's output on the
calibration text, and the best of all steps is kept. The library is Intel's auto-round 0.15. With 0
iterations nothing is tuned and what is left is round-to-nearest in AutoRound's own grids:

- symmetric: scale = (the weight of largest magnitude, negated) / 2**(bits - 1), so scales can be
  negative and that weight is always exact; codes -2**(bits - 1)..2**(bits - 1) - 1.
- asymmetric: scale = (max - min) / (2**bits - 1), a whole zero point; 0 is in the range.

The artefact is what AutoRound exports for GPTQModel, which runs it: the GPTQ format where symmetric
(`qweight`, `qzeros`, `scales` in float16, `g_idx`), the AWQ format (4 bits; no `g_idx`) where not:
the GPTQ format has no form for a zero point of 0.

Everything is done on the CPU in float32 (upstream: in bfloat16 where it can).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
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
from methods.gptq_format import Format, stored_bits
from methods.layers import check_finite, weight_of
from methods.library import require
from methods.options import names, need_calibration, require_flags

BITS = (2, 3, 4, 8)
BATCH = 8
"""Samples a step, AutoRound's own default."""


@dataclass(frozen=True)
class AutoRound:
    """Weights rounded as learnt from calibration text.

    Attributes:
        bits: 2, 3, 4 or 8; asymmetric: 4.
        group_size: inputs that share a scale; -1: one a row.
        calibration: the text it is shown; upstream: 128 samples of 2048 tokens.
        symmetric: grids around 0; false: ones that fit both ends of the range.
        iterations: steps a block; 0: round to nearest. Upstream: 200.
        keep: patterns of module names to spare.
        backend: kernel of GPTQModel that runs the checkpoint.
    """

    name: str
    bits: int
    group_size: int
    calibration: Calibration
    symmetric: bool = True
    iterations: int = 200
    keep: Sequence[str] = ()
    backend: str = "auto"

    needs_calibration: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = gptqmodel_engine.PATH_TOLERANCE

    def __post_init__(self) -> None:
        require_flags(self.name, {"symmetric": self.symmetric})
        object.__setattr__(self, "keep", names(self.keep))
        if self.bits not in BITS:
            raise ConfigError(f"bits is {self.bits}; {self.name} has {', '.join(map(str, BITS))}")
        if not self.symmetric and self.bits != 4:
            raise ConfigError(
                f"bits is {self.bits}; {self.name} with symmetric=false is stored in the AWQ "
                "format, which has 4 bits only: set bits=4 or method.symmetric=true"
            )
        check_group_size(self.name, self._format, self.group_size)
        if self.iterations < 0:
            raise ConfigError(f"method.iterations is {self.iterations}; it must be 0 or more")

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where GPTQModel has no kernel for these options."""
        gptqmodel_engine.check(
            self.name, hardware, self.backend, self.bits, self.group_size, self.symmetric
        )

    def stored_bits(self, matrix: Matrix) -> int:
        """Those of the GPTQ format where symmetric, of the AWQ format where not."""
        return stored_bits(matrix, self._format, self.bits, self.group_size)

    @property
    def _format(self) -> Format:
        return "gptq" if self.symmetric else "awq"

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps of the decoder blocks, and what is left out.

        Raises:
            ConfigError: there is one that the formats have no form for.
        """
        selection = select_matrices(self.name, model, self._format, self.group_size, self.keep)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: Any, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Let AutoRound tune on `calibration`, int64 [samples, seq_len], and export."""
        require("auto_round", self.name)
        tokens = need_calibration(self.name, calibration)
        matrices, left_out = self.select(model)
        for matrix in matrices:
            check_finite(matrix.name, weight_of(model, matrix))
        original = Original.of(model)
        with _library(), TemporaryDirectory(prefix="auto-round-", dir=into) as folder:
            self._run(model, matrices, tokens, Path(folder))
            # It makes a folder of its own in there, named after model and options.
            (found,) = Path(folder).rglob("config.json")
            take(self.name, found.parent, original, matrices, into)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, left_out)

    def _run(
        self, model: nn.Module, matrices: Sequence[Matrix], calibration: Tensor, into: Path
    ) -> None:
        """Tune `model` (changed in place) and export it into a folder below `into`."""
        import auto_round
        from auto_round.algorithms.quantization.rtn.config import RTNConfig
        from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

        grid = {"bits": self.bits, "group_size": self.group_size, "sym": self.symmetric}
        wanted = {matrix.name for matrix in matrices}
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        samples, seq_len = calibration.shape
        auto_round.AutoRound(
            model,
            # Only asked for its padding token, of which our text has none.
            tokenizer=object(),
            alg_configs=(
                SignRoundConfig(iters=self.iterations, **grid)
                if self.iterations
                else RTNConfig(disable_opt_rtn=True, **grid)
            ),
            layer_config={name: {"bits": 16} for name in sorted(linears - wanted)},
            dataset=[
                {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
                for batch in torch.split(calibration, BATCH)
            ],
            nsamples=samples,
            seqlen=seq_len,
            batch_size=min(BATCH, samples),
            seed=self.calibration.seed,
            device_map="cpu",
            amp=False,
            enable_torch_compile=False,
            low_cpu_mem_usage=False,
            trust_remote_code=False,
        ).quantize_and_save(output_dir=str(into), format=f"auto_{self._format}", inplace=True)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the checkpoint with GPTQModel's kernels."""
        return gptqmodel_engine.load(artefact, hardware, self.backend)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with weights decoded by this project, to compare with."""
        return gptqmodel_engine.load_dequantized(artefact, hardware)


@contextmanager
def _library() -> Iterator[None]:
    """Keep auto-round's log and warnings quiet, and undo what it changes in PyTorch."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype", UserWarning)
        import auto_round  # noqa: F401  # makes the logger

        logging.getLogger("autoround").setLevel(logging.ERROR)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.set_printoptions(profile="default")  # type: ignore[no-untyped-call]
