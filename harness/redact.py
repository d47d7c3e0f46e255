"""Keys and passwords: which texts are some, where they must not stand, and how they are taken out.

A configuration is repeated by every record, so `secret_in` finds what must not be in one; what a
library says (an error, a child's output) may quote one, so `redact` takes it out before it is
written. A secret is the value of an environment variable whose name says so (`HF_TOKEN`,
`OPENAI_API_KEY`, `PGPASSWORD`), the user and password of an address, and what has the form of a
token of the Hugging Face hub, GitHub or OpenAI. Standard library only: records are written with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

HIDDEN = "[hidden]"
SHORTEST = 8
"""Characters of a value that is looked for: shorter ones are found in harmless words."""

_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|KEY|APIKEY|AUTH|PASS|PAT)$|PASSWORD|PASSWD|SECRET|CREDENTIAL", re.IGNORECASE
)
_LOGIN = re.compile(r"(?<=://)[^/?#\s@'\"]+(?=@)")
_TOKEN = re.compile(r"\b(?:hf_|gh[opsur]_|sk-)[A-Za-z0-9_-]{20,}")
NAMES_A_VARIABLE = "_env"
"""End of an option that holds the name of an environment variable: `api_key_env`."""


def redact(text: str) -> str:
    """Return `text` with `HIDDEN` in the place of every secret."""
    return _redact(text, _forms())


def redacted(document: Any) -> Any:
    """Return JSON-like data with `redact` done to every text in it but the keys."""
    forms = _forms()

    def clean(node: Any) -> Any:
        if isinstance(node, str):
            return _redact(node, forms)
        if isinstance(node, Mapping):
            return {key: clean(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(map(clean, node))
        return node

    return clean(document)


def redact_file(path: Path) -> None:
    """Take the secrets out of a file of text; one that is not there has none."""
    try:
        content = path.read_bytes().decode(errors="surrogateescape")
    except FileNotFoundError:
        return
    clean = redact(content)
    if clean != content:
        path.write_bytes(clean.encode(errors="surrogateescape"))


def secret_in(config: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """Return the sentence about a secret in a configuration or its command; None: there is none.

    The sentence names the place and never the secret.
    """
    places = [*_leaves(config, ""), *(override.partition("=")[::2] for override in overrides)]
    secrets = _secrets()
    for place, text in places:
        option = place.lstrip("+~")
        if _is_secret_name(option.rpartition(".")[2]) and text not in ("", "null"):
            found = "is named like a key or a password"
            do = "set it as an environment variable in the shell that starts the run"
        elif _LOGIN.search(text):
            found = "has a user or a password in an address"
            do = "give the bare address"
        elif _TOKEN.search(text):
            found = "holds what looks like an access token"
            do = "set it as an environment variable in the shell that starts the run"
        else:
            known = [name for value, name in secrets.items() if value in text]
            if not known:
                continue
            found = f"holds the value of the environment variable {known[0]}"
            do = "leave it there"
        return f"{option} {found}, and every record would show it; {do}"
    return None


def _leaves(node: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every value that is there."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value, place)
    elif node is not None:
        yield place, str(node)


def _redact(text: str, forms: Sequence[str]) -> str:
    for form in forms:
        text = text.replace(form, HIDDEN)
    return _TOKEN.sub(HIDDEN, _LOGIN.sub(HIDDEN, text))


def _forms() -> list[str]:
    """Return how the environment's secrets may be spelled: as they are, and in an address."""
    return [form for value in _secrets() for form in {value, quote(value, safe="")}]


def _secrets() -> dict[str, str]:
    """Return value -> name of the environment variables that hold a secret."""
    return {
        value: name
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and _is_secret_name(name) and not _is_a_place(value)
    }


def _is_secret_name(name: str) -> bool:
    return _NAME.search(name) is not None and not name.endswith(NAMES_A_VARIABLE)


def _is_a_place(value: str) -> bool:
    """Whether it says where a secret is: HF_TOKEN_PATH, SSH_AUTH_SOCK."""
    return value.startswith("/") and Path(value).exists()
