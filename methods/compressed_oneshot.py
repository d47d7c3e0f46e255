"""Quantizing with llm-compressor: its `oneshot`, and what the methods that call it share.

`oneshot` gets the model in memory and one modifier a call; `save_pretrained(save_compressed=True)`
writes the folder that `methods/compressed_engine.py` describes and loads. The float model reads the
calibration text ("basic" pipeline), so static ranges are those of unquantized activations. The
library's own default ("sequential") would show each layer the rounded outputs of those before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from kernels.errors import ConfigError
from methods.artefact import checkpoint_dtype
from methods.base import Engine, Hardware, Matrix, QuantizeReport
from methods.compressed_engine import PATH_TOLERANCE, load, load_dequantized, quantized_modules
from methods.compressed_layers import Activations, refuse_fallback
from methods.layers import Scope, Selection, check_finite, select, weight_of
from methods.library import check_covered, require
from methods.options import names, need_calibration

DTYPES = ("float32", "bfloat16")

OBSERVER = "static_minmax"
"""The smallest and largest value of all calibration text."""

UNRESOLVED = "Error resolving mappings"
"""How the library says that a model has not the modules that its mappings name."""

SMOOTHING_TOLERANCE = 1e-4
"""Largest change of the logits by smoothing, root mean square over theirs: float32 gives 1e-6."""


@dataclass(frozen=True)
class Scheme:
    """How llm-compressor rounds to 8 bits: weights by row, activations by token or matrix."""

    kind: Literal["int", "float"]
    activations: Activations

    def stored_bits(self, matrix: Matrix) -> int:
        """8 bits a weight, 32 a row's scale; 32 for the input's where it is static."""
        fixed = 32 if self.activations == "static" else 0
        return 8 * matrix.weights + 32 * matrix.out_features + fixed

    def config(self) -> dict[str, Any]:
        """Return the group of compressed-tensors' configuration that says so."""
        eight: dict[str, Any] = {"num_bits": 8, "type": self.kind, "symmetric": True}
        group = {"targets": ["Linear"], "weights": {**eight, "strategy": "channel"}}
        if self.activations != "none":
            dynamic = self.activations == "dynamic"
            strategy = "token" if dynamic else "tensor"
            inputs = {**eight, "strategy": strategy, "dynamic": dynamic}
            # The library's default, "minmax", is a moving average that forgets 1 % a sample: after
            # 32 of them still three quarters the first one's range.
            group["input_activations"] = inputs if dynamic else {**inputs, "observer": OBSERVER}
        return group


