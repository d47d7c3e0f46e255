"""Every public configuration file composes, and what it names can be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
GROUPS = ("model", "method", "hardware", "suite", "job")
SOURCES = [path.stem for path in sorted((CONF / "data").glob("*.yaml"))]
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for value in node.values() for t in targets(value)]
    return []


def test_there_are_choices_in_every_group() -> None:
    assert {group for group, _ in CHOICES} == set(GROUPS)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_a_choice_composes_and_is_named_as_its_file(group: str, choice: str) -> None:
    node = composed(f"{group}={choice}")[group]
    assert node.name == choice
    text = (CONF / group / f"{choice}.yaml").read_text()
    assert text.startswith("# "), "the first line says in a comment what the choice is"


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_what_a_choice_names_can_be_built(group: str, choice: str, tmp_path: Path) -> None:
    path = [f"{group}.path={tmp_path}"] if choice == "local" else []
    config = composed(f"{group}={choice}", *path)
    plain = OmegaConf.to_container(config[group], resolve=True)
    if group == "suite":
        assert plain["measures"] or plain.get("size_only")  # type: ignore[index,call-overload]
        for node in plain["measures"].values():  # type: ignore[index,call-overload,union-attr]
            instantiate(node)
    else:
        instantiate(config[group])


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_text_can_be_built(source: str, tmp_path: Path) -> None:
    config = composed(f"data.source={source}", f"data.path={tmp_path}")
    assert instantiate(config.data[source]).name == source


def test_targets_lie_in_the_project() -> None:
    for group, choice in CHOICES:
        node = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"))
        for target in targets(node):
            assert target.split(".")[0] in ("harness", "methods", "reports"), (group, choice)


def test_no_configuration_folder_is_a_package() -> None:
    assert not list(CONF.rglob("__init__.py"))


def test_the_default_grid_names_every_method_of_its_own() -> None:
    grid = OmegaConf.load(CONF / "config.yaml").hydra.sweeper.params
    named = set(grid.method.split(","))
    assert named <= {path.stem for path in (CONF / "method").glob("*.yaml")}
