"""The child of `job=sensitivity`: which matrices of a model suffer most from being quantized.

Each matrix that the method covers is quantized alone, in the method's own scheme or in one of each
of `job.options.bits`, and held against the unquantized model on crops of the calibration text
(`methods.sensitivity`). Whether single divergences add up is checked on random mixes: each matrix
in one of the schemes, or where there is one scheme alone, in it or untouched. All is computed in
float32 with weights dequantized; activations are not rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from scipy.stats import spearmanr
from torch import Tensor, nn

from harness.cache import Cache
from harness.data import Texts
from harness.device import device_of
from harness.hardware import Hardware
from harness.launch import Stage
from harness.load import describes_encoder, load_model, model_facts
from harness.measure import Progress
from harness.measures.statistics import stderr_of_mean
from harness.models import ModelSource, unquantized
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Calibration, LayerwiseMethod, Matrix, Method
from methods.prefix import Prefixed
from methods.sensitivity import Divergences, Table, divergences, measure


@dataclass(frozen=True)
class Options:
    """What `job.options` asks for.

    Attributes:
        calibration: the crops that are scored.
        bits: of the schemes; None: the method's own.
        mixes: random mixes whose KL the sum of the single ones predicts.
    """

    calibration: Calibration
    bits: tuple[int, ...] | None
    mixes: int

    @staticmethod
    def of(node: Mapping[str, Any]) -> Options:
        """Return the options of a composed configuration.

        Raises:
            ConfigError: a value cannot work.
        """
        found = node["calibration"]
        for name in ("samples", "seq_len"):
            if not isinstance(found[name], int) or found[name] < (1 if name == "samples" else 2):
                least = "1 or more" if name == "samples" else "2 or more: the first is not scored"
                raise ConfigError(
                    f"job.options.calibration.{name} is {found[name]!r}; it must be {least}"
                )
        bits, mixes = node["bits"], node["mixes"]
        if bits is not None and (not isinstance(bits, list) or not bits):
            raise ConfigError(
                f"job.options.bits is {bits!r}; it must be null or a list, as [8,4,3,2]"
            )
        if not isinstance(mixes, int) or mixes < 0 or mixes == 1:
            raise ConfigError(
                f"job.options.mixes is {mixes!r}; it must be 0 (none), or 2 or more to rank"
            )
        drawn = Calibration(found["samples"], found["seq_len"], found["seed"])
        return Options(drawn, None if bits is None else tuple(dict.fromkeys(bits)), mixes)


@dataclass(frozen=True)
class Scheme:
    """A method with its options, and what it makes of each matrix."""

    label: str
    method: Method
    matrices: Sequence[Matrix]
    modules: Mapping[str, nn.Module]


@dataclass(frozen=True)
class Mixes:
    """Random mixes of the schemes.

    Attributes:
        predicted: sums of the single KLs.
        measured: the KLs with all at once, nats.
    """

    predicted: list[float]
    measured: list[float]

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of predicted and measured; NaN where one of them never varies."""
        if len(set(self.predicted)) == 1 or len(set(self.measured)) == 1:
            return float("nan")
        return float(spearmanr(self.predicted, self.measured).statistic)


def main(job: dict[str, Any], stage: Stage) -> None:
    """Measure the sensitivities of the cell `job` and leave the record in `job["folder"]`."""
    hardware: Hardware = instantiate(job["config"]["hardware"])
    with device_of(hardware.device).shared(stage):
        _measure(job, hardware, stage)


