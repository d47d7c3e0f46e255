"""Keys and passwords are refused in a configuration and taken out of what is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.launch import run_child
from harness.record import Failure, Record, read_record, write_record
from harness.redact import HIDDEN, redact, redact_file, redacted, secret_in
from tests.harness.test_launch import Limits, message

ROOT = Path(__file__).resolve().parents[2]
KEY = "open/sesame+42"
FORM = "hf_" + "abcdefghijKLMNOPQRST0123"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QUANTBENCH_TEST_TOKEN", KEY)
    return KEY


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"Bearer {KEY}!", f"Bearer {HIDDEN}!"),
        ("at ?key=open%2Fsesame%2B42", f"at ?key={HIDDEN}"),
        ("http://me:pw@proxy:1/x", f"http://{HIDDEN}@proxy:1/x"),
        ("https://token@host and a@b", f"https://{HIDDEN}@host and a@b"),
        (f"'{FORM}'", f"'{HIDDEN}'"),
        ("https://host/models/x@main?a=b@c", "https://host/models/x@main?a=b@c"),
        (
            "hf_tokenizer, sk-learn, num_key_value_heads",
            "hf_tokenizer, sk-learn, num_key_value_heads",
        ),
    ],
)
def test_text_loses_its_secrets_and_nothing_else(key: str, text: str, clean: str) -> None:
    assert redact(text) == clean


def test_what_names_a_place_or_is_short_is_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", "somewhere else")
    monkeypatch.setenv("SOME_KEY", str(tmp_path))
    monkeypatch.setenv("OTHER_KEY", "bits")
    text = f"somewhere else, {tmp_path}, bits"
    assert redact(text) == text


def test_records_and_files_are_written_without_secrets(key: str, tmp_path: Path) -> None:
    nested = {"a": [f"x {key}", {"b": (key, 1, None, True)}]}
    assert redacted(nested) == {"a": [f"x {HIDDEN}", {"b": (HIDDEN, 1, None, True)}]}
    failure = Failure("measure", "RuntimeError", f"refused: {key}")
    write_record(
        Record("cell", "failed", {}, errors=(failure,), details={"notes": [key]}), tmp_path
    )
    read = read_record(tmp_path)
    assert read.errors[0].message == f"refused: {HIDDEN}"
    assert read.details == {"notes": [HIDDEN]}
    log = tmp_path / "log"
    log.write_bytes(b"\xff " + key.encode() + b"\n")
    redact_file(log)
    assert log.read_bytes() == b"\xff " + HIDDEN.encode() + b"\n"
    redact_file(tmp_path / "missing")


@pytest.mark.parametrize("dies", [False, True])
def test_a_child_that_quotes_a_key_leaves_none(key: str, tmp_path: Path, dies: bool) -> None:
    limits = Limits(environment={"QUANTBENCH_TEST_TOKEN": key})
    outcome = run_child(
        "tests.harness.children:tells", {"dies": dies}, tmp_path, limits, lambda stage: None
    )
    assert HIDDEN in message(outcome)
    log = (tmp_path / "children.log").read_text()
    assert f"printed {HIDDEN}\n" in log
    assert f"written {HIDDEN}\n" in log
    assert key not in log + message(outcome)


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        (
            {"hardware": {"environment": {"HF_TOKEN": "x"}}},
            [],
            "hardware.environment.HF_TOKEN is named like a key or a password",
        ),
        ({}, ["++method.api_key=x"], "method.api_key is named like a key or a password"),
        ({"model": {"id": "http://me:pw@host"}}, [], "model.id has a user or a password"),
        (
            {"data": {"files": ["a", f"{KEY}.txt"]}},
            [],
            "data.files holds the value of the environment",
        ),
        ({}, [f"model.id={FORM}"], "model.id holds what looks like an access token"),
    ],
)
def test_a_secret_in_a_configuration_is_named_by_its_place(
    key: str, config: dict[str, object], overrides: list[str], said: str
) -> None:
    sentence = secret_in(config, overrides)
    assert sentence is not None
    assert said in sentence
    assert not any(secret in sentence for secret in (KEY, FORM, "me:pw"))


def test_ordinary_options_are_no_secrets(key: str) -> None:
    config = {
        "method": {"api_key_env": "OPENAI_API_KEY", "token_embedding_type": "Q8_0"},
        "model": {"num_key_value_heads": 8, "bos_token_id": 1, "tokenizer": None},
        "hardware": {"environment": {"TOKENIZERS_PARALLELISM": "false", "HF_TOKEN": None}},
    }
    assert secret_in(config, ["method=rtn", "bits=4,3", "method.api_key=null"]) is None


def test_a_run_leaves_no_secret_in_any_file(tmp_path: Path) -> None:
    secrets = {
        "HF_TOKEN": FORM,
        "OPENAI_API_KEY": "wholly-unguessable-1",
        "PGPASSWORD": "wholly/unguessable+2",
        "HTTPS_PROXY": "http://me:unguessable3@127.0.0.1:9",
        "QUANTBENCH_TEST_TOKEN": KEY,
    }
    own = ["method=fp32", "++method._target_=tests.harness.leaky.Leaky", "method.name=leaky"]
    left_out = ("divergence", "generation", "paths", "loading", "memory", "speed")
    quick = ["suite=smoke", *(f"~suite.measures.{name}" for name in left_out)]
    done = subprocess.run(
        [sys.executable, "run.py", *own, *quick, f"runs_dir={tmp_path / 'runs'}"],
        cwd=ROOT,
        env={**os.environ, **secrets},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    cells = {path.parent.name: read_record(path.parent) for path in tmp_path.rglob("record.json")}
    ended = {record.config["method"]: record for record in cells.values()}
    assert ended["fp32"].status == "ok"
    said = ended["leaky"].errors[0].message
    assert said == f"RuntimeError: 401 for Bearer {HIDDEN} at http://{HIDDEN}@127.0.0.1:9"
    assert HIDDEN in (tmp_path / "runs" / ended["leaky"].cell / "measure.log").read_text()
    wanted = [value.rpartition("@")[0].rpartition(":")[2] or value for value in secrets.values()]
    assert "unguessable3" in wanted
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not [value for value in wanted if value.encode() in content], path
    assert not any(value in done.stdout + done.stderr for value in wanted)
