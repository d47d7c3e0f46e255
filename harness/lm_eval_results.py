"""A cell's `results.json`: what `lm_eval --output_path` would have left of the cell's tasks.

Format: lm-eval 0.4.13 (`lm_eval/result_schema.py`), so what reads its results reads these. It holds
what came through lm-eval and nothing else: perplexity, divergence, size and speed follow protocols
of this project and stand in the record alone. One key more, `quantbench`, says which cell this is.
Unlike the record and unlike lm-eval's own files it is strict JSON: a figure that is no finite
number is null here, a standard error `N/A`, lm-eval's word for none; the record has the figure.

Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.record import Record, write_atomically

FILE_NAME = "results.json"

NOT_SET = ("max_batch_size", "use_cache", "gen_kwargs", "random_seed", "numpy_seed", "torch_seed")
"""Options of lm-eval that cells do not have."""

PER_TASK = ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes")


def write_results(
    record: Record,
    kept: Mapping[str, Any],
    folder: Path,
    last_look: Callable[[], None] = lambda: None,
) -> None:
    """Write `results.json` into `folder` (made if missing); of nothing `kept` none is left there.

    Written before the record, so that a cell that is done has both; `last_look` is that of
    `write_atomically`.
    """
    path = folder / FILE_NAME
    if not kept:
        last_look()
        path.unlink(missing_ok=True)
        return
    text = json.dumps(document(record, kept), ensure_ascii=False, indent=2, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode(), last_look)


def document(record: Record, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of the cell of `record` in lm-eval's form.

    `kept` is `Context.lm_eval`: of each task what lm-eval said, of the model, and the options.
    """
    packages = record.environment.get("packages", {})
    found = {
        **{key: value for key, value in kept.items() if key not in PER_TASK},
        **{key: dict(sorted(kept.get(key, {}).items())) for key in PER_TASK},
        "results": dict(sorted(kept["results"].items())),
        "config": _config(record, kept),
        "date": datetime.fromisoformat(record.started).timestamp(),
        "pretty_env_info": _environment(record),
        "transformers_version": packages.get("transformers", "N/A"),
        "lm_eval_version": packages.get("lm_eval", "N/A"),
        "git_hash": None,
        "upper_git_hash": None,
        "model_source": "quantbench",
        # A row of a table of results needs a name of its own, and cells of one model have one name.
        "model_name": record.cell,
        "model_name_sanitized": record.cell,
        "quantbench": _cell(record),
    }
    plain: dict[str, Any] = _finite(found)
    return plain


def _config(record: Record, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's `config`: what was loaded and how, as far as a cell has it."""
    resolved = record.config.get("resolved", {})
    model, method = resolved.get("model", {}), resolved.get("method", {})
    options = {
        key: value
        for key, value in method.items()
        if key not in ("_target_", "name") and isinstance(value, str | int | float)
    }
    arguments = {
        "pretrained": model.get("id") or record.config["model"],
        "revision": model.get("revision"),
        "method": record.config["method"],
        **options,
        "bits": record.config.get("bits"),
        "group_size": record.config.get("group_size"),
    }
    facts = record.details.get("model", {})
    return {
        "model": "quantbench",
        "model_args": {key: value for key, value in arguments.items() if value is not None},
        "model_num_parameters": facts.get("parameters"),
        "model_revision": model.get("revision"),
        "model_sha": facts.get("commit") or facts.get("sha256"),
        "device": record.environment.get("device"),
        "batch_sizes": [],
        **dict.fromkeys(NOT_SET),
        "bootstrap_iters": 0,
        **kept.get("config", {}),
    }


def _cell(record: Record) -> dict[str, Any]:
    """Return which cell this is, and whether the record has it whole."""
    axes = ("model", "method", "bits", "group_size", "hardware", "suite", "cell_key", "command")
    return {
        "cell": record.cell,
        "status": record.status,
        "errors": [f"{error.stage}: {error.message}" for error in record.errors],
        **{key: record.config.get(key) for key in axes},
        "execution": record.details.get("execution"),
        "record": "record.json",
    }


def _environment(record: Record) -> str:
    """Return the facts of the machine, one a line; packages as `name==version`."""
    facts = {key: value for key, value in record.environment.items() if key != "packages"}
    packages = record.environment.get("packages", {})
    lines = [f"{key}: {value}" for key, value in facts.items()]
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in packages.items())])


def _finite(value: Any, key: str = "") -> Any:
    """Return `value` with null, or `N/A` for a standard error, for what is no finite number."""
    if isinstance(value, Mapping):
        return {name: _finite(one, str(name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "N/A" if "_stderr," in key else None
    return value
