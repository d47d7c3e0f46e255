from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from reports.documents.advice import (
    DOCUMENTS,
    Case,
    Pick,
    advice,
    advice_blocks,
    advice_for,
    contradictions,
    places,
    read_tree,
)
from reports.gather import make_rows
from tests.reports.synthetic import Synthetic

ROOT = Path(__file__).resolve().parents[3]
FOLDER = os.environ.get("QUANTBENCH_DOCUMENTS")


def tree(**entry: Any) -> dict[str, Any]:
    whole = {"when": {"device": "cpu"}, "advice": ["method=gptq bits=4"], "original": "量化"}
    return {
        "id": "guide-tree",
        "document": "guide",
        "section": "part 1",
        "title": "Which",
        "entries": [{**whole, **entry}],
    }


def advised(**case: Any) -> list[str]:
    return [one.text for one in advice_for(Case(**case))]


def test_what_is_committed_is_whole() -> None:
    found = advice()
    assert len({one.name for one in found}) == len(found)
    assert {one.document for one in found} == {"guide", "notes", "chapter", "article"}
    for one in found:
        assert one.text
        assert one.case
        assert one.command.startswith("python run.py ")


def test_the_documents_are_those_of_the_facts() -> None:
    head = (ROOT / "reports" / "documents.yaml").read_text(encoding="utf-8").partition("tables:")[0]
    assert set(yaml.safe_load(head)["documents"]) == set(DOCUMENTS)


def test_every_tree_that_the_project_names_is_there() -> None:
    sections = " ".join(one.section for one in advice())
    for wanted in (
        *("27.2.5", "27.4.5", "27.5.2", "27.7.3", "27.8.1", "27.9.3"),
        *("step 3", "recommended cases", "under the comparison table"),
        *("section 8", "4.2", "5.2", "6.1"),
    ):
        assert wanted in sections


def test_every_method_is_one_of_conf() -> None:
    known = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    profiles = {path.stem for path in (ROOT / "conf" / "profile").glob("*.yaml")}
    for one in advice():
        for pick in one.picks:
            assert dict(pick.words).get("method", "rtn") in known
        for profile in re.findall(r"profile=(\w+)", one.command):
            assert profile in profiles


@pytest.mark.skipif(not FOLDER, reason="QUANTBENCH_DOCUMENTS names no folder of documents")
def test_every_original_is_printed() -> None:
    head = (ROOT / "reports" / "documents.yaml").read_text(encoding="utf-8").partition("tables:")[0]
    texts = {
        name: _squeezed((Path(str(FOLDER)) / about["file"]).read_text(encoding="utf-8"))
        for name, about in yaml.safe_load(head)["documents"].items()
    }
    missing = [one.name for one in advice() if _squeezed(one.original) not in texts[one.document]]
    assert missing == []


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def test_the_hardware_chooses() -> None:
    on_cpu = advised(device="cpu")
    assert "gguf_Q4_K_M" in on_cpu
    assert "int8_static" in on_cpu
    assert "awq bits=4 or gptq bits=4" not in on_cpu
    exllama = "gptq bits=4 method.backend=exllama_v2"
    assert exllama in advised(device="nvidia", priorities=frozenset({"speed"}))
    assert exllama not in advised(device="cpu", priorities=frozenset({"speed"}))


def test_the_size_of_the_model_chooses() -> None:
    assert "qat bits=8" in advised(parameters=124e6)
    assert "gptq bits=4 or awq bits=4" in advised(parameters=13e9)
    # Above 7B as printed: LLaMA-7B has 6.74 billion.
    assert "gptq bits=4 or awq bits=4" not in advised(parameters=6.74e9)


def test_what_the_case_does_not_say_chooses_nothing() -> None:
    for one in advice_for(Case()):
        assert not one.when
    assert {"fp16", "int8_dynamic"} <= set(advised())


def test_several_priorities_are_all_heard() -> None:
    both = advised(priorities=frozenset({"size", "quantizing"}))
    assert "gptq bits=4" in both
    assert "awq bits=4" in both


def test_memory_and_purpose_choose() -> None:
    assert "bits=3 or bits=2" in advised(memory="extreme")
    assert "int8_static" in advised(purpose="production")