@dataclass(frozen=True)
class CompressedMethod:
    """A method whose artefact is a compressed-tensors checkpoint; `scheme` says which one.

    Attributes:
        keep: patterns of module names to spare. Head and embeddings are never quantized: vLLM has
            no form for them.
    """

    name: str
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", names(self.keep))

    @property
    def scheme(self) -> Scheme:
        """How weights and activations are rounded."""
        raise NotImplementedError

    @property
    def smoothing(self) -> float | None:
        """SmoothQuant's alpha; None: the model is quantized as it is."""
        return None

    @property
    def bits(self) -> float:
        """8 bits."""
        return 8.0

    @property
    def group_size(self) -> int:
        """-1: a scale a row."""
        return -1

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where the artefact cannot be run."""
        if hardware.device not in ("cpu", "cuda"):
            raise ConfigError(f"{self.name} runs on cpu and cuda, not on {hardware.device}")
        if hardware.compute_dtype not in DTYPES:
            raise ConfigError(
                f"{self.name} computes in {' or '.join(DTYPES)}, not {hardware.compute_dtype}; "
                "set hardware.compute_dtype=float32"
            )
        if self.scheme.kind == "int":
            refuse_fallback(self.name, hardware)

    def stored_bits(self, matrix: Matrix) -> int:
        """8 bits a weight, 32 a row's scale; 32 for the input's where it is static."""
        return self.scheme.stored_bits(matrix)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps of the decoder blocks, and what is left out."""
        selection = select_linears(model, self.keep)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Quantize with llm-compressor; `calibration` is int64 [samples, seq_len] where needed."""
        if self.needs_calibration:
            calibration = need_calibration(self.name, calibration)
        selection = select_linears(model, self.keep)
        for matrix in selection.matrices:
            check_finite(matrix.name, weight_of(model, matrix))
        self.write(model, tokenizer, selection.matrices, calibration, into)
        bits = sum(self.stored_bits(matrix) for matrix in selection.matrices)
        return QuantizeReport(selection.matrices, bits, selection.left_out)

    def write(
        self,
        model: Any,
        tokenizer: Any,
        matrices: Sequence[Matrix],
        calibration: Tensor | None,
        into: Path,
    ) -> None:
        """Write the artefact of `model` (changed in place), `matrices` of it quantized."""
        run = OneShot(self.name, model, tokenizer, calibration)
        with run.session():
            if self.smoothing is not None:
                run.smooth(self.smoothing)
            run.quantize(self.scheme, matrices)
            run.save(into)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the stored bytes into modules that run them."""
        self.check(hardware)
        return load(artefact, hardware)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load as the library does: float weights, activations rounded in float; `simulated`."""
        self.check(hardware)
        return load_dequantized(artefact, hardware)


def select_linears(model: Any, keep: Sequence[str]) -> Selection:
    """Return the linear maps of the decoder blocks of `model` (may be on meta).

    Raises:
        ConfigError: the model holds transposed Conv1D (GPT-2) or stacks of experts, which the
            format has no form for; or a `keep` pattern matches nothing.
    """
    selection = select(model, Scope(keep=tuple(keep)))
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            raise ConfigError(
                f"{name} is a transposed Conv1D, which compressed-tensors checkpoints have no form "
                "for; use method=int8_static or method=rtn"
            )
    # Kept ones, too: llm-compressor takes every stack in a model apart.
    for matrix in select(model, Scope()).matrices:
        if matrix.count > 1:
            raise ConfigError(
                f"{matrix.name} is a stack of experts, which llm-compressor would store as "
                "separate matrices; use method=rtn"
            )
    return selection


@dataclass(frozen=True)
class OneShot:
    """llm-compressor at work on `model` (float32, changed in place), for the method `owner`.

    `calibration` is int64 [samples, seq_len]. Everything happens inside `session`.
    """

    owner: str
    model: Any
    tokenizer: Any
    calibration: Tensor | None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Make the library importable, quiet, and forgetful of the model at the end."""
        require("llmcompressor", self.owner)
        require("compressed_tensors", self.owner)
        with warnings.catch_warnings(), self._own_folder():
            # So it calls every model, for it wraps its modules to move them between devices.
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded")
            import loguru
            from llmcompressor.core import reset_session

            for package in ("llmcompressor", "compressed_tensors"):
                loguru.logger.disable(package)
            try:
                yield
            finally:
                reset_session()

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        """Let the model say that it comes from a folder that holds its configuration alone.

        The library reads the configuration there again, and looks for a recipe, else on the hub.
        """
        model = self.model
        old = (model.config._name_or_path, model.name_or_path)
        with TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            model.config._name_or_path = model.name_or_path = folder
            try:
                yield
            finally:
                model.config._name_or_path, model.name_or_path = old

    def _apply(self, modifier: Any, calibrates: bool) -> None:
        """Apply one modifier: two in one call would measure ranges before smoothing."""
        from llmcompressor import oneshot

        loader = None
        if calibrates and self.calibration is not None:
            rows: Any = [{"input_ids": row} for row in self.calibration]
            loader = DataLoader(rows)
        oneshot(
            model=self.model,
            # Nothing calls it, but without one the library looks for one.
            processor=object() if self.tokenizer is None else self.tokenizer,
            recipe=modifier,
            dataset=loader,
            pipeline="datafree" if loader is None else "basic",
        )

    @torch.no_grad()
    def smooth(self, alpha: float) -> None:
        """Move outliers of activations into weights, and check that the function stays the same.

        Raises:
            ConfigError: the library has no mappings for the architecture, or wrong ones.
        """
        from llmcompressor.modifiers.transform import SmoothQuantModifier

        assert self.calibration is not None
        kind = type(self.model).__name__
        instead = "use method=w8a8 or method=w8a8_static"
        unknown = (
            "llm-compressor's SmoothQuant does not know which norms feed which linear maps in "
            f"{kind}; {instead}"
        )
        before = self._first_logits()
        vectors = {n: p.clone() for n, p in self.model.named_parameters() if p.ndim == 1}
        try:
            self._apply(SmoothQuantModifier(smoothing_strength=alpha), calibrates=True)
        except AttributeError as error:
            # A norm without a weight (OLMo).
            raise ConfigError(unknown) from error
        except RuntimeError as error:
            if UNRESOLVED not in str(error):
                raise
            raise ConfigError(unknown) from error
        smoothed = dict(self.model.named_parameters())
        if all(torch.equal(vector, smoothed[name]) for name, vector in vectors.items()):
            raise ConfigError(unknown)
        # An architecture it does not know gets Llama's mappings, right (StableLM) or wrong (Phi);
        # those it has for Gemma 2 are wrong.
        change = (self._first_logits() - before).square().mean().sqrt()
        relative = float(change / before.square().mean().sqrt())
        if not relative < SMOOTHING_TOLERANCE:
            raise ConfigError(
                f"llm-compressor's SmoothQuant takes the wrong norms for those that feed the linear"
                f" maps of {kind}: smoothing changed the logits by {relative:.2g} of their size; "
                f"{instead}"
            )

    def _first_logits(self) -> Tensor:
        assert self.calibration is not None
        logits: Tensor = self.model(input_ids=self.calibration[:1], use_cache=False).logits
        return logits

    def quantize(self, scheme: Scheme, matrices: Sequence[Matrix]) -> None:
        """Quantize exactly `matrices`.

        Raises:
            RuntimeError: the library quantized others.
        """
        from llmcompressor.modifiers.quantization import QuantizationModifier

        wanted = {matrix.name for matrix in matrices}
        linears = {n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        modifier = QuantizationModifier(
            config_groups={"group_0": scheme.config()}, ignore=sorted(linears - wanted)
        )
        self._apply(modifier, calibrates=scheme.activations == "static")
        check_covered(self.owner, matrices, quantized_modules(self.model))

    def save(self, into: Path) -> None:
        """Write the checkpoint: scales in float32, all unquantized in the checkpoint's own type."""
        dtype = checkpoint_dtype(self.model)
        quantized = set(quantized_modules(self.model))
        for name, module in self.model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                if name not in quantized or own == "bias":
                    parameter.data = parameter.data.to(dtype)
        self.model.save_pretrained(into, save_compressed=True)
