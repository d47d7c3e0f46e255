"""What the name of a protocol says: one sentence for each, screening, and the task it is of."""

from __future__ import annotations

import re

from reports import words

_SHOTS = (
    r"_(?P<n>\d+(?:-\d+)*)shot(?P<chat>_chat)?(?P<turns>_multiturn)?"
    r"(?P<system>_system[0-9a-f]+)?(?:_limit(?P<limit>\w+(?:-\w+)*))?"
)
"""Tasks of one group may differ in examples and limit: `0-5shot`, `limit100-all`."""

_TEXT = r"(?P<text>.+)"
_BURST = r"prompt(?P<n>\d+)_new(?P<length>\d+)_batch(?P<batch>\d+)"
_BURSTS = (
    "Bursts of seconds with prompts of {n} tokens and {length} tokens written after each{batch}; a "
    "written token's energy is what is left without the prompts'; above idle: without what the "
    "machine took just before, the model loaded and nothing running."
)
_FIRST = r"(?:_first(?P<first>\d+))?"
_PROTOCOLS: tuple[tuple[str, str], ...] = (
    (
        rf"{_TEXT}_gptq_(?P<n>\d+){_FIRST}",
        "GPTQ protocol: the rows of {text} joined by blank lines and tokenized once, cut into "
        "windows of {n} tokens that do not overlap, the tail dropped, {n_less_one} predictions "
        "a window, float32 logits, exp of the mean loss over all predictions{first}.",
    ),
    (
        rf"{_TEXT}_llamacpp_(?P<n>\d+){_FIRST}",
        "llama.cpp protocol: the raw file of {text} in windows of {n} tokens, the first replaced "
        "by BOS where the model uses one, only the second half of each window scored{first}.",
    ),
    (
        rf"{_TEXT}_word",
        "lm-eval's word perplexity of {text}: a page at a time, normalised by the words of the "
        "original text.",
    ),
    (
        r"greedy_(?P<n>\d+)x(?P<length>\d+)",
        "Greedy generation: {n} prompts continued by {length} tokens each, compared token by "
        "token with what the unquantized model generates.",
    ),
    (
        rf"{_TEXT}{_SHOTS}",
        "lm-eval's task {text} with {n} examples in the prompt{chat}{turns}{system}{limit}.",
    ),
    (
        r"prompt(?P<n>\d+)(?:_depth(?P<depth>\d+))?(?:_batch(?P<batch>\d+))?",
        "Speed with a prompt of {n} tokens{depth}{batch}: every token timed after a warm-up, the "
        "median of the raw times.",
    ),
    (
        rf"rapl_{_BURST}",
        "Energy of the processor packages as they count it (RAPL): all processes on them count, "
        f"and on servers memory modules do not. {_BURSTS}",
    ),
    (
        rf"nvml_counter_{_BURST}",
        "Energy of the whole card as it counts it (NVML): all processes on it count, the host "
        f"does not. {_BURSTS}",
    ),
    (
        rf"nvml_power_{_BURST}",
        "Energy of the whole card, its power sampled and summed (NVML): all processes on it "
        f"count, the host does not. {_BURSTS}",
    ),
    (
        r"process_peak",
        "The most resident memory of the process, less what it held before the work began.",
    ),
    (
        r"process_peak_depth(?P<n>\d+)",
        "The most resident memory of a process that loaded the saved model, read {n} tokens and "
        "wrote one, less what it held before.",
    ),
    (
        r"cuda_allocated_peak_depth(?P<n>\d+)",
        "The most memory that PyTorch had allocated on the card for loading the saved model, "
        "reading {n} tokens and writing one.",
    ),
    (
        r"cuda_reserved_peak_depth(?P<n>\d+)",
        "The most memory that PyTorch had reserved on the card for the same ({n} tokens).",
    ),
    (
        r"stored",
        "Bytes of the saved model on disk, scales, zero points and indices included, the "
        "tokenizer's files left out; bits a weight count the quantized matrices alone.",
    ),
    (
        r"depth(?P<n>\d+)_batch(?P<m>\d+)",
        "Bytes of the keys and values kept for {n} tokens of {m} sequence(s).",
    ),
    (r"computed", "Arithmetic from the shapes of the architecture; nothing was stored or run."),
    (
        r"again_no_mmap",
        "The same, loaded again with the file read into memory; it was in the page cache.",
    ),
    (
        r"again_mmap",
        "The same, loaded again with the file mapped into memory, where a weight is read when it "
        "is first used; the file was in the page cache.",
    ),
    (r"again", "The same, loaded again: the files were in the page cache."),
    (
        r"prompt(?P<n>\d+)_new(?P<length>\d+)_concurrency(?P<m>\d+)",
        "Serving: {m} request(s) at once, each a prompt of {n} tokens of its own and {length} new "
        "tokens, streamed; times as a client sees them.",
    ),
    (
        rf"{_TEXT}_sentences(?P<n>\d+)",
        "Embeddings of the first {n} sentences of {text}, against those of the unquantized model; "
        "similarities are cosines between every two sentences.",
    ),
    (
        rf"{_TEXT}_masked(?P<n>\d+)",
        "{n} % of the tokens of {text} masked, and what the model puts in their places.",
    ),
    (
        r"length(?P<n>\d+)_batch(?P<m>\d+)",
        "Seconds of one pass over {m} sequence(s) of {n} tokens, the median of the raw times.",
    ),
    (r"artefact", "Seconds from the files on disk to an engine that is ready to run."),
    (r"quantize", "Seconds of the quantizing call alone, the loaded model given."),
)


