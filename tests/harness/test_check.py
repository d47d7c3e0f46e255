"""What a sweep is refused for before anything is loaded."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from harness.check import main
from tests.harness.task_folders import with_index

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("suite.measures.tasks.num_fewshot={embedded_facts: 2}", []),
        (
            "suite.measures.tasks.num_fewshot=2",
            [
                "embedded_endings has no worked examples: its num_fewshot must be null or 0",
            ],
        ),
        (
            "suite.measures.tasks.limit={facts: 2}",
            [
                "limit: facts is no task, group or tag of lm-eval VERSION or of an include "
                "folder; close to it are embedded_facts"
            ],
        ),
    ],
)
def test_a_measure_says_what_cannot_work(tmp_path: Path, override: str, found: list[str]) -> None:
    with_index(tmp_path / "cache")
    found = [sentence.replace("VERSION", metadata.version("lm_eval")) for sentence in found]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", ["suite=tasks", f"runs_dir={tmp_path}", override])
    nodes = {key: composed[key] for key in composed if key not in ("job", "data")}
    config = OmegaConf.to_container(OmegaConf.create(nodes), resolve=True)
    main({"configs": [config, config], "found": str(tmp_path / "found")}, lambda text: None)
    assert json.loads((tmp_path / "found").read_text())["problems"] == found


def test_an_option_of_another_method_is_named(tmp_path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", ["suite=size_only", "profile=cpu_server", "method=rtn"])
    nodes = {key: composed[key] for key in composed if key not in ("job", "data")}
    config = OmegaConf.to_container(OmegaConf.create(nodes), resolve=True)
    main({"configs": [config], "found": str(tmp_path / "found")}, lambda text: None)
    assert json.loads((tmp_path / "found").read_text())["problems"] == [
        "method rtn has no option 'calibration'; leave it out where it is given: on the command "
        "line, or in a profile made for another method"
    ]
