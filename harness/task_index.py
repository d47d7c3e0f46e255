"""What the names of lm-eval's tasks, groups and tags stand for, without their data.

lm-eval (0.4.13) parses 14,683 YAML files to know its names, which takes 8 seconds. Here the index
it makes is remembered, and with it what the definitions behind the wanted names say: data sets,
splits, few-shot source. How groups, tags and overrides resolve is `lm_eval.tasks._factory`'s way.
Torch-free, and lm_eval is imported only where nothing is remembered: the driver asks, too.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.embedded.tasks import FOLDER
from harness.record import digest
from harness.remembered import recall, remember
from harness.task_files import tree_digest
from kernels.errors import ConfigError

FORMAT = 1
CLOSE_NAMES = 3
LM_EVAL = "lm_eval"
DIGESTS = "digests.json"

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One task as its definition has it.

    Attributes:
        task: its name.
        names: what it is reached by, from the name asked for to its own: groups, tag, task.
        dataset, subset: as `datasets.load_dataset` is asked for them; None where code decides.
        files: data files that the definition names itself, absolute.
        output_type: kind of its requests (`multiple_choice`, `generate_until`, ...), None where
            code decides.
        num_fewshot: its own number of worked examples.
        has_examples: whether it names where worked examples come from.
        runs_code: it executes what the model writes.
        samples: it asks for sampling.
    """

    task: str
    names: tuple[str, ...]
    dataset: str | None
    subset: str | None
    files: tuple[str, ...]
    output_type: str | None
    num_fewshot: int | None
    has_examples: bool
    runs_code: bool
    samples: bool

    @property
    def asked(self) -> str:
        """The name of the list of tasks that it belongs to."""
        return self.names[0]


def parts_of(names: Sequence[str], include: Path | None, cache: Path) -> list[Part]:
    """Return the tasks behind `names`, each once a name; `cache` is the folder that cells share.

    Raises:
        ConfigError: a name is unknown; the sentence says which come close.
    """
    key = [FORMAT, metadata.version(LM_EVAL), list(names), _folders_digest(include, cache)]
    path = cache / "tasks" / f"{digest(key)[:32]}.json"
    known = recall(path)
    if isinstance(known, list):
        return [_part(fields) for fields in known]
    registry = _entries(names, include, cache)
    found = [part for name in names for part in _parts(name, registry)]
    remember(path, [asdict(part) for part in found])
    return found


def registry_of(
    names: Sequence[str], parts: Sequence[Part], include: Path | None, cache: Path
) -> dict[str, Any]:
    """Return what lm-eval loads `names` from: name -> its `Entry`, of all that they may reach.

    Definitions are lm-eval's own and the user's, unchanged but for one thing: data files that lie
    beside a YAML file are named absolutely, so that they are found from anywhere.
    """
    registry = _entries(names, include, cache)
    for part in parts:
        entry = registry.get(part.task)
        if part.files and entry is not None and entry.yaml_path is not None:
            config = _config(entry, resolve=True)
            registry[part.task] = replace(entry, cfg=config, yaml_path=None)
    return registry


def _entries(names: Sequence[str], include: Path | None, cache: Path) -> dict[str, Any]:
    """Return name -> `Entry`; of equal names the user's counts, as in lm-eval."""
    with _quiet():
        from lm_eval.tasks._index import Kind, TaskIndex

        own: dict[str, Any] = TaskIndex.build([FOLDER, *([include] if include else [])])
    # A group may name anything; plain tasks are all there is to them.
    if all(name in own and own[name].kind is not Kind.GROUP for name in names):
        return own
    registry = {**_defaults(cache), **own}
    unknown = [name for name in names if name not in registry]
    if unknown:
        close = difflib.get_close_matches(unknown[0], registry, CLOSE_NAMES, 0.5)
        said = f"; close to it are {', '.join(close)}" if close else ""
        raise ConfigError(
            f"{unknown[0]} is no task, group or tag of lm-eval "
            f"{metadata.version(LM_EVAL)} or of an include folder{said}"
        )
    return registry


def _absolute(files: Any, folder: Path) -> Any:
    """Return `data_files` with those absolute that lie in `folder`."""
    if isinstance(files, Mapping):
        return {split: _absolute(one, folder) for split, one in files.items()}
    if isinstance(files, str):
        return str(folder / files) if (folder / files).is_file() else files
    return [_absolute(one, folder) for one in files]


def _defaults(cache: Path) -> dict[str, Any]:
    """Return lm-eval's own index, made once for a version and a `cache`."""
    with _quiet():
        import lm_eval.tasks
        from lm_eval.tasks._index import Entry, Kind

    root = Path(lm_eval.tasks.__file__).parent
    path = defaults_file(cache)
    known = recall(path)
    if not isinstance(known, dict):
        known = indexed([root], root)
        remember(path, known)
    registry: dict[str, Any] = {
        name: Entry(name, Kind[kind], root / file if file else None, None, set(tags))
        for name, (kind, file, tags) in known.items()
    }
    return registry


def defaults_file(cache: Path) -> Path:
    """Return where the index of the installed lm-eval is remembered."""
    return cache / "tasks" / f"index-{metadata.version(LM_EVAL)}.json"


