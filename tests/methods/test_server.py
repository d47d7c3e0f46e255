"""method=server: what it writes, what it refuses, and whole cells against a fake server."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.hardware import Hardware
from harness.record import Record
from kernels.errors import ConfigError
from methods.base import AdoptingMethod, Matrix
from methods.server import Server
from methods.server_http import Timeouts
from tests.architectures import CONTEXT, VOCABULARY, tiny, tiny_tokenizer, write_checkpoint
from tests.methods.fake_server import MODEL, Fake, free_port, is_measured, running, texts_under
from tests.methods.machine import Machine
from tests.test_run import Done, quantbench, records, unwrapped

KEY = "sk-secret-0123456789-abcdefghij"
SECONDS = Timeouts(10, 10, 60)
TEXT = " ".join(f"so it is {number} to the east," for number in range(400))


def server(url: str, model: str | None = None, variable: str = "NO_SUCH_KEY") -> Server:
    return Server("server", url, SECONDS, model, variable)


def adopt(method: Server, into: Path) -> dict[str, object]:
    tiny_tokenizer().save_pretrained(into)
    report = method.adopt(into, tiny("llama"), into)
    assert (list(report.quantized), report.stored_bits) == ([], 0)
    assert "is the server's business" in report.notes[0]
    facts: dict[str, object] = json.loads((into / "endpoint.json").read_text())
    return facts


def test_the_artefact_says_where_the_server_is(tmp_path: Path) -> None:
    with running(Fake()) as fake:
        method = server(fake.url)
        assert isinstance(method, AdoptingMethod)
        assert adopt(method, tmp_path) == {
            "format": 1,
            "url": f"{fake.url}/v1",
            "model": MODEL,
            "vocab_size": VOCABULARY,
            "context_length": CONTEXT,
        }
        engine = method.load(tmp_path, Machine())
        assert engine.runtime == "vLLM server"
        assert engine.capabilities == {"serve", "generate", "logprobs"}
        assert (engine.vocab_size, engine.context_length) == (VOCABULARY, CONTEXT)
        engine.close()


def test_the_servers_own_limit_counts(tmp_path: Path) -> None:
    with running(Fake(max_model_len=40, owned_by="somebody")) as fake:
        adopt(server(fake.url), tmp_path)
        engine = server(fake.url).load(tmp_path, Machine())
    assert engine.context_length == 39, "a token is generated behind a scored prompt"
    assert engine.runtime == "server"


def test_one_of_several_models_is_named(tmp_path: Path) -> None:
    with running(Fake(models=("a", MODEL))) as fake:
        with pytest.raises(ConfigError, match=r"lists 2 models; choose one with method.model: a, "):
            adopt(server(fake.url), tmp_path)
        with pytest.raises(ConfigError, match="does not list the model b; it lists a, tiny"):
            adopt(server(fake.url, "b"), tmp_path)
        assert adopt(server(fake.url, MODEL), tmp_path)["model"] == MODEL
        fake.models = ("a",)
        with pytest.raises(ConfigError, match="does not list the model tiny"):
            server(fake.url, MODEL).load(tmp_path, Machine())
        fake.models = ()
        with pytest.raises(ConfigError, match="lists no model"):
            adopt(server(fake.url), tmp_path)


def test_what_cannot_be_asked_of_a_server_is_refused(tmp_path: Path) -> None:
    method = server("http://host")
    method.check(Machine())
    assert (method.bits, method.group_size) == (None, None)
    matrices, left_out = method.select(tiny("llama"))
    assert matrices == []
    assert left_out[0][1] == sum(p.numel() for p in tiny("llama").parameters())
    with pytest.raises(ConfigError, match="cannot be told"):
        method.stored_bits(Matrix("a", "block", 2, 2))
    with pytest.raises(ConfigError, match="quantizes nothing"):
        method.quantize(tiny("llama"), None, None, tmp_path)


def test_a_key_in_the_configuration_is_refused_unseen() -> None:
    hardware = Hardware("cpu", "cpu", environment={"MY_KEY": KEY})
    server("http://host").check(hardware)
    with pytest.raises(ConfigError, match=r"hardware\.environment sets MY_KEY") as raised:
        server("http://host", variable="MY_KEY").check(hardware)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("variable", ["", "sk-a-key-itself", "two words", "1KEY", "${KEY}"])
def test_a_key_in_the_place_of_its_name_is_refused_unseen(variable: str) -> None:
    with pytest.raises(ConfigError, match="never the key itself") as raised:
        server("http://host", variable=variable)
    assert not variable or variable not in str(raised.value)


FAULTS = {
    "dies": "broke off its answer",
    "bad event": "no JSON object",
    "tells the key": "HTTP 500",
    "HTTP 429": "it takes fewer requests",
}
"""What happens to the measured requests, and what the record says of it."""


@dataclass(frozen=True)
class Swept:
    """One sweep over many servers: its output, its records, and the servers, by what is wrong."""

    done: Done
    runs: Path
    records: dict[str, Record]
    fakes: dict[str, Fake]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Measure a sound server, one without logprobs, and one for each fault, in one sweep."""
    folder = tmp_path_factory.mktemp("server")
    write_checkpoint(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    fakes = {
        "": Fake(key=KEY),
        "no logprobs": Fake(key=KEY, echo="none"),
        "wrong key": Fake(key="the-right-one"),
        **{fault: Fake(key=KEY, fault=fault, hits=is_measured) for fault in FAULTS},
    }
    with ExitStack() as stack:
        urls = {name: stack.enter_context(running(fake)).url for name, fake in fakes.items()}
        urls["not there"] = f"http://127.0.0.1:{free_port()}"
        done = quantbench(
            "-m", "method=server", f"method.url={','.join(urls.values())}",
            "method.api_key_env=MY_KEY", "suite=serving",
            "suite.measures.serving.concurrency=[1,4]", "suite.measures.serving.requests=4",
            "suite.measures.serving.prompt_length=16", "suite.measures.serving.new_tokens=6",
            "model=local", f"model.path={folder / 'model'}", "data.source=text",
            f"data.path={folder / 'text.txt'}", f"runs_dir={folder / 'runs'}",
            env={"MY_KEY": KEY},
        )  # fmt: skip
    found = {
        str(record.config["resolved"]["method"]["url"]): record
        for record in records(folder / "runs").values()
        if record.config["method"] == "server"
    }
    assert set(found) == set(urls.values()), done.err
    return Swept(done, folder / "runs", {name: found[url] for name, url in urls.items()}, fakes)


def metrics(record: Record) -> set[str]:
    return {value.metric for value in record.values}


def test_the_key_is_nowhere(swept: Swept) -> None:
    assert swept.done.code == 1, "cells have failed"
    assert KEY not in swept.done.out + swept.done.err
    files = list(texts_under(swept.runs))
    assert any(path.suffix == ".log" for path, _ in files)
    assert any(path.suffix == ".html" for path, _ in files)
    for path, content in files:
        assert KEY.encode() not in content, path
        assert KEY[3:20].encode() not in content, path
    # Sent to the server all the same.
    assert {h.get("Authorization") for h in swept.fakes[""].headers} == {f"Bearer {KEY}"}


def test_a_cell_measures_a_server(swept: Swept) -> None:
    record = swept.records[""]
    assert record.status == "ok", record.errors
    assert {"ttft_seconds", "tpot_seconds", "serving_tokens_per_second"} <= metrics(record)
    assert "perplexity" in metrics(record)
    assert not {"peak_memory_bytes", "load_seconds", "artefact_bytes"} & metrics(record)
    assert record.details["runtime"] == "vLLM server"
    failed = [v.value for v in record.values if v.metric == "failed_requests"]
    assert failed == [0, 0]


def test_what_a_server_cannot_give_is_a_note(swept: Swept) -> None:
    record = swept.records["no logprobs"]
    assert record.status == "ok", record.errors
    assert "perplexity" not in metrics(record)
    assert any("perplexity" in note and "logprobs" in note for note in record.details["notes"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *FAULTS.items(),
        (
            "wrong key",
            "refuses the API key (HTTP 401); the environment variable MY_KEY holds a key: put the "
            "right one there, or name another variable with method.api_key_env",
        ),
        ("not there", "cannot be reached (Connection refused)"),
    ],
)
def test_a_fault_is_one_sentence_in_a_failed_record(swept: Swept, name: str, says: str) -> None:
    record = swept.records[name]
    assert record.status == "failed"
    (failure,) = record.errors
    assert says in failure.message
    assert "\n" not in failure.message
    assert "the-right-one" not in failure.message
    assert unwrapped(says) in unwrapped(swept.done.out)


def test_a_url_is_needed(tmp_path: Path) -> None:
    done = quantbench("method=server", "suite=serving", f"runs_dir={tmp_path}")
    assert done.code != 0
    assert "method.url has no value; give one: method.url=VALUE" in done.err