def _measure(job: dict[str, Any], hardware: Hardware, stage: Stage) -> None:
    config = job["config"]
    options = Options.of(config["job"]["options"])
    methods = _methods(instantiate(config["method"]), options.bits)
    model_source: ModelSource = unquantized(instantiate(config["model"]))
    _check_model(model_source, job["random_weights"])
    own = methods[0]
    axes = {"bits": own.bits if len(methods) == 1 else None, "group_size": own.group_size}
    progress = Progress({**job, "summary": {**job["summary"], **axes}}, hardware)
    stage("loading the model")
    model, tokenizer = load_model(model_source)
    facts = model_facts(model)
    source = instantiate(config["data"])
    texts = source.texts(tokenizer, Cache(Path(job["cache"])))
    tokens = _crops(texts, options.calibration, facts["context_length"], "job.options")
    stage("quantizing each matrix")
    schemes = [_scheme(method, model, texts, facts["context_length"]) for method in methods]
    model = model.to(hardware.device)
    matrices = list({m.name: m for scheme in schemes for m in scheme.matrices}.values())
    packed = {scheme.label: scheme.modules for scheme in schemes}
    table = measure(model, matrices, packed, tokens, stage)
    stage("measuring mixes")
    drawn = _draw(table, options.mixes, options.calibration.seed)
    whole = [scheme.modules for scheme in schemes]
    mixed = [_mix(table, packed, row) for row in drawn]
    found = divergences(model, [*whole, *mixed], tokens, stage)
    measured = found.kl[len(whole) :].mean(1).tolist()
    mixes = Mixes([_sum(table, row) for row in drawn], measured) if drawn else None
    where = Where(source.calibration_name, options.calibration, Prefixed(model))
    progress.details["sensitivity"] = [
        _details(table, scheme, column, found, mixes, where)
        for column, scheme in enumerate(schemes)
    ]
    progress.details["model"] = {**facts, **job["model_identity"]}
    progress.details["calibration"] = {
        **dataclasses.asdict(options.calibration),
        "digest": source.calibration_digest(),
        "text": source.calibration_name,
    }
    progress.values += _values(table, schemes, found, mixes, where)
    progress.details["notes"].append(
        "weights are dequantized and all is computed in float32; activations are not rounded"
    )
    progress.write("ok")


@dataclass(frozen=True)
class Where:
    """What the figures were measured on: text, crops, and the model's blocks."""

    text: str
    calibration: Calibration
    runner: Prefixed

    @property
    def protocol(self) -> str:
        """Name of text, windows and tokens, part of every figure."""
        crops = self.calibration
        return f"calibration_{self.text}_{crops.samples}x{crops.seq_len}"

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return self.calibration.samples * (self.calibration.seq_len - 1)


def _check_model(source: ModelSource, random_weights: bool) -> None:
    """Raise ConfigError for a model whose predictions of a next token say nothing."""
    if random_weights:
        raise ConfigError(
            f"the weights of model {source.name} are random, so what they predict says nothing of "
            "how sensitive a layer is; take a trained model"
        )
    if describes_encoder(source.architecture()):
        raise ConfigError(
            f"model {source.name} is an encoder, and job=sensitivity scores next tokens; take a "
            "causal language model"
        )


def _methods(method: Method, bits: Sequence[int] | None) -> list[Method]:
    """Return the method, or it with each of `bits`.

    Raises:
        ConfigError: it cannot quantize single matrices, rounds activations, or has no such bits.
    """
    if not isinstance(method, LayerwiseMethod):
        raise ConfigError(
            f"method {method.name} quantizes the model as a whole, so no matrix can be quantized "
            "alone; job=sensitivity takes methods that make packed matrices one by one, as "
            "method=rtn and method=gptq"
        )
    if getattr(method, "activation_bits", None) is not None:
        raise ConfigError(
            f"method.activation_bits of {method.name} is {method.activation_bits}; "  # type: ignore[attr-defined]
            "job=sensitivity rounds weights alone: leave it null"
        )
    if bits is None:
        return [method]
    fields = [field.name for field in dataclasses.fields(cast(Any, method))]
    if "bits" not in fields:
        raise ConfigError(
            f"method {method.name} has no option bits, so job.options.bits must be null"
        )
    return [dataclasses.replace(cast(Any, method), bits=each) for each in bits]


def _crops(texts: Texts, asked: Calibration, context: int | None, option: str) -> Tensor:
    """Return the crops of the calibration text, int64 [samples, seq_len].

    Raises:
        ConfigError: they are longer than the model's context or than the text.
    """
    if context is not None and asked.seq_len > context:
        raise ConfigError(
            f"{option}.calibration.seq_len is {asked.seq_len}, but the model reads at most "
            f"{context} tokens"
        )
    return texts.calibration(asked.samples, asked.seq_len, asked.seed)


def _scheme(method: Method, model: Any, texts: Texts, context: int | None) -> Scheme:
    """Return what `method` makes of each matrix of `model`, which is left as it was."""
    matrices, _ = method.select(model)
    shown = None
    if method.needs_calibration:
        asked: Calibration = method.calibration  # type: ignore[attr-defined]  # such methods have it
        shown = _crops(texts, asked, context, "method")
    layerwise = cast(LayerwiseMethod, method)
    modules = layerwise.modules(model, matrices, shown)
    return Scheme(_label(method), method, matrices, modules)