def indexed(folders: Sequence[Path], root: Path) -> dict[str, list[Any]]:
    """Return lm-eval's index of `folders` as JSON: name -> kind, file below `root`, tasks of a tag.

    The definitions themselves stay where they are: lm-eval reads those it loads.
    """
    with _quiet():
        from lm_eval.tasks._index import TaskIndex

        made = TaskIndex.build(folders)
    return {
        name: [
            entry.kind.name,
            entry.yaml_path.relative_to(root).as_posix() if entry.yaml_path else None,
            sorted(entry.tags),
        ]
        for name, entry in made.items()
    }


def _parts(asked: str, registry: Mapping[str, Any]) -> list[Part]:
    try:
        found = {
            names[-1]: _part_of(names, config) for names, config in _expand(asked, (), {}, registry)
        }
    except (KeyError, TypeError, ValueError, OSError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"the definition of {asked} cannot be read ({reason})") from error
    return list(found.values())


def _expand(
    name: str, above: tuple[str, ...], overrides: Overrides, registry: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield (names down to a task, its configuration) for every task behind `name`."""
    from lm_eval.tasks._index import Kind

    entry = registry[name]
    if entry.kind is Kind.TAG:
        for task in sorted(entry.tags):
            # Inside a group a tag leaves no trace; asked for by itself it is a name of its own.
            yield from _expand(task, above or (name,), overrides, registry)
        return
    config = _config(entry)
    if entry.kind is Kind.GROUP:
        yield from _members(name, config, above, overrides, registry)
    else:
        changed = {**config, **overrides}
        yield (*above, changed["task"]), changed


def _members(
    group: str,
    config: Mapping[str, Any],
    above: tuple[str, ...],
    overrides: Overrides,
    registry: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield what `_expand` does for the members of a group, by name, with changes, or inline."""
    from lm_eval.tasks._factory import GROUP_FIELD_NAMES

    names = (*above, group)
    own = {key: value for key, value in config.items() if key not in GROUP_FIELD_NAMES}
    merged = {**own, **overrides}
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        changes = {} if isinstance(member, str) else dict(member)
        if "group" in changes:
            inner = changes.pop("group")
            if inner in registry:
                yield from _expand(inner, names, {**merged, **changes}, registry)
            else:
                yield from _members(f"{group}::{inner}", changes, names, merged, registry)
            continue
        inner = member if isinstance(member, str) else changes.get("task")
        if inner is None:
            raise ValueError(f"group {group} has a member without a name")
        if inner in registry:
            # A name given to a group goes down to its tasks, as in lm-eval.
            yield from _expand(inner, names, {**merged, **changes}, registry)
        else:
            inline = f"{group}::{inner}"
            yield (*names, inline), {**merged, **changes, "task": inline}


def _config(entry: Any, resolve: bool = False) -> dict[str, Any]:
    """Return the definition behind `entry`, data files beside it named absolutely.

    Unless `resolve` says otherwise functions are left as names, so that none of its code runs.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(entry.yaml_path, resolve_func=resolve)
    given = config.get("dataset_kwargs")
    if isinstance(given, Mapping) and "data_files" in given:
        files = _absolute(given["data_files"], entry.yaml_path.parent)
        config["dataset_kwargs"] = {**given, "data_files": files}
    return config


def _part_of(names: tuple[str, ...], config: Mapping[str, Any]) -> Part:
    by_code = "class" in config
    few = config.get("fewshot_config") or {}
    generation = config.get("generation_kwargs") or {}
    sources = [config.get(f"{kind}_split") for kind in ("training", "validation", "fewshot")]
    sources += [few.get("split"), few.get("samples")] if isinstance(few, Mapping) else []
    return Part(
        task=names[-1],
        names=names,
        dataset=None if by_code or config.get("custom_dataset") else config.get("dataset_path"),
        subset=config.get("dataset_name"),
        files=tuple(_listed((config.get("dataset_kwargs") or {}).get("data_files"))),
        output_type=None if by_code else config.get("output_type", "generate_until"),
        num_fewshot=config.get("num_fewshot"),
        has_examples=by_code or any(source is not None for source in sources),
        runs_code=bool(config.get("unsafe_code")),
        samples=bool(generation.get("do_sample") or generation.get("temperature")),
    )


def _listed(files: Any) -> list[str]:
    """Return the files among `data_files` that are here, absolute; addresses are not."""
    if files is None:
        return []
    if isinstance(files, str):
        return [str(Path(files).resolve())] if Path(files).is_file() else []
    several = files.values() if isinstance(files, Mapping) else files
    return [name for one in several for name in _listed(one)]


def _part(fields: Mapping[str, Any]) -> Part:
    lists = {key: tuple(fields[key]) for key in ("names", "files")}
    return Part(**{**fields, **lists})


def _folders_digest(include: Path | None, cache: Path) -> list[str]:
    folders = [FOLDER] if include is None else [FOLDER, include]
    return [tree_digest(folder, cache / DIGESTS) for folder in folders]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what lm-eval logs at import and of names it has twice away from who runs a sweep."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
