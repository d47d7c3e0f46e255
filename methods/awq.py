"""AWQ through GPTQModel: inputs that matter are scaled up before rounding to the nearest level.

Lin et al. 2023 (arXiv 2306.00978). A scale per input channel, searched over 20 powers of the mean
activation against the mean weight, minimizes the error of the block's part that reads it on the
calibration text; it is multiplied into the matrix and divided out of what stands before it (a norm,
or another matrix), so the float function stays. Then each group's range is clipped to where its
output error is least (queries and keys are not). 4 bits, in the GEMM version of the AWQ format
(`methods.gptq_format`). Where nothing before a matrix can take the scale, as before the output of
grouped-query attention, it is not scaled; a note counts these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
from methods.layers import decoder_blocks
from methods.library import require
from methods.options import names, require_flags
from methods.packed import load_engine

BITS = 4
GROUP_SIZES = (16, 32, 64, 128, -1)
CLIPPED_ROWS = 64
"""The clipping search takes rows in blocks of 64; GPTQModel ends the process on other numbers."""

FOLDING_TOLERANCE = 1e-3
"""Logits of the float model with folded scales against without, root mean square over spread: 1e-6
to 1e-5 where folding is right, 0.05 and more where a scale goes through what is not linear."""


@dataclass(frozen=True)
class AWQ:
    """AWQ with its options.

    Attributes:
        calibration: how much of the calibration text the search reads.
        zero_point: grids that fit both ends of the range; false: around zero.
        backend: kernels: auto, torch (dequantize at each call), exllama_v2, marlin.
        keep: shell patterns of module names that stay as they are.
        kernel: library: GPTQModel's kernels run it; quantbench: it is stored and run as this
            project stores and runs matrices (`methods.repack`).
    """

    name: str
    calibration: Calibration
    group_size: int = 128
    zero_point: bool = True
    backend: str = "auto"
    keep: Sequence[str] = ()
    kernel: str = "library"

    needs_calibration: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = gptqmodel_engine.PATH_TOLERANCE

    def __post_init__(self) -> None:
        check_group_size("awq", self.group_size, GROUP_SIZES)
        if self.backend not in gptqmodel_engine.BACKENDS:
            raise ConfigError(
                f"method.backend of awq is {self.backend!r}; it must be one of "
                f"{', '.join(gptqmodel_engine.BACKENDS)}"
            )
        require_flags(self.name, {"zero_point": self.zero_point})
        repack.check_kernel(self.name, self.kernel, self.backend)
        object.__setattr__(self, "keep", names(self.keep))

    @property
    def bits(self) -> int:
        """Always 4: the only width of the GEMM version that kernels read."""
        return BITS

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where there is no kernel for these options on `hardware`."""
        if self.kernel == "quantbench":
            repack.check(self.name, BITS, self.group_size, hardware)
            return
        gptqmodel_engine.check(
            "awq", hardware, self.backend, BITS, self.group_size, not self.zero_point
        )

    def stored_bits(self, matrix: Matrix) -> int:
        """Those of the AWQ format, or of this project's."""
        if self.kernel == "quantbench":
            return repack.stored_bits(matrix, Affine(BITS, self.group_size, not self.zero_point))
        return stored_bits(matrix, "awq", BITS, self.group_size)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the matrices of the decoder blocks, and what is left out.

        Raises:
            ConfigError: the model has stacks of experts or transposed matrices (GPT-2), or a width
                does not fit.
        """
        selection = select_matrices(model, "awq", self.keep, self.group_size, GROUP_SIZES)
        for matrix in selection.matrices:
            kind = type(model.get_submodule(matrix.name))
            if not issubclass(kind, nn.Linear):
                raise ConfigError(
                    f"layer {matrix.name} is a {kind.__name__}, which GPTQModel cannot scale for "
                    "AWQ; use method=gptq for this model"
                )
            if matrix.out_features % CLIPPED_ROWS:
                raise ConfigError(
                    f"layer {matrix.name} has {matrix.out_features} rows; AWQ in GPTQModel takes "
                    f"multiples of {CLIPPED_ROWS}; keep it with keep=['{matrix.name}']"
                )
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Write the artefact; see `methods.gptqmodel_quantize`."""
        require("gptqmodel", "method=awq")
        matrices, left_out = self.select(model)
        rules = keep_rules(model, matrices)
        scales = Scales(calibration)
        recipe = Recipe("awq", lambda: self._config(rules), scales.recorded, scales.check)
        with repack.target(self.kernel, into) as folder:
            log, notes = quantize(recipe, model, tokenizer, calibration, matrices, folder)
        notes += repack.notes(self.kernel, "AWQ")
        stored = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, stored, left_out, [*notes, *_scaling_notes(log)])

    def _config(self, rules: dict[str, dict[str, Any]]) -> Any:
        from gptqmodel.quantization.config import FORMAT, AWQConfig

        return AWQConfig(
            bits=BITS,
            group_size=self.group_size,
            sym=not self.zero_point,
            format=FORMAT.GEMM,
            dynamic=rules or None,
            fallback=None,
            offload_to_disk=False,
            device=device(),
        )

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


