"""How figures, column heads and protocols are put into words.

Bytes are decimal (1 MB = 1,000,000 bytes). One column has one unit, chosen by its middle value,
so that its figures compare by eye. A ratio is always this row over the baseline.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NOT_MEASURED = "not measured"
UNKNOWN = "–"

Kind = str
"""How a metric is written: `bytes`, `seconds`, `rate`, `bandwidth`, `energy`, `power`, `share`,
`agreement`, `cosine`, `sequences`, `change`, `count`, `tokens`, `perplexity`, `ratio` or
`number`."""

_KINDS: dict[str, Kind] = {
    "perplexity": "perplexity",
    "top1_agreement": "agreement",
    "equal_tokens": "agreement",
    "delta_p_mean": "change",
    "first_difference": "tokens",
    "nonfinite_logits": "count",
    "latency_speedup": "ratio",
    "sequences_per_second": "sequences",
    "embedding_cosine": "cosine",
    "embedding_cosine_worst": "cosine",
    "similarity_rank_agreement": "cosine",
    "nearest_neighbour_agreement": "agreement",
    "masked_perplexity": "perplexity",
    "masked_top1_agreement": "agreement",
    "masked_accuracy": "agreement",
    "prefill_speedup": "ratio",
    "decode_speedup": "ratio",
    "timing_spread": "share",
}
_TASK_SCORE = re.compile(r"acc(_norm)?|exact_match(_\w+)?|pass(@|_at_)\d+")

_TITLES = {
    "artefact_bytes": "Size on disk",
    "bits_per_weight": "Bits a weight",
    "quantized_bytes": "Quantized matrices",
    "head_bytes": "Head",
    "embedding_bytes": "Embeddings",
    "other_bytes": "Everything else",
    "read_bytes_per_token": "Weights read a token",
    "computed_bytes": "Size, computed",
    "computed_bits_per_weight": "Bits a weight, computed",
    "peak_memory_bytes": "Peak memory",
    "kv_cache_bytes": "KV cache",
    "quantize_seconds": "Quantize",
    "quantize_peak_bytes": "Quantize, peak memory",
    "load_seconds": "Load",
    "first_logits_seconds": "Load to first logits",
    "failed_requests": "Failed requests",
    "serving_tokens_per_second": "All clients together",
    "perplexity": "Perplexity",
    "kl_mean": "KL, mean",
    "kl_median": "KL, median",
    "kl_p90": "KL, p90",
    "kl_p99": "KL, p99",
    "kl_noise_floor": "KL noise floor",
    "top1_agreement": "Same first choice",
    "delta_p_mean": "Change of target's probability",
    "mean_absolute_logit_difference": "Mean logit difference",
    "nonfinite_logits": "Non-finite logits",
    "equal_tokens": "Equal tokens",
    "first_difference": "First difference",
    "prefill_tokens_per_second": "Prefill",
    "ttft_seconds": "Time to first token",
    "decode_tokens_per_second": "Decode",
    "tpot_seconds": "Time per token",
    "prefill_speedup": "Prefill speed-up",
    "decode_speedup": "Decode speed-up",
    "achieved_bytes_per_second": "Weights read",
    "copy_bytes_per_second": "Copy bandwidth",
    "timing_spread": "Spread of timing",
    "prefill_joules_per_token": "Energy of prefill",
    "prefill_above_idle_joules_per_token": "Energy of prefill, above idle",
    "decode_joules_per_token": "Energy of decode",
    "decode_above_idle_joules_per_token": "Energy of decode, above idle",
    "idle_watts": "Power when idle",
    "embedding_cosine": "Same embeddings, cosine",
    "embedding_cosine_worst": "Same embeddings, worst cosine",
    "embedding_distance": "Embedding distance",
    "similarity_rank_agreement": "Order of similarities",
    "nearest_neighbour_agreement": "Same nearest neighbour",
    "masked_perplexity": "Perplexity of masked tokens",
    "masked_kl": "KL at masked tokens",
    "masked_top1_agreement": "Same first choice at masks",
    "masked_accuracy": "Masked tokens found",
    "first_embedding_seconds": "Load to first embedding",
    "latency_seconds": "Latency",
    "latency_speedup": "Latency speed-up",
}

_SCALES: dict[Kind, tuple[tuple[float, str], ...]] = {
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    # One unit, since two columns of it are compared with each other.
    "bandwidth": ((1e9, "GB/s"),),
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "energy": ((1.0, "J/token"), (1e-3, "mJ/token"), (1e-6, "µJ/token")),
}
_UNITS = {
    "rate": "tokens/s",
    "power": "W",
    "share": "%",
    "agreement": "%",
    "change": "%",
    "ratio": "×",
    "tokens": "tokens",
    "sequences": "sequences/s",
}
_FIXED_DECIMALS = {"share": 1, "agreement": 2, "ratio": 2, "cosine": 5}


def kind(metric: str) -> Kind:
    """Return how `metric` is written, known from its name and the unit at its end."""
    if metric in _KINDS:
        return _KINDS[metric]
    if _TASK_SCORE.fullmatch(metric):
        return "share"
    for ending, found in (
        ("_bytes_per_second", "bandwidth"),
        ("_per_second", "rate"),
        ("_joules_per_token", "energy"),
        ("_watts", "power"),
        ("_bytes", "bytes"),
        ("_bytes_per_token", "bytes"),
        ("_seconds", "seconds"),
    ):
        if metric.endswith(ending):
            return found
    return "number"


def title(metric: str) -> str:
    """Return the head of a column of `metric`."""
    return _TITLES.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Format:
    """How the figures of one column are written: the unit once, in the head."""

    unit: str
    write: Callable[[float], str]
    factor: float = 1.0

    def spread(self, stderr: float | None) -> str:
        """Return a standard error in the column's unit, empty where there is none."""
        if stderr is None or not math.isfinite(stderr):
            return ""
        return f"± {stderr / self.factor:.2g}"


