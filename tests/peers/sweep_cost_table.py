"""The tables of `tests.peers.sweep_cost`, from its timings alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

COUNTS = (4, 8, 16, 32)
BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"
QUESTIONS_APART = 2
"""Most questions that two evaluations of one artefact may answer differently and still agree."""
PERPLEXITY_APART = 1e-4
"""Most relative difference of two perplexities that count as one."""


def tables(data: Mapping[str, Any]) -> str:
    """Return Markdown: T(n), the comparison, whether both did the same work, the machine."""
    parts = [_of_counts(data), _of_methods(data), _of_figures(data), _of_machine(data)]
    return "\n\n".join(part for part in parts if part)


def between_marks(page: str, written: str) -> str:
    """Return `page` with `written` in the place of what stands between the marks.

    Raises:
        ValueError: it does not have both marks.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must have the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{written}\n\n{END}{tail}"


def straight_line(points: Mapping[int, float]) -> tuple[float, float]:
    """Return (seconds before the first method, seconds a method): least squares over n -> T(n)."""
    found = statistics.linear_regression(list(points), list(points.values()))
    return found.intercept, found.slope


def _steps(data: Mapping[str, Any], prefix: str) -> list[Mapping[str, Any]]:
    return [step for name, step in data["steps"].items() if name.startswith(prefix)]


def _seconds(data: Mapping[str, Any], prefix: str) -> list[float]:
    return [float(step["seconds"]) for step in _steps(data, prefix)]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _middle(seconds: Sequence[float]) -> str:
    """Return median and least of `seconds`."""
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f})"


def _one_by_one(data: Mapping[str, Any], of: Callable[[list[float]], float]) -> float:
    """Return the mean over the methods of lm-eval's and the script's seconds, each by `of`."""
    methods = data["settings"]["methods"]
    return statistics.mean(
        of(_seconds(data, f"lm_eval-{method}-")) + of(_seconds(data, f"script-{method}-"))
        for method in methods
    )


def _of_counts(data: Mapping[str, Any]) -> str:
    points = {n: _seconds(data, f"sweep-{n}")[0] for n in COUNTS if _seconds(data, f"sweep-{n}")}
    if not points:
        return ""
    compared = bool(_seconds(data, "script-"))
    alone = _one_by_one(data, statistics.median) if compared else None
    rows = []
    for n, seconds in points.items():
        step = data["steps"][f"sweep-{n}"]
        measuring = sum(one["measuring"] for one in step["figures"].values())
        row = [str(n), f"{seconds:.0f}", f"{seconds / n:.1f}", f"{measuring / n:.1f}"]
        if alone is not None:
            row += [f"{alone * n:.0f}", f"{alone * n / seconds:.1f}"]
        rows.append([*row, f"{step['load_before']:.1f}–{step['load_after']:.1f}"])
    other = ("One by one (s)", "times") if alone is not None else ()
    heads = ("Methods n", "T(n) (s)", "T(n) / n (s)", "A cell measures (s)", *other, "Load")
    said = f"\n\n{data['settings']['jobs']} cells side by side."
    if len(points) > 1:
        start, each = straight_line(points)
        worst = max(abs(start + each * n - seconds) / seconds for n, seconds in points.items())
        said += (
            f" A straight line through them is {start:.1f} s + {each:.2f} s a method; the "
            f"farthest T(n) is {worst:.0%} from it."
        )
    return f"{_table(heads, rows)}{said}"


def _of_methods(data: Mapping[str, Any]) -> str:
    if not _seconds(data, "ours-1-") or not _seconds(data, "script-"):
        return ""
    methods, kept = data["settings"]["methods"], _seconds(data, "reference")[0]
    median, least = statistics.median, min
    alone, at_least = (_one_by_one(data, of) * len(methods) + kept for of in (median, least))
    rows = [
        [f"{program}, {method}", _middle(_seconds(data, f"{name}-{method}-")), ""]
        for method in methods
        for program, name in (("lm_eval", "lm_eval"), ("perplexity script", "script"))
    ]
    rows.append(["logits for the script, once", f"{kept:.1f}", ""])
    rows.append(["**one by one**", f"{alone:.1f} ({at_least:.1f})", ""])
    for jobs in dict.fromkeys((1, data["settings"]["jobs"])):
        ours = _seconds(data, f"ours-{jobs}-")
        factor = f"**{alone / median(ours):.2f}** ({at_least / least(ours):.2f})"
        how = "one cell at a time" if jobs == 1 else f"{jobs} cells side by side"
        rows.append([f"**one sweep, {how}**", _middle(ours), factor])
    tried = ", ".join(
        f"{name.removeprefix('batch-')}: {step['seconds']:.1f} s"
        for name, step in data["steps"].items()
        if name.startswith("batch-")
    )
    loads = [float(step["load_before"]) for step in (*_steps(data, "ours-"), *_steps(data, "lm_e"))]
    return (
        f"{_table((f'{len(methods)} artefacts', 'Seconds', 'Times'), rows)}\n\n"
        f"Median of {len(_seconds(data, 'ours-1-'))} rounds, the least in brackets. lm_eval's "
        f"batch sizes, tried on {methods[0]}: {tried}; the fastest is used. Load average before "
        f"the runs: {min(loads):.1f} to {max(loads):.1f}."
    )


def _of_figures(data: Mapping[str, Any]) -> str:
    ours, others = _steps(data, "ours-"), _steps(data, "script-")
    if not ours or not others:
        return ""
    rows = []
    for method in data["settings"]["methods"]:
        mine = ours[0]["by_method"][method]
        lm_eval = _steps(data, f"lm_eval-{method}-")[0]
        script = _steps(data, f"script-{method}-")[0]
        rows.append(
            [
                method,
                f"{mine['perplexity']:.4f} / {script['perplexity']:.4f}",
                f"{mine['kl_mean']:.3g} / {script['kl']:.3g}",
                *(f"{mine[name]:.3f} / {lm_eval[name]:.3f}" for name in ("acc", "acc_norm")),
                "yes" if agrees(mine, script, lm_eval, data["settings"]["questions"]) else "**no**",
            ]
        )
    heads = ("Artefact, quantbench / others", "Perplexity", "KL (nats)", "acc", "acc_norm", "Same")
    return _table(heads, rows)


def agrees(
    mine: Mapping[str, float],
    script: Mapping[str, float],
    lm_eval: Mapping[str, float],
    questions: int,
) -> bool:
    """Whether both sides have done the same work."""
    apart = [abs(mine[name] - lm_eval[name]) * questions for name in ("acc", "acc_norm")]
    relative = abs(mine["perplexity"] - script["perplexity"]) / script["perplexity"]
    # Half a question: shares of questions are no exact floating numbers.
    return max(apart) < QUESTIONS_APART + 0.5 and relative <= PERPLEXITY_APART


def _of_machine(data: Mapping[str, Any]) -> str:
    asked, machine = data["settings"], data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"`{asked['model']}`: {asked['windows']} windows of WikiText-2 test, {asked['questions']} "
        f"questions of HellaSwag, {asked['threads']} threads of {machine['processor']}; Python "
        f"{machine['python']}, {versions}."
    )
