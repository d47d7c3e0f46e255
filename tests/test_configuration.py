"""Every public configuration file composes, and what it names can be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hydra_plugins.quantbench import points
from kernels.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
GROUPS = ("model", "method", "hardware", "suite", "job", "profile", "search")
PACKAGES = ("harness", "methods", "reports", "hydra_plugins")
PROFILES = [path.stem for path in sorted((CONF / "profile").glob("*.yaml"))]
SOURCES = [path.stem for path in sorted((CONF / "data").glob("*.yaml"))]
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def chosen(group: str, choice: str, *overrides: str) -> Any:
    """The whole configuration with one choice; a search stands in no list of defaults."""
    return composed(f"{'+' if group == 'search' else ''}{group}={choice}", *overrides)


def targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for value in node.values() for t in targets(value)]
    return []


def test_there_are_choices_in_every_group() -> None:
    assert {group for group, _ in CHOICES} == set(GROUPS)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_a_choice_composes_and_is_named_as_its_file(group: str, choice: str) -> None:
    node = chosen(group, choice)[group]
    # llama.cpp's types are methods of their own in every table.
    kind = f"gguf_{node.type}" if group == "method" and choice.startswith("gguf") else "gguf"
    assert node.name == choice.replace("gguf", kind)
    text = (CONF / group / f"{choice}.yaml").read_text()
    assert text.startswith("# "), "the first line says in a comment what the choice is"


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_what_a_choice_names_can_be_built(group: str, choice: str, tmp_path: Path) -> None:
    given = {
        ("model", "local"): [f"model.path={tmp_path}"],
        ("model", "gguf"): [f"model.path={tmp_path}"],
        ("model", "nanogpt"): [f"model.checkpoint={tmp_path}"],
        ("method", "server"): ["method.url=http://127.0.0.1:1"],
    }
    config = chosen(group, choice, *given.get((group, choice), []))
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


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_names_a_method_that_can_be_built(profile: str) -> None:
    config = composed(f"profile={profile}", "job=deploy")
    assert instantiate(config.method).name == config.method.name
    assert config.suite.name == "deploy"
    assert config.profile.device


def test_the_command_line_stands_above_a_profile() -> None:
    config = composed("profile=mobile_device")
    assert (config.method.bits, config.method.group_size) == (4, 64)
    config = composed("profile=mobile_device", "bits=8", "suite=smoke", "job=deploy")
    assert (config.method.bits, config.method.group_size, config.suite.name) == (8, 64, "smoke")
    assert composed("profile=gpu_server", "hardware=cpu").hardware.device == "cpu"


def test_the_documents_search_has_their_grid_and_a_suite_of_its_own() -> None:
    config = composed("+search=documents")
    counts = [len(str(values).split(",")) for values in config.search.axes.values()]
    assert counts == [1, 2, 3, 2]
    assert config.suite.name == "search"
    assert "perplexity" in config.suite.measures


def test_targets_lie_in_the_project() -> None:
    for group, choice in CHOICES:
        node = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"))
        for target in targets(node):
            assert target.split(".")[0] in PACKAGES, (group, choice)


def test_no_configuration_folder_is_a_package() -> None:
    assert not list(CONF.rglob("__init__.py"))


def default_grids() -> list[dict[str, Any]]:
    grids = OmegaConf.load(CONF / "hydra" / "sweeper" / "grid.yaml").grids
    return [dict(grid) for grid in grids.values()]


def grid_points(*arguments: str) -> list[set[str]]:
    return [set(point) for point in points(default_grids(), arguments, None)]


def test_the_default_grid_names_methods_that_there_are() -> None:
    named = [method for grid in default_grids() for method in grid["method"].split(",")]
    assert len(named) == len(set(named))
    assert set(named) <= {path.stem for path in (CONF / "method").glob("*.yaml")}


def test_a_method_runs_with_the_axes_of_its_own_grid() -> None:
    found = grid_points("method=rtn,fp32,checkpoint", "suite=smoke")
    assert {"method=rtn", "bits=3", "group_size=32", "suite=smoke"} in found
    assert [point for point in found if "method=fp32" in point] == [{"method=fp32", "suite=smoke"}]
    # Named by no grid: nothing is added to what was given.
    assert {"method=checkpoint", "suite=smoke"} in found
    assert len(found) == 8 + 1 + 1


def test_axes_of_the_command_line_take_the_place_of_the_grids() -> None:
    found = grid_points("method=rtn", "bits=4,5", "group_size=64")
    wanted = [{"method=rtn", f"bits={bits}", "group_size=64"} for bits in (4, 5)]
    assert found == wanted
    assert grid_points("job=sensitivity", "bits=4,3") == [
        {"job=sensitivity", "bits=4"},
        {"job=sensitivity", "bits=3"},
    ]
    everywhere = grid_points("seed=1")
    assert len(everywhere) == len(grid_points())
    assert all("seed=1" in point for point in everywhere)


def test_an_axis_that_is_no_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bits=interval\(2,8\) is not a list of values"):
        grid_points("bits=interval(2,8)")