def _label(method: Method) -> str:
    """Return the scheme in words: `rtn 4 bits g128`."""
    size = method.group_size
    group = "" if size is None else " per channel" if size == -1 else f" g{size}"
    return f"{method.name}{'' if method.bits is None else f' {method.bits:g} bits'}{group}"


def _draw(table: Table, mixes: int, seed: int) -> list[list[int | None]]:
    """Return for each mix the scheme of each matrix; None leaves it untouched."""
    generator = torch.Generator().manual_seed(seed)
    count = len(table.schemes)
    # With one scheme alone the choice is between it and nothing.
    choices = 2 if count == 1 else count
    drawn = torch.randint(0, choices, (mixes, len(table.names)), generator=generator)
    return [[None if scheme == count else scheme for scheme in row] for row in drawn.tolist()]


def _mix(
    table: Table, packed: Mapping[str, Mapping[str, nn.Module]], row: Sequence[int | None]
) -> dict[str, nn.Module]:
    """Return the packed modules of a mix."""
    pairs = [
        (name, table.schemes[c]) for name, c in zip(table.names, row, strict=True) if c is not None
    ]
    return {name: packed[label][name] for name, label in pairs if name in packed[label]}


def _sum(table: Table, row: Sequence[int | None]) -> float:
    """Return the sum of the single KLs of a mix, nats."""
    single = [table.kl[number, c] for number, c in enumerate(row) if c is not None]
    return float(torch.stack(single).nansum()) if single else 0.0


def _details(
    table: Table,
    scheme: Scheme,
    column: int,
    found: Divergences,
    mixes: Mixes | None,
    where: Where,
) -> dict[str, Any]:
    """Return the JSON of one scheme; what all schemes share stands in each."""
    number = {name: row for row, name in enumerate(table.names)}
    modules = []
    for matrix in scheme.matrices:
        row, block = number[matrix.name], where.runner.block_of(matrix.name)
        inside = matrix.name.removeprefix(f"{where.runner.prefix}.{block}.")
        modules.append(
            {
                "name": matrix.name,
                "block": block,
                "module": inside,
                "weights": matrix.weights,
                "bits_per_weight": scheme.method.stored_bits(matrix) / matrix.weights,
                "kl": float(table.kl[row, column]),
                "kl_stderr": float(table.kl_stderr[row, column]),
                "loss": float(table.loss[row, column]),
            }
        )
    prediction = mixes and {
        "mixes": len(mixes.measured),
        "schemes": list(table.schemes),
        "rank_correlation": mixes.rank_correlation,
        "predicted": mixes.predicted,
        "measured": mixes.measured,
    }
    return {
        "scheme": scheme.label,
        "modules": modules,
        "noise_floor_kl": table.noise_floor,
        "batch_floor_kl": table.batch_floor,
        "all_kl": float(found.kl[column].mean()),
        "all_loss": float(found.loss[column].mean()),
        "sum_kl": float(table.kl[:, column].nansum()),
        "tokens": where.tokens,
        "text": where.text,
        "cost": table.cost,
        "prediction": prediction,
    }


def _values(
    table: Table,
    schemes: Sequence[Scheme],
    found: Divergences,
    mixes: Mixes | None,
    where: Where,
) -> list[Value]:
    """Return the figures of the record; those of one scheme have it in their protocol."""

    def value(metric: str, scheme: str, figure: float, unit: str, better: bool | None) -> Value:
        protocol = f"{where.protocol} {scheme}".strip()
        return Value("sensitivity", metric, protocol, figure, unit, better)

    values = []
    for column, scheme in enumerate(schemes):
        samples = tuple(found.kl[column].tolist())
        whole = value("all_kl", scheme.label, float(found.kl[column].mean()), "nats", False)
        loss = float(found.loss[column].mean())
        values += [
            dataclasses.replace(whole, stderr=stderr_of_mean(samples), samples=samples),
            value("all_loss_increase", scheme.label, loss, "nats", False),
            value("sum_kl", scheme.label, float(table.kl[:, column].nansum()), "nats", None),
        ]
    values += [
        value("noise_floor_kl", "", table.noise_floor, "nats", None),
        value("batch_floor_kl", "", table.batch_floor, "nats", None),
        value("block_forwards", "", float(table.cost["block_forwards"]), "", None),
    ]
    if mixes is not None:
        values.append(value("rank_correlation", "", mixes.rank_correlation, "", True))
    return values