def protocol_sentence(protocol: str) -> str:
    """Return one sentence that says how figures of `protocol` were measured."""
    for pattern, sentence in _PROTOCOLS:
        match = re.fullmatch(pattern, protocol)
        if match:
            return sentence.format(**_parts(match.groupdict()))
    return "As the measure that wrote it names it."


def screening(protocol: str) -> str:
    """Return why figures of `protocol` are screening only; empty where they are not."""
    match = re.search(r"_first(\d+)$", protocol)
    if match is not None:
        return f"screening: first {words.count(int(match[1]), 'window')}"
    asked = _limit(protocol)
    return f"screening: first {_questions(asked)}" if asked else ""


def limit(protocol: str) -> int | None:
    """Return how many questions of each task were asked; None where that is no single number."""
    asked = _limit(protocol)
    return int(asked) if asked and asked.isdecimal() else None


def _limit(protocol: str) -> str | None:
    match = re.search(rf"{_SHOTS}$", protocol)
    return match["limit"] if match is not None else None


def _questions(limit: str) -> str:
    """Return `100` in words; tasks of one group may have limits of their own: `100-all`."""
    if limit.isdecimal():
        return words.count(int(limit), "question")
    return f"{' or '.join(limit.split('-'))} questions"


def task_of(protocol: str) -> str:
    """Return the task of `<task>_<k>shot[_chat][_multiturn][_system<digest>][_limit<N>]`."""
    return re.sub(rf"{_SHOTS}$", "", protocol)


def _parts(found: dict[str, str | None]) -> dict[str, str]:
    first, limit, depth, batch = (found.get(k) for k in ("first", "limit", "depth", "batch"))
    length = found.get("n")
    return {
        **{key: value for key, value in found.items() if value is not None},
        "n_less_one": str(int(length) - 1) if length and length.isdecimal() else "",
        "first": f"; only the first {words.count(int(first), 'window')} read" if first else "",
        "limit": f"; only the first {_questions(limit)} of each part" if limit else "",
        "system": ", after a system instruction" if found.get("system") else "",
        "turns": ", each example a turn of its own" if found.get("turns") else "",
        "chat": ", in the model's chat template" if found.get("chat") else "",
        "depth": f", {depth} tokens of context already read" if depth else "",
        "batch": f", {words.count(int(batch), 'sequence')} at once" if batch else "",
    }
