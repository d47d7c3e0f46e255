"""Every fault of a server is one sentence, nothing is asked twice, and the key is never told."""

from __future__ import annotations

import json
import socket
import traceback
from collections.abc import Callable

import pytest

from kernels.errors import ConfigError
from methods.server_client import ServerClient
from methods.server_http import (
    Endpoint,
    Secret,
    ServerError,
    Timeouts,
    parse_address,
    secret_from,
)
from tests.methods.fake_server import MODEL, Fake, free_port, generated, running

KEY = 'sk-test-9f8e7d6c"5b4a/3210'
BODY = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
PATIENT = Timeouts(10, 10, 20)
LIMITS = {"slow": Timeouts(10, 0.2, 20), "drips": Timeouts(10, 10, 0.5)}


def client_of(url: str, key: str | None = KEY, timeouts: Timeouts = PATIENT) -> ServerClient:
    return ServerClient(Endpoint(parse_address(url), Secret(key, "MY_KEY"), timeouts))


def failure(ask: Callable[[], object]) -> str:
    """Return the sentence that `ask` fails with, after looking for the key in all that it shows."""
    with pytest.raises(ServerError) as raised:
        ask()
    shown = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    assert KEY not in shown
    assert KEY[3:] not in shown
    assert KEY[:12] not in shown
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


def test_models_and_answers_come_as_they_are() -> None:
    with running(Fake(key=KEY, models=("a", "b"))) as fake:
        client = client_of(fake.url)
        assert [entry["id"] for entry in client.models()] == ["a", "b"]
        answer = client.complete(BODY)
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4}
        streamed = client.stream({**BODY, "stream_options": {"include_usage": True}})
    assert len(generated([1, 2, 3], 4)) == len(streamed.arrivals) == len(streamed.text) == 4
    assert list(streamed.arrivals) == sorted(streamed.arrivals)
    assert streamed.arrivals[0] > 0
    assert streamed.finish_reason == "length"
    assert streamed.usage["completion_tokens"] == 4
    assert {headers["Authorization"] for headers in fake.headers} == {f"Bearer {KEY}"}


def test_no_key_is_no_header() -> None:
    with running(Fake()) as fake:
        client_of(fake.url, None).models()
    assert "Authorization" not in fake.headers[0]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("HTTP 401", "refuses the API key (HTTP 401); the environment variable MY_KEY holds a key"),
        ("HTTP 404", "HTTP 404 (something about it); check method.url and method.model"),
        ("HTTP 422", "HTTP 422 (something about it); it does not take such a request"),
        ("HTTP 429", "HTTP 429 (something about it); it takes fewer requests"),
        ("HTTP 500", "HTTP 500 (something about it); look into its log"),
        ("dies", "broke off its answer; the server died or was stopped"),
        ("ends early", "broke off its answer"),
        ("bad event", "no JSON object"),
        ("error event", "reports a failure (out of memory)"),
        ("bad JSON", "cannot stream"),
        ("slow", "said nothing for 0.2 seconds (method.timeouts.read)"),
        ("drips", "did not finish within 0.5 seconds (method.timeouts.total)"),
        ("tells the key", "HTTP 500 (xxx"),
        ("redirects", "sends elsewhere (HTTP 307), which is not followed"),
        ("no HTTP", "does not speak HTTP"),
        ("no stream", "with application/json; this server cannot stream"),
    ],
)
def test_a_fault_of_a_stream_is_one_sentence(fault: str, says: str) -> None:
    with running(Fake(key=KEY, fault=fault)) as fake:
        client = client_of(fake.url, timeouts=LIMITS.get(fault, PATIENT))
        sentence = failure(lambda: client.stream(BODY))
        assert len(fake.requests) == 1, "nothing is asked twice"
    assert says in sentence
    assert f"the server at {fake.url}/v1/completions" in sentence


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("bad JSON", 'no JSON object ({"choices": [)'),
        ("no choices", "without any choice"),
        ("ends early", "broke off its answer"),
        ("tells the key", "[key]"),
    ],
)
def test_a_fault_of_a_whole_answer_is_one_sentence(fault: str, says: str) -> None:
    with running(Fake(key=KEY, fault=fault)) as fake:
        client = client_of(fake.url)
        assert says in failure(lambda: client.complete(BODY))


