"""How text is cut before byte-level BPE merges it: what llama.cpp knows by name, and what it does.

llama.cpp compiles its pre-tokenizers in and finds them by a name in the file (`llm_tokenizer_bpe`
in its src/llama-vocab.cpp); tokenizer.json has regular expressions instead. Here is the table
between the two, and llama.cpp itself splitting texts, which is what verifies a choice.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Expressions as they stand in tokenizer.json.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_APOSTROPHES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASELESS = _APOSTROPHES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(suffix: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"
    return f"{words}|{digits}{_CASED_REST}"


@dataclass(frozen=True)
class Splitting:
    """Expressions that cut a text, each inside what the one before left; and one shortcut.

    `ignore_merges`: a piece that is a token as a whole is taken, whatever the merges say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False


SPLITTINGS: dict[str, Splitting] = {
    "gpt-2": Splitting((WORDS,)),
    "smollm": Splitting((DIGIT, WORDS)),
    "qwen2": Splitting((_CASELESS + DIGIT + _REST,)),
    "llama-bpe": Splitting((_CASELESS + r"\p{N}{1,3}" + _REST,), ignore_merges=True),
    "smaug-bpe": Splitting((_CASELESS + r"\p{N}{1,3}" + _REST,)),
    "tekken": Splitting((_cased("", DIGIT),), ignore_merges=True),
    "gpt-4o": Splitting((_cased(f"{_APOSTROPHES}?", r"\p{N}{1,3}"),)),
}
# Tried after those, where none of them splits alike.
OTHERS = (
    *("default", "falcon", "deepseek-llm", "deepseek-coder", "deepseek-v3", "qwen35", "seed-coder"),
    *("bailingmoe", "bloom", "viking", "chameleon", "minicpm5", "superbpe"),
)

CHECK_TEXTS = (
    "Hello world, this is a plain sentence.",
    "Le café de Zürich coûte 3 €, naïve façade; “quoted” text – and more…",
    "Emoji 😀 👍🏽 🇪🇺 👩‍👩‍👧 ♥ end",
    "one line\nanother\n\n\nand\r\nlast\n",
    "a  b   c    d\t\te \t f     ",
    "   three spaces before",
    "1 12 123 1234 12345678 3.14159 1,000,000 2nd x86 ½ ²",
    "I'm you're they've it'll we'd she's DON'T I'LL O'Neil 's",
    "中文没有空格。日本語のテキスト、ひらがな。 한국어 문장",
    "Ελληνικά, Русский язык; עברית العربية हिन्दी ไทย",
    "(a) [b] {c} <d> !!! ??? ... a.b,c;d:e/f\\g @#$%^&*_+=~` --",
    "def f(x):\n    if x:\n        return x**2  # half\n",
    "Answer: A, B C or D? (A) Plan B. camelCase HTTPServer snake_case",
    "no\u00a0break, thin\u2009space, wide\u3000space, zero\u200bwidth",
)
"""Texts that both tokenizers split; composed characters only, as llama.cpp never normalizes."""


def parts(node: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the steps of a part of tokenizer.json; `key` is what a sequence keeps them under."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [part for inner in node[key] for part in parts(inner, key)]
    return [node]


def splitting_of(state: Mapping[str, Any]) -> Splitting | None:
    """Return how the byte-level tokenizer of a tokenizer.json cuts, None where no table has it."""
    patterns = []
    for part in parts(state["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Digits" and part["individual_digits"]:
            patterns.append(DIGIT)
        elif part["type"] == "Split" and not part["invert"] and "Regex" in part["pattern"]:
            patterns.append(part["pattern"]["Regex"])
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            patterns += [WORDS] if part["use_regex"] else []
        else:
            return None
    return Splitting(tuple(patterns), bool(state["model"].get("ignore_merges")))


def candidates(splitting: Splitting | None) -> list[str]:
    """Return llama.cpp's names to try: the one that is `splitting`, else the likest first."""

    def distance(name: str) -> int:
        known = SPLITTINGS[name]
        if splitting is None:
            return 0
        missed = len(set(known.patterns) ^ set(splitting.patterns))
        return 2 * missed + (known.ignore_merges != splitting.ignore_merges)

    exact = [name for name, known in SPLITTINGS.items() if known == splitting]
    return exact or [*sorted(SPLITTINGS, key=distance), *OTHERS]


@contextmanager
def _silent() -> Iterator[Any]:
    """Yield llama_cpp with nothing of its log on standard error: files are tried here."""
    from methods.llamacpp_engine import library

    llama = library()
    nothing = llama.api.llama_log_callback(lambda *_: None)
    llama.api.llama_log_set(nothing, ctypes.c_void_p(0))
    try:
        yield llama.api
    finally:
        llama.api.llama_log_set(llama.callback, ctypes.c_void_p(0))


def _override(api: Any, pre: str) -> Any:
    """Return an array of one override, and the empty one that ends it."""
    overrides = (api.llama_model_kv_override * 2)()
    overrides[0].tag = api.LLAMA_KV_OVERRIDE_TYPE_STR
    overrides[0].key = b"tokenizer.ggml.pre"
    overrides[0].value.val_str = pre.encode()
    return overrides


@dataclass(frozen=True)
class Splitter:
    """llama.cpp's tokenizer of one file: `vocabulary` is its handle."""

    api: Any
    vocabulary: Any

    def __call__(self, text: str) -> list[int]:
        """Return the ids of `text`, with what the file has put around it."""
        raw = text.encode()
        room = (self.api.llama_token * (len(raw) + 8))()
        count = self.api.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), True, True)
        return list(room[: max(count, 0)])

    def around(self) -> tuple[int | None, int | None]:
        """Return the ids that are put before and after every text."""
        api, vocabulary = self.api, self.vocabulary
        before = (
            api.llama_vocab_bos(vocabulary) if api.llama_vocab_get_add_bos(vocabulary) else None
        )
        after = api.llama_vocab_eos(vocabulary) if api.llama_vocab_get_add_eos(vocabulary) else None
        return before, after


@contextmanager
def llama_cpp_splitter(path: Path, pre: str | None = None) -> Iterator[Splitter | None]:
    """Yield llama.cpp's own tokenizer of the file, or None where llama.cpp refuses it.

    Only metadata are loaded. `pre` stands in for the pre-tokenizer that the file names.

    Raises:
        ConfigError: llama-cpp-python is not installed.
    """
    with _silent() as api:
        parameters = api.llama_model_default_params()
        parameters.vocab_only = True
        if pre is not None:
            overrides = _override(api, pre)
            parameters.kv_overrides = overrides
        model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            yield None
            return
        try:
            yield Splitter(api, api.llama_model_get_vocab(model))
        finally:
            api.llama_model_free(model)


def differing(path: Path, tokenizer: Any, pre: str | None = None) -> list[str]:
    """Return the check texts that llama.cpp splits otherwise than `tokenizer` of transformers.

    Raises:
        ConfigError: llama-cpp-python is not installed.
    """
    with llama_cpp_splitter(path, pre) as split:
        if split is None:
            return list(CHECK_TEXTS)
        return [text for text in CHECK_TEXTS if split(text) != tokenizer(text).input_ids]