def _scaling_notes(log: Sequence[Log]) -> list[str]:
    unscaled = [entry["module"] for entry in log if entry["loss"] == "not applicable"]
    if not unscaled:
        return []
    return [
        f"{len(unscaled)} of {len(log)} matrices are not scaled, since what stands before them "
        f"cannot take the scale: {', '.join(sorted(set(unscaled)))}"
    ]


class Scales:
    """The scales that GPTQModel found, to see that folding them keeps the float function.

    It folds by a table of what stands before what in a block. For some architectures the table is
    wrong: in GPT-NeoX a scale goes through GELU, in OPT through a sum and a norm.
    """

    def __init__(self, calibration: Tensor | None) -> None:
        self._calibration = calibration
        self._found: list[tuple[nn.Module, Any]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep each block and its scales; work in float32."""
        from gptqmodel.looper import awq_processor

        apply_scale = awq_processor.apply_scale

        def recording(block: Any, scales: Any, **options: Any) -> None:
            self._found.append((block, scales))
            apply_scale(block, scales, **options)

        awq_processor.apply_scale = recording
        try:
            with in_float32():
                yield
        finally:
            awq_processor.apply_scale = apply_scale

    @torch.no_grad()
    def check(self, source: Path, quantized: nn.Module) -> None:
        """Fold the scales into the float model in folder `source` and compare its logits.

        `quantized` is the model whose blocks were scaled.

        Raises:
            ConfigError: they are not what they were.
        """
        from gptqmodel.quantization.awq.quantize.scale import apply_scale
        from transformers import AutoModelForCausalLM

        assert self._calibration is not None
        ids = self._calibration[:1]
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, local_files_only=True
        )
        before = model(input_ids=ids).logits
        places = {id(block): place for place, block in enumerate(decoder_blocks(quantized)[1])}
        for block, scales in self._found:
            apply_scale(decoder_blocks(model)[1][places[id(block)]], scales)
        after = model(input_ids=ids).logits
        difference = float((after - before).square().mean().sqrt() / before.std())
        if not difference <= FOLDING_TOLERANCE:
            raise ConfigError(
                f"GPTQModel's AWQ changes what {type(model).__name__} computes before it rounds "
                f"anything: logits differ by {difference:.2g} of their spread; use method=gptq"
            )


@contextmanager
def in_float32() -> Iterator[None]:
    """Let GPTQModel 7.6.0 search AWQ's scales in float32, for which two of its lines are wrong.

    The scale search keeps "copies" of the weights by `weight.to(float32).cpu().contiguous()`,
    which on a CPU are the weights themselves, and restores nothing: the results are noise. And the
    class that packs refuses float32, though it packs it as well. In half precision, its own way,
    weights would be rounded first, or a CPU take a hundred times as long.
    """
    from gptqmodel.looper.awq_processor import AWQProcessor
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from torch.overrides import TorchFunctionMode

    class Copying(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            same = func is Tensor.contiguous and result.data_ptr() == args[0].data_ptr()
            return result.clone() if same else result

    search, dtypes = AWQProcessor._compute_best_scale, AwqTorchLinear.SUPPORTS_DTYPES

    def copying_search(*args: Any, **options: Any) -> Any:
        # Entered here, since the library's worker threads know nothing of ours.
        with Copying():
            return search(*args, **options)

    AWQProcessor._compute_best_scale = copying_search
    AwqTorchLinear.SUPPORTS_DTYPES = [*dtypes, torch.float32]
    try:
        yield
    finally:
        AWQProcessor._compute_best_scale = search
        AwqTorchLinear.SUPPORTS_DTYPES = dtypes