def column_format(metric: str, values: Iterable[float]) -> Format:
    """Return one unit and one number of decimals for all `values` of a column."""
    how = kind(metric)
    finite = sorted(abs(value) for value in values if math.isfinite(value) and value != 0)
    factor, unit = _scale(how, finite[len(finite) // 2] if finite else 1.0)
    if unit == "%":
        factor = 0.01
    if how in ("count", "tokens"):
        return Format(unit, lambda value: spell(value, lambda v: f"{v:,.4g}"))
    if (_uneven(finite) and how not in _FIXED_DECIMALS) or how == "perplexity":
        return Format(unit, lambda value: spell(value / factor, significant), factor)
    decimals = _decimals(finite[0] / factor) if finite else 1
    decimals = _FIXED_DECIMALS.get(how, decimals)
    sign = "+" if how == "change" else ""
    return Format(
        unit, lambda value: spell(value / factor, lambda v: f"{v:{sign},.{decimals}f}"), factor
    )


def figure(metric: str, value: float) -> str:
    """Return one value with its unit."""
    format_ = column_format(metric, [value])
    return f"{format_.write(value)} {format_.unit}".rstrip()


def spell(value: float, finite: Callable[[float], str]) -> str:
    """Return `value` as `finite` writes it, or in words where it is not finite."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    return finite(value)


def significant(value: float) -> str:
    """Return four digits (three below 1), with an exponent only where plain ones would be long."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e5:
        return f"{value:.1e}"
    digits = 3 if abs(value) < 1 else 4
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def ratio(value: float) -> str:
    """Return a ratio to the baseline: `x0.27`, `x3.1`, `x120`."""
    if not math.isfinite(value):
        return ""
    if value >= 1e5:
        return f"×{value:.0e}"
    return f"×{value:.2f}" if value < 10 else f"×{value:,.0f}"


def increase(value: float) -> str:
    """Return a ratio to the baseline as a change in percent, as a ratio where it is far off."""
    if not math.isfinite(value):
        return ""
    if value >= 2:
        return ratio(value)
    percent = 100 * (value - 1)
    return f"{percent:+.{2 if abs(percent) < 1 else 1}f} %"


def points(difference: float, decimals: int = 1) -> str:
    """Return a difference of two shares in percentage points."""
    return f"{100 * difference:+.{decimals}f} points" if math.isfinite(difference) else ""


def percent(change: float) -> str:
    """Return a relative change in percent, with as many digits as it is worth."""
    text = 100 * change
    return f"{text:+,.{2 if abs(text) < 1 else 1 if abs(text) < 100 else 0}f} %"


def signed(value: float) -> str:
    """Return a difference of plain numbers with its sign."""
    return ("+" if value > 0 else "") + significant(value)


def bits(value: float | None) -> str:
    """Return a bit width; a dash where the method has no single one."""
    return "–" if value is None else f"{value:.3g}"


def group_size(value: int | None) -> str:
    """Return a group size in words; a dash where the method has no groups."""
    if value is None:
        return "–"
    return "channel" if value == -1 else f"{value}"


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sorting key that puts `batch4` before `batch16`."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)


def one_line(text: object) -> str:
    """Return `text` on one line, without control characters that would act on a terminal."""
    joined = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in joined)


def listed(names: Sequence[str]) -> str:
    """Return `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def count(number: int, noun: str, plural: str = "") -> str:
    """Return `1 row`, `2 rows`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _scale(how: Kind, middle: float) -> tuple[float, str]:
    scales = _SCALES.get(how)
    if scales is None:
        return 1.0, _UNITS.get(how, "")
    return next((scale for scale in scales if middle >= scale[0]), scales[-1])


def _uneven(finite: list[float]) -> bool:
    """Whether fixed decimals would hide the small figures or flood the large ones."""
    return bool(finite) and (finite[-1] / finite[0] > 1e4 or finite[0] < 1e-5)


def _decimals(smallest: float) -> int:
    """Return the decimals that show three digits of the smallest figure of a column."""
    return max(0, 2 - math.floor(math.log10(smallest)))


READING = (
    "Every row is one saved model, loaded again from disk and measured in a process of its own.",
    "Rows are compared with the baseline of their own group: one model on one hardware, the same "
    "metric under the same protocol. Figures under two protocols are never put side by side in "
    "one column.",
    "Execution: packed means that a kernel reads the packed weights; dequantized, that they are "
    "packed in memory and converted at each call, which is often why a quantized model is slower; "
    "simulated, that rounded values are stored as floats, so such a row has no speed, memory or "
    "size.",
    "Bytes are decimal: 1 MB is 1,000,000 bytes. Bits a weight count everything stored for the "
    "quantized matrices, scales and zero points included, over their weights.",
    "Perplexity is exp of the mean loss for a token of the text: lower is better, and only "
    "figures of one protocol and one text compare. KL is how far the predictions moved from the "
    "unquantized model's, in nats a token; at or below the noise floor, nothing changed.",
    "The Pareto front holds the rows that no other row beats in both of a figure's axes.",
    f"Where no figure stands, the field says why: {NOT_MEASURED}, failed, simulated, or random "
    "weights. Infinite and NaN are results, not gaps.",
    "A difference of quality is tested where samples stand behind it: the same windows, prompts or "
    "questions of the row and of the baseline are compared pair by pair, corrected for the number "
    "of rows, and the verdict stands beside the figure. Not distinguishable means that so many "
    "samples cannot tell, not that nothing differs.",
    "Sizes are counted. Speeds, memory and times, and quality figures without a verdict, are not "
    "tested against noise: measure again what is flagged as noisy or is a screening before "
    "anything is decided on it.",
)
"""What a reader must know before using the tables."""