def test_a_wrong_key_and_none_are_told_apart() -> None:
    with running(Fake(key="the-right-one")) as fake:
        wrong = failure(client_of(fake.url).models)
        none = failure(client_of(fake.url, None).models)
    assert "MY_KEY holds a key: put the right one there" in wrong
    assert "MY_KEY holds no key: put the right one there" in none
    assert "the-right-one" not in wrong + none


def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    sentence = failure(client_of(url).models)
    assert sentence == (
        f"the server at {url}/v1/models cannot be reached (Connection refused); start it, or "
        "correct method.url"
    )


def test_a_host_without_a_name_is_said() -> None:
    assert "cannot be reached" in failure(client_of("http://no-such-host.invalid").models)


def test_a_server_that_never_takes_the_connection_is_left() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            client = client_of(f"http://127.0.0.1:{port}", timeouts=Timeouts(0.2, 0.2, 5))
            sentence = failure(client.models)
    assert "within 0.2 seconds" in sentence or "said nothing for 0.2 seconds" in sentence


def test_https_to_a_server_without_it_is_said() -> None:
    with running(Fake()) as fake:
        client = client_of(fake.url.replace("http:", "https:"))
        assert "cannot be reached over TLS" in failure(client.models)


def test_a_list_without_models_is_said() -> None:
    with running(Fake(fault="models without list")) as fake:
        assert "no list of models" in failure(client_of(fake.url).models)


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = f"http://127.0.0.1:{free_port()}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    with running(Fake()) as fake:
        assert client_of(fake.url).models()


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://host/v1", "https://host:443/v1"),
        ("https://host/some/v1/", "https://host:443/some/v1"),
        ("http://[::1]:80/x", "http://[::1]:80/x/v1"),
    ],
)
def test_addresses_are_read(url: str, base: str) -> None:
    assert parse_address(url).url == base


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8000",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://ho st",
        "http://höst",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.url is no address of a server; it must be"):
        parse_address(url)


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY[:7]}@host", "http://host/v1?key=sk-test", "http://host/v1#sk-test"]
)
def test_an_address_with_a_secret_in_it_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.url of host carries") as raised:
        parse_address(url)
    assert "sk-test" not in str(raised.value)


def test_a_key_is_shown_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    secret = secret_from("MY_KEY")
    assert secret
    assert secret.headers() == {"Authorization": f"Bearer {KEY}"}
    endpoint = Endpoint(parse_address("http://host"), secret, PATIENT)
    assert KEY not in repr(ServerClient(endpoint)) + str(secret) + f"{secret}"


@pytest.mark.parametrize("value", ["with space", "line\nbreak", "schlüssel", "tab\tkey"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError, match="MY_KEY holds no API key") as raised:
        secret_from("MY_KEY")
    assert value not in str(raised.value)


def test_an_unset_or_empty_variable_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    assert not secret_from("MY_KEY")
    monkeypatch.setenv("MY_KEY", "")
    assert not secret_from("MY_KEY")
    assert secret_from("MY_KEY").headers() == {}


def test_the_key_is_scrubbed_in_every_form() -> None:
    secret = Secret(KEY, "MY_KEY")
    texts = [KEY, f"a{KEY}b{KEY}", json.dumps({"k": KEY}), json.dumps(KEY).replace("/", "\\/")]
    texts += [f"cut {KEY[:10]}", f"cut {KEY[-9:]} end"]
    for text in texts:
        shown = secret.scrub(text)
        assert not any(KEY[start : start + 8] in shown for start in range(len(KEY) - 7)), text
        assert "[key]" in shown
    assert secret.scrub("plain words stay") == "plain words stay"
    assert Secret("abc", "X").scrub("xabcx") == "x[key]x"


@pytest.mark.parametrize("name", ["connect", "read", "total"])
def test_a_time_out_is_above_zero(name: str) -> None:
    values = {"connect": 1.0, "read": 1.0, "total": 1.0, name: 0.0}
    with pytest.raises(ConfigError, match=rf"method\.timeouts\.{name} is 0\.0"):
        Timeouts(**values)