def test_documents_that_contradict_each_other_stand_side_by_side() -> None:
    found = {one.case: one.sides for one in contradictions(advice())}
    small = {side[0].text: places(side) for side in found["below 1 B"]}
    assert small == {"int8_dynamic": "guide part 7", "qat bits=8": "guide summary"}
    accuracy = {side[0].text for side in found["priority accuracy"]}
    assert {"awq bits=4", "fp32", "rtn bits=8 group_size=-1 or w8a8"} <= accuracy
    assert "device apple" not in found


def test_branches_that_agree_contradict_nobody() -> None:
    same = [*read_tree(tree()), *read_tree({**tree(advice=["bits=4"]), "section": "part 2"})]
    assert contradictions(same) == []
    other = read_tree({**tree(advice=["method=awq bits=4"]), "section": "part 2"})
    (found,) = contradictions([*same, *other])
    assert [side[0].text for side in found.sides] == ["gptq bits=4", "bits=4", "awq bits=4"]
    within = read_tree(tree(advice=["method=awq"]))
    assert contradictions([same[0], *within]) == []


def test_a_pick_names_rows_by_method_bits_and_group() -> None:
    rows = {row.label: row for row in make_rows(Synthetic().grid())}
    rtn = rows["rtn 4 bits g128"]
    assert _pick("method=rtn bits=4").names(rtn)
    assert _pick("bits=4").names(rtn)
    assert _pick("method=rtn group_size=128").names(rtn)
    assert _pick("method=rtn bits=4 method.symmetric=true").names(rtn)
    assert not _pick("method=rtn bits=3").names(rtn)
    assert not _pick("method=gptq bits=4").names(rtn)
    assert not _pick("method=gguf gguf_type=Q4_0").names(rtn)
    assert not _pick("bits=4 group_size=64").names(rows["int8_dynamic"])


def test_a_file_of_llama_cpp_is_named_by_its_type() -> None:
    record = Synthetic().cell("gguf_Q4_K_M", 4.8, None, "packed", "llama.cpp")
    (row,) = make_rows([record])
    assert _pick("method=gguf gguf_type=Q4_K_M").names(row)
    assert not _pick("method=gguf gguf_type=Q5_K_M").names(row)
    assert _pick("method=gguf gguf_type=Q4_K_M").text == "gguf_Q4_K_M"


def _pick(text: str) -> Pick:
    return Pick(tuple((key, value) for key, value in (word.split("=") for word in text.split())))


def test_commands_are_those_of_the_device() -> None:
    (one,) = read_tree(tree(when={"device": "nvidia"}, advice=["method=nf4", "bits=8"]))
    assert (
        one.command == "python run.py method=nf4 hardware=cuda; python run.py bits=8 hardware=cuda"
    )
    (own,) = read_tree(tree(command="python run.py job=deploy"))
    assert own.command == "python run.py job=deploy"


def test_the_block_shows_every_branch() -> None:
    (block,) = advice_blocks()
    every, contradicting = block.grids
    assert len(every.lines) == len(advice())
    assert {line[4].language for line in every.lines} == {"zh"}
    assert len(contradicting.lines) == len(contradictions(advice()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": "red"}, "guide-tree-1 has unknown fields: colour"),
        ({"original": ""}, "guide-tree-1 lacks original"),
        ({"when": {"device": "toaster"}}, "guide-tree-1 has no such condition: device toaster"),
        ({"when": {"colour": "red"}}, "no such condition: colour red"),
        ({"when": {"colour": []}}, "no such condition: colour"),
        ({"when": {"device": []}}, "no such condition: device"),
        ({"when": {"min_parameters": "many"}}, "no such condition: min_parameters many"),
        ({"advice": ["gptq"]}, "advises 'gptq'; it needs method= or bits="),
        ({"advice": ["group_size=32"]}, "it needs method= or bits="),
        ({"advice": ["method=gguf"]}, "without its gguf_type"),
    ],
)
def test_a_branch_that_is_not_whole_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_tree(tree(**changes))


def test_a_tree_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="guide-tree names no document: elsewhere"):
        read_tree({**tree(), "document": "elsewhere"})
    with pytest.raises(ValueError, match=r"guide-tree lacks.*section"):
        read_tree({key: value for key, value in tree().items() if key != "section"})
