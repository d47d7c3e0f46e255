"""Mixed precision and mixed bits: each matrix of the model in a scheme of its own, or as it was.

Which one is said by words and patterns (`keep`, `rules`, `rest`), or found under a budget: the KL
of each matrix in each candidate alone (`methods.sensitivity`, on the calibration text), and of all
mixes within the budget the one with the least sum (`methods.allocation`). Candidates are methods
that make packed modules of single matrices (rtn, gptq); the artefact is this project's own, each
matrix with its own layout, and a matrix that stays as it was is stored in the checkpoint's type.

The budget, and the row's bits a weight, are over all matrices in scope, those that stay unquantized
included. A candidate that calibrates is shown the text of this method, not of its own node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods import repack, sensitivity
from methods.allocation import UNITS, Budget, Map, limit_of, smallest, solve
from methods.base import (
    Calibration,
    Engine,
    Hardware,
    KernelUse,
    LayerwiseMethod,
    Matrix,
    QuantizeReport,
)
from methods.layers import Scope, check_finite, end_names, is_tied, replace, select
from methods.mixing import AS_IT_WAS, Mixing
from methods.options import names, need_calibration, require_flags
from methods.packed import PATH_TOLERANCE, load_engine

FILE = "mixed.json"
"""What the artefact holds of the matrices that stay unquantized, which are not in layers.json."""

DEFAULT = Budget(average_bits=4.5)


@dataclass(frozen=True)
class Mixed:
    """A method for each matrix, with all its options.

    Attributes:
        calibration: the text that sensitivities are measured on.
        candidates: name -> method.
        budget: what the mix may cost; without one, and without `rest`, 4.5 bits a weight.
        keep: words and patterns (`methods.allocation.Map`) of matrices that stay as they were.
        rules: word or pattern -> candidate; the first that means a matrix decides, after `keep`.
        rest: without a budget, the candidate of the matrices that nothing else names.
        unquantized: whether a budget may leave a matrix as it was.
        head, embeddings: in scope too.
        hardware: where the products are timed, for a budget of seconds.
    """

    name: str
    calibration: Calibration
    candidates: Mapping[str, Any]
    budget: Budget = field(default_factory=Budget)
    keep: Sequence[str] = ()
    rules: Mapping[str, str] | None = None
    rest: str | None = None
    unquantized: bool = True
    head: bool = False
    embeddings: bool = False
    hardware: Hardware | None = None

    group_size: ClassVar[int | None] = None
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        flags = {"unquantized": self.unquantized, "head": self.head, "embeddings": self.embeddings}
        require_flags(self.name, cast(dict[str, object], flags))
        object.__setattr__(self, "keep", names(self.keep))
        for name, method in self.candidates.items():
            _check_candidate(str(name), method)
        if self.rest is not None and self.budget.kind is not None:
            raise ConfigError(
                f"method.rest of {self.name} is {self.rest!r} beside "
                f"method.budget.{self.budget.kind}, which decides over the rest; give one of them"
            )
        rest = {} if self.rest is None else {"rest": self.rest}
        for where, candidate in {**self._rules, **rest}.items():
            if candidate not in (*self.candidates, AS_IT_WAS):
                raise ConfigError(
                    f"method {self.name} names the candidate {candidate!r} for {str(where)!r}; "
                    f"there are {', '.join([*map(str, self.candidates), AS_IT_WAS])}"
                )
        if self.budget.kind == "decode_seconds" and self.hardware is None:
            raise ConfigError(
                "method.budget.decode_seconds is measured on the hardware, which is then part of "
                "the artefact: add 'method.hardware=${hardware}'"
            )

    @property
    def _rules(self) -> Mapping[str, str]:
        return self.rules or {}

    @property
    def _budget(self) -> Budget | None:
        """The budget, None where `rest` decides."""
        if self.rest is not None:
            return None
        return DEFAULT if self.budget.kind is None else self.budget

    @property
    def bits(self) -> float | None:
        """Known when the plan is made."""
        return None

    @property
    def needs_calibration(self) -> bool:
        """Whether there are sensitivities to measure, or a candidate that is used needs text."""
        return self._budget is not None or any(
            self.candidates[name].needs_calibration for name in self._used() if name != AS_IT_WAS
        )

    def _used(self) -> list[str]:
        """Return the candidates that some matrix may get, without those left as they were."""
        if self._budget is not None:
            return list(self.candidates)
        return [name for name in self.candidates if name in (*self._rules.values(), self.rest)]

    def check(self, hardware: Hardware) -> None:
        """Refuse what a candidate refuses on `hardware`."""
        for name in self._used():
            self.candidates[name].check(hardware)

    def stored_bits(self, matrix: Matrix) -> int:
        """Not known of a matrix alone.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"what method {self.name} stores is known when its plan is made, not by arithmetic of "
            "one matrix; run it with another suite than size_only"
        )

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the matrices in scope, those that will stay as they were included.

        Raises:
            ConfigError: a pattern means no matrix, or a candidate refuses a width.
        """
        selection = select(model, Scope(self.head, self.embeddings))
        self._allowed(model, selection.matrices)
        return selection.matrices, selection.left_out

    def _allowed(self, model: nn.Module, matrices: Sequence[Matrix]) -> dict[str, list[str]]:
        """Return matrix -> the candidates it may get: one where a pattern or `rest` decides."""
        fixed = self._fixed(model, matrices)
        covered = {
            name: {matrix.name for matrix in self.candidates[name].select(model)[0]}
            for name in self._used()
        }
        free = [self.rest] if self.rest is not None else [*self.candidates, AS_IT_WAS]
        if self.rest is None and not self.unquantized:
            free.remove(AS_IT_WAS)
        found = {}
        for matrix in matrices:
            wanted = [fixed[matrix.name]] if matrix.name in fixed else free
            there = [c for c in wanted if c == AS_IT_WAS or matrix.name in covered[c]]
            if not there:
                raise ConfigError(
                    f"no candidate of method {self.name} takes {matrix.name}: "
                    f"{', '.join(map(str, wanted))} leave it out (their keep, head, embeddings)"
                )
            found[matrix.name] = there
        return found

    def _fixed(self, model: nn.Module, matrices: Sequence[Matrix]) -> dict[str, str]:
        """Return matrix -> the candidate that `keep` or the first rule names."""
        places = Map(model, matrices)
        rules = [("keep pattern", p, AS_IT_WAS) for p in self.keep]
        rules += [("rule", p, candidate) for p, candidate in self._rules.items()]
        found: dict[str, str] = {}
        for option, pattern, candidate in rules:
            means = places.matching(pattern)
            # What is out of scope stays as it was anyway.
            spared = candidate == AS_IT_WAS and str(pattern) in end_names(model)
            if not means and not spared:
                raise places.unmatched(option, pattern)
            found = {**dict.fromkeys(means, candidate), **found}
        return found

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Make the plan, put the modules in, and write the model into folder `into`.

        Raises:
            ConfigError: the budget cannot be met, a weight is not finite, or see `select`.
        """
        matrices, left_out = self.select(model)
        for name, parameter in model.named_parameters():
            check_finite(name, parameter)
        allowed = self._allowed(model, matrices)
        modules = {}
        for name in self._used():
            own = [matrix for matrix in matrices if name in allowed[matrix.name]]
            made = self.candidates[name].modules(model, own, calibration) if own else {}
            modules[name] = made
        mixing = Mixing(model, matrices, modules)
        plan, facts = self._plan(mixing, allowed, calibration)
        chosen = mixing.chosen(plan)
        kept = [matrix for matrix in matrices if matrix.name not in chosen]
        notes = self._notes(model, matrices, kept)
        if is_tied(model) and any(m.role != "block" and m.name in chosen for m in matrices):
            # Both are stored from here on, so the artefact must not tie them again.
            cast(Any, model).config.tie_word_embeddings = False
            notes.append("head and embedding were one parameter; both are stored from here on")
        for matrix in matrices:
            if matrix.name in chosen:
                replace(model, matrix, chosen[matrix.name])
        artefacts.save(model, into, {name: one.facts() for name, one in chosen.items()})
        (into / FILE).write_text(json.dumps({AS_IT_WAS: {m.name: m.weights for m in kept}}))
        return QuantizeReport(
            matrices,
            mixing.stored(plan),
            left_out,
            notes,
            bits=mixing.code_bits(plan),
            details={"allocation": facts},
        )

    def _plan(
        self, mixing: Mixing, allowed: Mapping[str, Sequence[str]], calibration: Tensor | None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Return matrix -> candidate, and the JSON facts of how that was found.

        Raises:
            ConfigError: the budget cannot be met, or has no meaning for the model.
        """
        budget = self._budget
        facts: dict[str, Any] = {"candidates": mixing.columns}
        if budget is None:
            plan = {name: there[0] for name, there in allowed.items()}
            reached = mixing.stored(plan) / mixing.weights
            shown = {"kind": "patterns", "wanted": None, "reached": reached}
            facts |= {"budget": {**shown, "unit": UNITS["average_bits"]}}
            facts |= {"modules": mixing.rows(plan, {}), "predicted_kl": None}
            return plan, {**facts, "solver": {}, "cost": {}}
        if is_tied(mixing.model) and any(matrix.role != "block" for matrix in mixing.matrices):
            raise ConfigError(
                "head and embedding are one parameter in this model: what one of them costs "
                "depends on the other; with a budget leave method.head and method.embeddings false"
            )
        tokens = need_calibration(f"method {self.name}", calibration)
        cost = mixing.costs(budget, allowed, self.hardware)
        limit = limit_of(budget, mixing.weights)
        share = mixing.weights if budget.kind == "average_bits" else 1
        if smallest(cost) > limit:
            raise ConfigError(
                f"method.budget.{budget.kind} of {self.name} is {budget.wanted:g}; the smallest "
                f"that its candidates can meet is {smallest(cost) / share:.7g} "
                f"{UNITS[str(budget.kind)]}"
            )
        table = sensitivity.measure(mixing.model, mixing.matrices, mixing.modules, tokens)
        kl = np.concatenate([table.kl.numpy(), np.zeros((len(mixing.matrices), 1))], axis=1)
        mix = solve(kl, cost, limit)
        plan = {
            matrix.name: mixing.columns[column]
            for matrix, column in zip(mixing.matrices, mix.chosen, strict=True)
        }
        kls = {m.name: float(kl[row, mix.chosen[row]]) for row, m in enumerate(mixing.matrices)}
        shown = {"kind": budget.kind, "wanted": budget.wanted, "reached": mix.cost / share}
        chosen = mixing.chosen(plan)
        return plan, {
            **facts,
            "budget": {**shown, "unit": UNITS[str(budget.kind)]},
            "modules": mixing.rows(plan, kls),
            "predicted_kl": mix.kl,
            "mix_kl": sensitivity.kl_of(mixing.model, chosen, tokens)[0] if chosen else 0.0,
            "noise_floor_kl": table.noise_floor,
            "solver": mix.solver,
            "cost": table.cost,
        }

    def _notes(
        self, model: nn.Module, matrices: Sequence[Matrix], kept: Sequence[Matrix]
    ) -> list[str]:
        """Return what a reader of the row must know beside the options."""
        notes = ["bits are the average over the matrices in scope, scales not counted"]
        if kept:
            kind = str(artefacts.checkpoint_dtype(model)).removeprefix("torch.")
            notes.append(
                f"{len(kept)} of {len(matrices)} matrices in scope stay unquantized ({kind}); "
                "coverage, bits a weight and size count them"
            )
        shown = [name for name in self._used() if self.candidates[name].needs_calibration]
        if shown:
            notes.append(
                f"{', '.join(shown)} was shown the calibration text of {self.name}; the settings "
                "of its own node are not used"
            )
        return notes

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load for `hardware` on its packed kernels where it has them."""
        return self._load(artefact, hardware, packed=True)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load for `hardware` with every matrix dequantized at each call, to compare with."""
        return self._load(artefact, hardware, packed=False)

    def _load(self, artefact: Path, hardware: Hardware, packed: bool) -> Engine:
        kept = json.loads((artefact / FILE).read_text())[AS_IT_WAS]
        uses = [KernelUse(n, "Linear", "torch.linear", "packed", w) for n, w in kept.items()]
        return load_engine(artefact, hardware, packed, repack.build, uses)


def _check_candidate(name: str, method: Any) -> None:
    """Raise ConfigError where the matrices of `method` cannot be taken singly and run here."""
    owner = f"method.candidates.{name}"
    if name == AS_IT_WAS:
        raise ConfigError(
            f"{owner}: the name {AS_IT_WAS} is that of a matrix as it was; take another"
        )
    kind = getattr(method, "name", method)
    if not isinstance(method, LayerwiseMethod):
        raise ConfigError(
            f"{owner} is {kind}, whose matrices cannot be taken singly (awq folds scales into the "
            "layers beside a matrix); candidates can be rtn and gptq"
        )
    if getattr(method, "activation_bits", None) is not None:
        raise ConfigError(
            f"{owner} rounds activations, which mixed does not; set {owner}.activation_bits=null"
        )
    if getattr(method, "act_order", False):
        raise ConfigError(
            f"{owner} is {kind} with act_order=true, which stores inputs in another "
            f"order; set {owner}.act_order=false"
        )
    if getattr(method, "kernel", "quantbench") != "quantbench":
        raise ConfigError(
            f"{owner} is {kind} run by another library's kernels, and mixed runs all matrices on "
            f"this project's; set {owner}.kernel=quantbench"
        )
