"""From a composed configuration to a cell with its identities. Torch-free.

A sweep plans thousands of cells: what they have in common is found once (`harness.known`), and
equal parts of their configurations are held once.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness import identity
from harness.cell import Cell
from harness.known import Known, text_of
from harness.models import ModelSource
from harness.record import digest
from harness.redact import secret_in
from harness.task_identity import task_identity
from kernels.errors import ConfigError

REPEATED = ("seed", "calibration", "none")
"""What makes rows of a report repetitions of one another."""

REFERENCE = re.compile(r"\$\{([a-z_]\w*(?:\.[a-z_]\w*)*)\}")
"""A value that is the value of another node, as `${bits}` or `${data.path}`."""

NO_PART = ("data", "hydra")
"""Nodes of a composed configuration that are no part of a cell's: its `data` is the chosen one."""


def plan_cell(config: DictConfig, overrides: Sequence[str], known: Known | None = None) -> Cell:
    """Return the cell of a composed configuration; `known` is for all cells of one plan.

    Raises:
        ConfigError: a model, text or value that this cell needs is missing or wrong.
    """
    known = known or Known()
    resolved = _resolve(config)
    _refuse_secrets(known, resolved, overrides)
    runs_dir = Path(resolved["runs_dir"]).absolute()
    facts = _Facts(known, resolved, runs_dir / "cache")
    model_identity, evaluation = facts.model_identity(), facts.evaluation()
    # A folder's or a hub model's own name says more than the name of the choice.
    resolved["model"]["name"] = facts.model.name
    if "commit" in model_identity:
        # The children load exactly what the keys were computed from.
        resolved["model"]["revision"] = model_identity["commit"]
    reference = model_identity.get("reference", {})
    if "commit" in reference:
        resolved["model"]["reference"] = f"{reference['id']}@{reference['commit']}"

    def key_of(node: dict[str, Any]) -> str:
        calibration = facts.calibration() if facts.shows_calibration(node) else None
        return identity.artefact_key(model_identity, node, calibration, resolved["seed"], known)

    artefact, baseline = key_of(resolved["method"]), key_of(resolved["baseline"])
    key = identity.cell_key(artefact, baseline, resolved, evaluation, facts.tasks(), known)
    model_key = digest(model_identity)
    return Cell(
        config={name: known.shared(node) for name, node in resolved.items()},
        runs_dir=runs_dir,
        command=shlex.join(["python", "run.py", *overrides]),
        id=identity.cell_id(resolved, key),
        key=key,
        artefact_key=artefact,
        baseline_key=baseline,
        model_key=model_key,
        reference_key=identity.reference_key(model_key, resolved, evaluation, known),
        evaluation=evaluation,
        model_identity=model_identity,
        random_weights=facts.model.random_weights,
        # A server's model is compared only where asked: its weights need not be here.
        has_reference=facts.has_original() and resolved["method"].get("compare", True),
    )


@dataclass
class _Facts:
    """What a configuration's model and texts are, each found once a plan."""

    known: Known
    config: dict[str, Any]
    cache: Path

    def __post_init__(self) -> None:
        self.model_text, self.data_text = map(text_of, (self.config["model"], self.config["data"]))
        self.size_only = bool(self.config["suite"].get("size_only"))
        self.model: ModelSource = self._made("model")
        self.data: Any = self._made("data")
        self._made("hardware")

    def _made(self, name: str) -> Any:
        node = self.config[name]
        return self.known.once(("made", text_of(node)), lambda: _instantiate(node))

    def model_identity(self) -> dict[str, Any]:
        def find() -> dict[str, Any]:
            if self.size_only:
                return self.model.architecture_identity()
            return self.model.identity(self.cache / "digests.json")

        asked = ("model", self.model_text, str(self.size_only), str(self.cache))
        return self.known.once(asked, find)

    def has_original(self) -> bool:
        asked = ("original", self.model_text)
        return self.known.once(asked, lambda: self.model.original() is not None)

    def evaluation(self) -> str:
        if self.size_only:
            return ""
        found: str = self.known.once(
            ("evaluation", self.data_text), lambda: self.data.evaluation_digest()
        )
        # A job's own calibration text decides its figures as the evaluation text does a row's.
        shown = identity.calibrates(self.config["job"].get("options"))
        return found + self.calibration() if shown else found

    def calibration(self) -> str:
        found: str = self.known.once(
            ("calibration", self.data_text), lambda: self.data.calibration_digest()
        )
        return found

    def shows_calibration(self, node: dict[str, Any]) -> bool:
        return identity.calibrates(node) and not self.size_only

    def tasks(self) -> list[dict[str, Any]]:
        if self.size_only:
            return []
        measures = self.config["suite"]["measures"]
        return self.known.once(
            ("tasks", text_of(measures), self.data_text, str(self.cache)),
            lambda: task_identity(measures.values(), self.data.task_folder(), self.cache),
        )


