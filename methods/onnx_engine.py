"""A graph with a cache (`methods.onnx_export`) run by ONNX Runtime, behind the `Engine` protocol.

Keys and values stay where ONNX Runtime made them: one step's outputs are the next one's inputs, and
only tokens and logits are copied. Which kernel runs a matrix is not assumed but read: the session's
first run is profiled, and the profile names the operator of every node after all of ONNX Runtime's
own fusions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods.base import Cache, Execution, Hardware, KernelUse
from methods.engine import CAPABILITIES
from methods.onnx_encoder import MASK, OnnxEncoder
from methods.onnx_graph import MODEL, read_facts, require_onnx, tensor_bytes

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FEEDS, KEPT, LOGITS = "input_ids", "logits_to_keep", "logits"
KERNEL_TIME = "_kernel_time"
ERRORS_ONLY = 3
PRODUCTS = ("MatMul", "Gemm")

Describe = Callable[[str], tuple[str, Execution]]
"""From the operator that runs a matrix (`MatMulNBits`): the kernel in words, and its execution."""


def check_hardware(owner: str, hardware: Hardware, cuda: bool = False) -> None:
    """Raise ConfigError where ONNX Runtime cannot run the method on `hardware`.

    `cuda` says whether what the method says of its operators holds for CUDA, too.
    """
    if hardware.device == "cuda" and not cuda:
        raise ConfigError(f"the operators of {owner} are a CPU's, not for cuda; use hardware=cpu")
    if hardware.device == "cuda":
        require_onnx(owner)
        import onnxruntime

        if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
            raise ConfigError(
                f"{owner} on cuda needs an onnxruntime with {PROVIDERS['cuda']}, which the one "
                "installed here has not; install onnxruntime-gpu in its place, or use hardware=cpu"
            )
    if hardware.compute_dtype != "float32":
        raise ConfigError(
            f"{owner} computes in float32, not {hardware.compute_dtype}, for which ONNX Runtime "
            "converts around each operator; set hardware.compute_dtype=float32"
        )


class OnnxCache:
    """Keys and values of the tokens read so far, as ONNX Runtime holds them."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(value.tensor_size_in_bytes() for value in self.values)

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return int(self.values[0].shape()[2])


class OnnxEngine:
    """Runs a session of the graph token by token; caches of one engine are independent."""

    most_forked: ClassVar[None] = None

    def __init__(self, session: Any, device: str, artefact: Path) -> None:
        self.session = session
        self.device = device
        self.artefact = artefact
        self.facts = read_facts(artefact)
        self.uses: list[KernelUse] = []
        self.couples_rows = False
        self.reads_stored = True
        """False where ONNX Runtime converted the weights when it loaded them."""
        inputs = {one.name: one.shape for one in session.get_inputs()}
        self._past = {name: shape for name, shape in inputs.items() if len(shape) == 4}
        self._outputs = [one.name for one in session.get_outputs()]

    @property
    def capabilities(self) -> frozenset[str]:
        """Everything but serving: logits, caches that fork, generation, memory."""
        return CAPABILITIES

    @property
    def runtime(self) -> str:
        """ONNX Runtime."""
        return "onnxruntime"

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.facts.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens the model takes at once."""
        return self.facts.context_length

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, cache: Cache | None = None, last: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Read int64 [B, T]; return float32 logits [B, last or T, V] on the CPU."""
        batch, tokens = input_ids.shape
        kept = torch.arange(tokens - min(last or tokens, tokens), tokens)
        cache = self._empty(batch) if cache is None else cache
        binding = self.session.io_binding()
        binding.bind_cpu_input(FEEDS, input_ids.cpu().contiguous().numpy())
        binding.bind_cpu_input(KEPT, kept.numpy())
        for name, value in zip(self._past, cache.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == LOGITS else self.device)
        self.session.run_with_iobinding(binding)
        logits, *cache.values = binding.get_outputs()
        return torch.from_numpy(logits.numpy()), cache

    @torch.no_grad()
    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Read int64 [B, 1]; return float32 logits [B, 1, V] and the advanced cache."""
        return self.prefill(token, cache)

    def fork(self, cache: Cache, rows: Sequence[int]) -> Cache:
        """Return a cache with copies of the sequences `rows` of `cache`."""
        from onnxruntime import OrtValue

        index = list(rows)
        return OnnxCache(
            [
                OrtValue.ortvalue_from_numpy(value.numpy()[index], self.device)
                for value in cache.values
            ]
        )

    def _empty(self, batch: int) -> OnnxCache:
        from onnxruntime import OrtValue

        shapes = [[batch, shape[1], 0, shape[3]] for shape in self._past.values()]
        return OnnxCache(
            [OrtValue.ortvalue_from_shape_and_type(s, "float32", self.device) for s in shapes]
        )

    def first_run(self) -> None:
        """Read one token, so that the session's profile has every matrix."""
        self.prefill(torch.zeros(1, 1, dtype=torch.int64))

    def stored_bytes(self) -> dict[str, int]:
        """Return the bytes of each tensor of the graph, from its description."""
        return tensor_bytes(self.artefact)

    def kernels(self) -> list[KernelUse]:
        """Return what runs each matrix."""
        return list(self.uses)

    def close(self) -> None:
        """Drop the session and with it the weights."""
        self.session = None


def load_engine(
    artefact: Path, hardware: Hardware, describe: Describe, owner: str
) -> OnnxEngine | OnnxEncoder:
    """Load the graph in folder `artefact` and find out which kernels run its matrices.

    Raises:
        ConfigError: a package is missing.
        RuntimeError: the profile does not show each matrix once.
    """
    require_onnx(owner)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = hardware.usable_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    # Threads wait for work in a busy loop, which is fast inside a run; after one it would take
    # processor time from the baseline that is timed in turns with this engine. Seen on 2 threads,
    # ms a token, ONNX Runtime and PyTorch (alone 4.7): as it comes 1.7 and 5 to 17; stopped after
    # each run 1.1 and 4.6; never waiting so 1.8 and 4.9.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_profiling = True
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            artefact / MODEL, options, providers=[PROVIDERS[hardware.device]]
        )
        masked = MASK in [one.name for one in session.get_inputs()]
        kind = OnnxEncoder if masked else OnnxEngine
        engine = kind(session, hardware.device, artefact)
        engine.first_run()
        events = json.loads(Path(session.end_profiling()).read_text())
    operators = operators_of(events, engine.facts.maps, engine.facts.matrices)
    for name, operator in operators.items():
        kernel, execution = describe(operator)
        weights = engine.facts.matrix(name).weights
        engine.uses.append(KernelUse(name, "MatMul", kernel, execution, weights))
    return engine


def operators_of(
    events: list[dict[str, Any]], maps: Iterable[str], matrices: list[str]
) -> dict[str, str]:
    """Return matrix -> operator that ran it, from the `events` of a profile of one run.

    A fused node keeps the name of its product, which is the map's, with something around it.

    Raises:
        RuntimeError: a matrix was run by no operator, or by several.
    """
    maps = list(maps)
    found: dict[str, list[str]] = {name: [] for name in maps}
    for event in events:
        operator = event.get("args", {}).get("op_name", "")
        node = event["name"]
        if not node.endswith(KERNEL_TIME) or not any(one in operator for one in PRODUCTS):
            continue
        owners = [name for name in maps if name in node]
        if owners:
            found[max(owners, key=len)].append(operator)
    for name in matrices:
        if len(found[name]) != 1:
            ran = ", ".join(found[name]) or "no operator"
            raise RuntimeError(f"{name} was run by {ran} of onnxruntime, not by one")
    return {name: found[name][0] for name in matrices}
