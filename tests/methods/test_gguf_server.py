"""llama-cpp-python's own server on a tiny model: started, asked, scored as in process, stopped."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods.base import LoadingMethod
from methods.gguf import Gguf
from methods.gguf_server import ALIAS, GgufServer
from methods.server_engine import ServerEngine
from methods.server_http import ServerError
from tests.architectures import BOS_ID, CONTEXT, VOCABULARY, tiny, tiny_tokenizer
from tests.methods.fake_server import texts_under, wait_until
from tests.methods.machine import Machine
from tests.test_run import command, quantbench, records

for package in ("gguf", "llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context"):
    pytest.importorskip(package)

AGREEMENT = 1e-4
"""Between the server's log-probabilities and those of the engine in this process, in nats: both
are llama.cpp's on the same file, read in pieces of other sizes."""


def method(kind: type[Gguf] = GgufServer, **options: Any) -> Any:
    return kind("gguf", "F16", **options)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the artefact of a tiny Llama as the harness does, tokenizer included."""
    folder = tmp_path_factory.mktemp("gguf_server") / "artefact"
    report = method().quantize(tiny("llama"), tiny_tokenizer(), None, folder)
    plain = method(Gguf)
    matrices, _ = plain.select(tiny("llama"))
    assert report.stored_bits == sum(plain.stored_bits(matrix) for matrix in matrices)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(artefact: Path) -> Iterator[ServerEngine]:
    engine = method().load(artefact, Machine())
    yield engine
    engine.close()


def servers() -> list[psutil.Process]:
    """Return the servers that are children of this process."""
    return [child for child in psutil.Process().children(recursive=True) if is_server(child)]


def is_server(process: psutil.Process) -> bool:
    try:
        return "llama_cpp.server" in process.cmdline()
    except psutil.Error:
        return False


def ids_of(*texts: str) -> Tensor:
    tokenizer = tiny_tokenizer()
    return torch.tensor([tokenizer(text).input_ids for text in texts])


def test_it_is_gguf_with_another_way_to_load(engine: ServerEngine, artefact: Path) -> None:
    assert not (isinstance(method(), LoadingMethod) and method().loadings)
    assert engine.runtime == "llama-cpp-python server"
    assert (engine.vocab_size, engine.context_length) == (VOCABULARY, CONTEXT)
    assert engine.capabilities == {"serve", "generate", "logprobs"}
    in_process = method(Gguf).load(artefact, Machine())
    assert engine.kernels() == in_process.kernels()
    in_process.close()


def test_its_log_probabilities_are_those_of_the_engine_in_process(
    engine: ServerEngine, artefact: Path
) -> None:
    ids = ids_of(
        "The house stands near the old river, " * 1, "It was late when they came home again"
    )
    found = engine.token_log_likelihoods(ids)
    in_process = method(Gguf).load(artefact, Machine())
    logits, _ = in_process.prefill(ids)
    wanted = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    in_process.close()
    assert found.dtype == torch.float32
    assert torch.isnan(found[:, 0]).all(), "the server leaves out what follows BOS"
    torch.testing.assert_close(found[:, 1:], wanted[:, 1:], atol=AGREEMENT, rtol=0)


def test_a_prompt_as_long_as_the_context_is_scored(engine: ServerEngine) -> None:
    text = ("to the east " * 10)[: CONTEXT - 1]
    ids = ids_of(text)
    assert ids.shape == (1, CONTEXT)
    assert torch.isfinite(engine.token_log_likelihoods(ids)[:, 1:]).all()


def test_prompts_it_would_score_wrongly_are_refused(engine: ServerEngine) -> None:
    ids = ids_of("to the east")[:, 1:]
    assert BOS_ID not in ids
    with pytest.raises(ServerError, match="only of prompts that begin with BOS"):
        engine.token_log_likelihoods(ids)


def test_it_answers_requests_in_full_length(engine: ServerEngine) -> None:
    one = engine.respond(ids_of("to the east")[0].tolist(), 12)
    assert one.tokens == 12
    assert 1 <= len(one.arrivals) <= 12
    assert list(one.arrivals) == sorted(one.arrivals)


def test_the_key_stands_in_no_command_line_and_no_environment(engine: ServerEngine) -> None:
    key = engine._client.endpoint.secret.reveal()
    assert key is not None
    (server,) = servers()
    assert key not in " ".join(server.cmdline())
    assert key not in json.dumps(server.environ())
    assert ALIAS in {entry["id"] for entry in engine._client.models()}


def test_the_environment_changes_no_setting(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HOST", "192.0.2.1"), ("PORT", "1"), ("LOGITS_ALL", "1"), ("n_ctx", "9")):
        monkeypatch.setenv(name, value)
    before = servers()
    engine = method(logits_all=False).load(artefact, Machine())
    try:
        assert engine.capabilities == {"serve", "generate"}, (
            "without the logits of prompts none are scored"
        )
        assert "tokens cannot be scored" in engine.notes[-1]
        assert engine.respond(ids_of("to the east")[0].tolist(), 4).tokens == 4
    finally:
        engine.close()
    assert servers() == before


def test_a_server_that_dies_is_said_with_its_last_words(artefact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in artefact.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    file = broken / "model.gguf"
    file.write_bytes(file.read_bytes()[:5000])
    before = servers()
    with pytest.raises(ServerError, match="did not come up: it ended with exit code 1; its last"):
        method().load(broken, Machine())
    assert servers() == before


def test_a_server_that_does_not_come_up_in_time_is_stopped(artefact: Path) -> None:
    before = servers()
    with pytest.raises(ServerError, match=r"it was not up within 0\.01 seconds"):
        method(start_seconds=0.01).load(artefact, Machine())
    assert servers() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"logits_all": "yes"}, "logits_all"),
        ({"context_length": 1}, "context_length is 1"),
        ({"start_seconds": 0}, "start_seconds is 0"),
        ({"pure": 3}, "pure"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        method(**options)


def test_a_context_beyond_the_models_is_refused(artefact: Path) -> None:
    with pytest.raises(ConfigError, match="context_length is 65, but the model reads at most 64"):
        method(context_length=65).load(artefact, Machine())


def test_a_missing_library_is_said(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.library.find_spec", lambda name: None if name == "uvicorn" else 1)
    with pytest.raises(ConfigError, match=r"needs the package llama-cpp-python\[server\]"):
        method().load(artefact, Machine())


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


SUITE = [
    "suite=serving", "hardware.threads=1", "suite.measures.perplexity_llamacpp.windows=2",
    "suite.measures.serving.prompt_length=32", "suite.measures.serving.new_tokens=8",
]  # fmt: skip


def test_cells_of_the_command_line(tmp_path: Path) -> None:
    done = quantbench(
        "-m", "method=gguf,gguf_server", *SUITE,
        "suite.measures.serving.concurrency=[1,4]", f"runs_dir={tmp_path}",
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    found = {str(record.details["runtime"]): record for record in records(tmp_path).values()}
    served, in_process = found["llama-cpp-python server"], found["llama.cpp"]
    served_values = {(v.metric, v.protocol): v.value for v in served.values}
    in_process_values = {(v.metric, v.protocol): v.value for v in in_process.values}
    (key,) = [key for key in served_values if key[0] == "perplexity"]
    assert served_values[key] == pytest.approx(in_process_values[key], rel=AGREEMENT)
    for clients in (1, 4):
        protocol = f"prompt32_new8_concurrency{clients}"
        assert served_values["serving_tokens_per_second", protocol] > 0
        assert served_values["failed_requests", protocol] == 0
    assert served.details["kernels"]
    assert not any("api_key" in str(content) for _, content in texts_under(tmp_path))


def test_a_killed_cell_leaves_no_server(tmp_path: Path) -> None:
    before = servers()
    driver = subprocess.Popen(
        command(
            "-m", "method=gguf_server", *SUITE, "suite.measures.serving.requests=200",
            "suite.measures.serving.concurrency=[1]", f"runs_dir={tmp_path}",
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert wait_until(lambda: len(servers()) > len(before), 120)
    (server,) = [server for server in servers() if server not in before]
    measuring = server.parent()
    assert measuring is not None
    measuring.kill()
    assert wait_until(lambda: is_gone(server))
    assert driver.wait(120) == 1
    (record,) = records(tmp_path).values()
    assert record.status == "failed"
    assert "was killed by SIGKILL" in record.errors[-1].message