def _resolve(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain data, with the chosen source of text alone as `data`."""
    source = config.data.source
    if not (isinstance(source, str) and isinstance(config.data.get(source), DictConfig)):
        choices = [key for key, node in config.data.items() if isinstance(node, DictConfig)]
        raise ConfigError(f"data.source is {source!r}; it must be one of {', '.join(choices)}")
    try:
        chosen: dict[str, Any] = _plain(config.data[source], config)
        # Node by node: to copy all that is wanted first would take three times as long.
        resolved = {str(key): _plain(config[key], config) for key in config if key not in NO_PART}
    except OmegaConfBaseException as error:
        raise ConfigError(_missing_value(error)) from error
    if resolved["repeat"] not in REPEATED:
        raise ConfigError(
            f"repeat is {resolved['repeat']!r}; it must be one of {', '.join(REPEATED)}"
        )
    if not isinstance(resolved["baseline"], dict):
        wanted = resolved["baseline"]
        raise ConfigError(
            f"baseline is {wanted!r}; it is chosen among the methods: method@baseline={wanted}"
        )
    then = resolved["method"].get("then")
    if isinstance(then, str):
        raise ConfigError(
            f"method.then is {then!r}; it is chosen among the methods: method@method.then={then}"
        )
    if "path" in chosen and chosen["path"] is None:
        raise ConfigError(
            f"data.source is {source!r}, which reads from a path; give it: data.path=PATH"
        )
    return {**resolved, "data": chosen}


def _refuse_secrets(known: Known, resolved: dict[str, Any], overrides: Sequence[str]) -> None:
    """Raise ConfigError where a key or a password stands in what every record repeats."""
    parts: list[tuple[dict[str, Any], Sequence[str]]]
    parts = [({name: node}, ()) for name, node in resolved.items()]
    parts += [({}, (override,)) for override in overrides]
    for part in parts:
        found = known.once(("secret", text_of(part)), partial(secret_in, *part))
        if found is not None:
            raise ConfigError(found)


def _plain(node: Any, config: DictConfig) -> Any:
    """Return one node of `config` as plain data; raises what OmegaConf raises."""
    if not OmegaConf.is_config(node):
        return node
    try:
        return _filled(OmegaConf.to_container(node), config)
    except _HarderError:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)


class _HarderError(Exception):
    """A value that OmegaConf has to resolve."""


def _filled(found: Any, config: DictConfig) -> Any:
    """Return plain data with the values put in that are no more than the name of another.

    OmegaConf parses each such text anew, which takes longer than all else of a cell's plan.

    Raises:
        _HarderError: another value is to be resolved, or is missing.
    """
    if isinstance(found, dict):
        return {key: _filled(value, config) for key, value in found.items()}
    if isinstance(found, list):
        return [_filled(value, config) for value in found]
    if not isinstance(found, str) or ("${" not in found and found != MISSING):
        return found
    name = REFERENCE.fullmatch(found)
    value = OmegaConf.select(config, name[1], default=MISSING) if name else MISSING
    if value == MISSING or OmegaConf.is_config(value):
        raise _HarderError
    return value


def _instantiate(node: dict[str, Any]) -> Any:
    """Instantiate a torch-free node; a mistake in its values comes out as ConfigError alone."""
    try:
        return instantiate(node)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise ConfigError(" ".join(str(error).split())) from error


def _missing_value(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    if key and "Missing mandatory value" in str(error):
        return f"{key} has no value; give one: {key}=VALUE"
    return " ".join(str(error).split())
