"""What the benches are held against, as data: the targets of issue and design, card and processor.

`SINGLE` is about single products (`kernels.bench`), `WHOLE` about whole decode steps
(`harness.decode_bench`). A table shows the worst of what was reached beside what is wanted.
`python -m kernels.bench_targets` prints the tables of all results below `benchmarks/` again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Shape = tuple[int, int]
ANY_SIZE = (0.0, float("inf"))
ANY_TOKENS = (1, 1 << 30)


@dataclass(frozen=True)
class Target:
    """The least value of a quantity over some of our rows of single products.

    Attributes:
        quantity: `share` of the copy bandwidth; `faster`, times 16 bits; `ahead`, times a peer.
        scheme: short name of bits and group; None: every one.
        tokens: first and last number of tokens.
        megabytes: smallest and largest weight, in its own format.
        shapes: [out, in]; empty: every one.
        peer: the contender to be ahead of; None: the best one of the same bits.
    """

    text: str
    wanted: float
    quantity: Literal["share", "faster", "ahead"]
    scheme: str | None
    tokens: tuple[int, int] = (1, 1)
    megabytes: tuple[float, float] = ANY_SIZE
    shapes: tuple[Shape, ...] = ()
    peer: str | None = None


LARGE, MIDDLE = (40.0, float("inf")), (8.0, 25.0)
PROCESSOR_SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096))
W8, W4, W2 = "w8", "w4 g128", "w2 g64"

CARD = (
    Target(
        "W4 g128, M = 1, 40 MB and more: of the copy bandwidth", 0.65, "share", W4, (1, 1), LARGE
    ),
    Target("W4 g128, M = 1, 8 to 25 MB: of the copy bandwidth", 0.45, "share", W4, (1, 1), MIDDLE),
    Target("W8, M = 1: of the copy bandwidth", 0.75, "share", W8),
    Target("W2 g64, M = 1: of the copy bandwidth", 0.45, "share", W2),
    Target("W4 g128, 40 MB and more, M to 128: times 16 bit", 1.0, "faster", W4, (1, 128), LARGE),
    Target(
        "W4 g128, 40 MB and more, M to 256: times 16 bit", 0.95, "faster", W4, (129, 256), LARGE
    ),
    Target(
        "W4 g128, 40 MB and more, M above: times 16 bit",
        0.85,
        "faster",
        W4,
        (257, ANY_TOKENS[1]),
        LARGE,
    ),
    Target("W4 g128, 8 to 25 MB, M to 64: times 16 bit", 1.0, "faster", W4, (1, 64), MIDDLE),
    Target("W8, M to 128: times 16 bit", 1.0, "faster", W8, (1, 128)),
    Target("W2 g64, M to 128: times 16 bit", 1.0, "faster", W2, (1, 128)),
    Target("every scheme, shape and M: times the best peer", 1.0, "ahead", None, ANY_TOKENS),
)
"""On an H200, with weights that are in no cache and replayed graphs."""

PROCESSOR = (
    *(
        Target(f"W4 g128, M = 1, {out}x{columns}: times bf16", 3.0, "faster", W4, shapes=(shape,))
        for shape in PROCESSOR_SHAPES
        for out, columns in [shape]
    ),
    *(
        Target(
            f"W4 g128, M = 1, {out}x{columns}: times llama.cpp Q4_0",
            1.0,
            "ahead",
            W4,
            shapes=(shape,),
            peer="llama.cpp Q4_0",
        )
        for shape in PROCESSOR_SHAPES
        for out, columns in [shape]
    ),
    *(
        Target(
            f"W4 g128, M = {tokens}: times bf16",
            0.95,
            "faster",
            W4,
            (tokens, tokens),
            shapes=PROCESSOR_SHAPES,
        )
        for tokens in (16, 128)
    ),
)
"""On two threads."""

SINGLE = {"cpu": PROCESSOR, "cuda": CARD}


@dataclass(frozen=True)
class WholeTarget:
    """The least value of a quantity of one engine.

    Attributes:
        quantity: tokens per second, or times those of the engine `over`, burst by burst.
        engine: a row's name.
        models: names of the shapes that the target is about.
    """

    text: str
    wanted: float
    quantity: Literal["decode", "prefill"]
    engine: str
    over: str | None = None
    models: tuple[str, ...] = ("shape", "shape-1b")


WHOLE: dict[str, tuple[WholeTarget, ...]] = {
    "cpu": (
        WholeTarget(
            "W4 g128: decode over llama.cpp Q4_0", 1, "decode", "rtn w4 g128", "llama.cpp Q4_0"
        ),
        WholeTarget(
            "W4 g128, head too: decode over llama.cpp Q4_0",
            1,
            "decode",
            "rtn w4 g128 with head",
            "llama.cpp Q4_0",
        ),
        WholeTarget("W8: decode over llama.cpp Q8_0", 1, "decode", "rtn w8", "llama.cpp Q8_0"),
        WholeTarget(
            "W8, head too: decode over llama.cpp Q8_0",
            1,
            "decode",
            "rtn w8 with head",
            "llama.cpp Q8_0",
        ),
        WholeTarget("W4 g128: prefill over bf16", 1, "prefill", "rtn w4 g128", "bf16"),
        WholeTarget("W8: decode over bf16", 1, "decode", "rtn w8", "bf16"),
        WholeTarget("W3 g128: decode over bf16", 1, "decode", "rtn w3 g128", "bf16"),
        WholeTarget("W2 g64: decode over bf16", 1, "decode", "rtn w2 g64", "bf16"),
    ),
    "cuda": (
        WholeTarget(
            "7B, W4 g128: decode, tokens/s",
            500,
            "decode",
            "rtn w4 g128",
            models=("shape-llama-7b",),
        ),
        WholeTarget(
            "7B, W4 g128: decode, tokens/s (stretch)",
            600,
            "decode",
            "rtn w4 g128",
            models=("shape-llama-7b",),
        ),
    ),
}


@dataclass(frozen=True)
class Line:
    """A target beside what was reached: the worst of some rows; None: not measured."""

    text: str
    wanted: float
    reached: float | None
    rows: int

    @property
    def met(self) -> str:
        """`yes`, `no`, or nothing where nothing was measured."""
        if self.reached is None:
            return ""
        return "yes" if self.reached >= self.wanted else "no"


def line(text: str, wanted: float, values: Sequence[float]) -> Line:
    """Return a target beside the worst of some values."""
    return Line(text, wanted, min(values, default=None), len(values))


def table(lines: Iterable[Line]) -> str:
    """Return targets beside what was reached, as Markdown."""
    shown = ["| target | wanted | reached (worst) | rows | met |", "|---|---:|---:|---:|---|"]
    for one in lines:
        reached = "not measured" if one.reached is None else f"{one.reached:.2f}"
        shown.append(f"| {one.text} | {one.wanted:.2f} | {reached} | {one.rows} | {one.met} |")
    return "\n".join(shown) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the targets of every `results.json` below a folder."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_targets", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("benchmarks"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only what was measured there")
    asked = parser.parse_args(arguments)
    found = 0
    for path in sorted(asked.folder.glob("**/results.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if "targets" in facts and asked.device in (None, facts["environment"]["device"]):
            print(f"{path.parent}\n\n{table(Line(**entry) for entry in facts['targets'])}")
            found += 1
    if not found:
        print(f"no results below {asked.folder} yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
