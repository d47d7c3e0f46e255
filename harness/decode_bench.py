"""`python -m harness.decode_bench`: prefill and decode of whole models, engines in turns.

One shape with random weights under every engine of a device (`harness.decode_contenders`), all of
them in one process: a burst of each, round by round, so that what slows the machine down slows all.
Speed and memory do not depend on the values; no row has a quality figure, and every row says so.

Needs torch, transformers and accelerate; an engine whose library is not there is named as missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from harness.decode_contenders import CONTENDERS, Contender, build
from harness.decode_report import PRINTED, Outcome, Row, table, write
from harness.hardware import Hardware, describe
from harness.measures.bandwidth import Bandwidth, measure_bandwidth
from harness.measures.memory import free_bytes
from harness.measures.timing import Point, run_burst
from harness.shape_model import ShapeModel
from kernels import bench_targets
from kernels.bench_report import machine, slug
from kernels.errors import ConfigError
from methods.base import Engine

SHAPES = Path(__file__).resolve().parent.parent / "conf" / "model"
DEFAULT_MODEL = {"cpu": "shape", "cuda": "shape-llama-7b"}
BASELINE_DTYPE = {"cpu": "bfloat16", "cuda": "float16"}
TIME = "the time was up"
BUILDING = 0.6
"""Share of the minutes after which no further engine is made: the rest is for timing."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long.

    Attributes:
        contenders: the baseline first.
        warmup, bursts: rounds before the timed ones, and timed ones.
        minutes: no further engine, and no further round, is begun after so many.
    """

    model: ShapeModel
    hardware: Hardware
    contenders: tuple[Contender, ...]
    point: Point
    tokens: int
    warmup: int = 1
    bursts: int = 5
    minutes: float = float("inf")


def measure(settings: Settings, keep: Callable[[Outcome], None]) -> Outcome:
    """Make all engines, time them in turns, and hand what is there to `keep` after each round.

    What fails is absent, with the reason. There is one round at least.
    """
    end = time.monotonic() + 60 * settings.minutes
    building_end = time.monotonic() + 60 * settings.minutes * BUILDING
    absent: dict[str, str] = {}
    entries: list[tuple[Row, Engine]] = []
    for contender in settings.contenders:
        if entries and time.monotonic() >= building_end:
            absent[contender.name] = TIME
        else:
            made = _made(contender, settings, absent)
            entries += [] if made is None else [made]
    device = settings.hardware.device
    bandwidth = _bandwidth(settings)
    environment = _environment(settings)

    def outcome() -> Outcome:
        rows = [row for row, _ in entries if row.bursts]
        return Outcome(
            settings.model.name,
            device,
            settings.point,
            settings.tokens,
            bandwidth,
            rows,
            absent,
            environment,
        )

    for number in range(settings.warmup + settings.bursts):
        if number > settings.warmup and time.monotonic() >= end:
            break
        entries = _round(entries, settings, number, absent)
        keep(outcome())
    # A neighbour can have been busy the first time.
    again = _bandwidth(settings)
    bandwidth = Bandwidth(max(bandwidth.copy, again.copy), max(bandwidth.read, again.read))
    for _, engine in entries:
        engine.close()
    keep(outcome())
    return outcome()


def _bandwidth(settings: Settings) -> Bandwidth:
    return measure_bandwidth(settings.hardware.device, free_bytes(settings.hardware))


def _made(
    contender: Contender, settings: Settings, absent: dict[str, str]
) -> tuple[Row, Engine] | None:
    """Make an engine; None where it cannot be, and why in `absent`."""
    why = contender.missing()
    if why is None:
        try:
            engine, facts = build(contender, settings.model, settings.hardware)
        except Exception as error:  # noqa: BLE001  # a library raises what it likes
            why = _sentence(error)
        else:
            print(f"{contender.name}: ready in {facts.seconds:.1f} s", flush=True)
            return Row(contender.name, facts), engine
    absent[contender.name] = why
    print(f"not measured: {contender.name}: {why}", flush=True)
    return None


def _round(
    entries: list[tuple[Row, Engine]], settings: Settings, number: int, absent: dict[str, str]
) -> list[tuple[Row, Engine]]:
    """Take one burst of each engine; return those that are still there.

    Each round begins with another engine, so that none always follows the same one.
    """
    first = number % max(1, len(entries))
    failed: set[str] = set()
    for row, engine in [*entries[first:], *entries[:first]]:
        ids = settings.point.ids(engine.vocab_size, settings.model.seed)
        try:
            burst = run_burst(
                engine, settings.point, ids, settings.tokens, settings.hardware.device
            )
        except Exception as error:  # noqa: BLE001  # a library raises what it likes
            absent[row.engine] = _sentence(error)
            failed.add(row.engine)
            engine.close()
            continue
        if number >= settings.warmup:
            row.bursts.append(burst)
    return [entry for entry in entries if entry[0].engine not in failed]


def _sentence(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def _environment(settings: Settings) -> dict[str, Any]:
    facts = describe(settings.hardware)
    del facts["host"]
    return {"machine": machine(settings.hardware.device), **facts}


def shape(name: str) -> ShapeModel:
    """Return the shape of a file of `conf/model`, by name, or of any such file, by path.

    Raises:
        ConfigError: there is no such file, or it holds no shape.
    """
    path = SHAPES / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SHAPES.glob("shape*.yaml")))
        raise ConfigError(
            f"--model is {name}; it must be the path of a YAML file, or one of {known}"
        )
    facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise ConfigError(f"{path} holds no shape: it needs name, dtype and config")
    return ShapeModel(str(facts["name"]), facts["config"], dtype=str(facts["dtype"]))


def parse(arguments: Sequence[str] | None) -> tuple[Settings, Path]:
    """Return settings and the folder for results.

    Raises:
        ConfigError: an option names something that is not there.
    """
    parser = argparse.ArgumentParser(prog="python -m harness.decode_bench", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--model", help="a shape of conf/model, or the path of such a file")
    parser.add_argument("--engines", help="names, by commas; ratios are to the first one")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens of a burst")
    parser.add_argument("--bursts", type=int, default=5, help="timed bursts of each engine")
    parser.add_argument("--threads", type=int, help="of the processor; default: all there are")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a CUDA card, and torch sees none")
    for name in ("prompt", "tokens", "bursts"):
        if getattr(asked, name) < 1:
            raise ConfigError(f"--{name} is {getattr(asked, name)}; it must be 1 or more")
    hardware = Hardware(
        asked.device, asked.device, BASELINE_DTYPE[asked.device], threads=asked.threads
    )
    settings = Settings(
        model=shape(asked.model or DEFAULT_MODEL[asked.device]),
        hardware=hardware,
        contenders=_chosen(asked.device, asked.engines),
        point=Point(asked.prompt, asked.prompt, 1),
        tokens=asked.tokens,
        bursts=asked.bursts,
        minutes=asked.minutes,
    )
    name = "decode" if settings.model.name == DEFAULT_MODEL[asked.device] else settings.model.name
    return settings, asked.output / slug(machine(asked.device)) / name


def _chosen(device: str, names: str | None) -> tuple[Contender, ...]:
    known = {contender.name: contender for contender in CONTENDERS[device]}
    if names is None:
        return tuple(known.values())
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--engines has {name!r}; on {device} there are {', '.join(known)}")
    return tuple(known[name] for name in wanted)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; return 1 where one of our own engines could not be measured."""
    try:
        settings, folder = parse(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(settings.hardware.usable_threads)
    outcome = measure(settings, lambda found: write(folder, found))
    print(table(outcome, PRINTED))
    print(bench_targets.table(outcome.targets()))
    print(f"random weights, so no quality figure; results in {folder}")
    ours = {contender.name for contender in settings.contenders if contender.ours}
    failed = [name for name, why in outcome.absent.items() if name in ours and why != TIME]
    for name in failed:
        print(f"{name}: {outcome.absent[name]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
