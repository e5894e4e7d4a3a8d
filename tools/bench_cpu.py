"""Measure ditcast beside every other way a user has of running the same DiT on this CPU.

One process holds all rivals of `tools/cpu_rivals.py` and lets them take turns, round by round, in
an order that moves on by one each round. The threads of ONNX Runtime and OpenMP spin for a while
after their work, so before each turn everybody sleeps, and each turn starts with a step that is
not timed. Where the rivals do not fit into memory together, each is loaded for its turn and
dropped after it. Peak memory and load time come from fresh processes; the load time is that of a
second start with warm files, from the start of Python to the end of the first step.

    python tools/bench_cpu.py random:dit-s-2 --bundle s2.bundle --json s2.json --plot s2.html

Every speed stands beside its fidelity: the paired PSNR of images of the same seeds against full
precision in ONNX Runtime, or, where no images are made, that of the guided output of one step (of
the last reuse step, with a cache) against full precision from the same sample, over its range.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import cpu_report
import numpy as np
from command import Parser, tool
from cpu_rivals import FULL, NNCF, PACKAGES, Rival, UnavailableError, prepare, rivals, started
from cpu_steps import BATCHES, Cast, Contender, Job, Samples, Stepper, Turn
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.errors import ConfigError, DitcastError
from ditcast.progress import say
from ditcast.runtime import images, machine
from ditcast.runtime.pipeline import Loop
from ditcast.schedule import SPACINGS
from ditcast.settings import Settings

T = TypeVar("T")
PAUSE_S = 0.05
SLOW = 20  # times full precision: such a rival gets one timed step and makes no images
TIMED_KEPT, TIMED_LOADED = 1, 3  # steps of a turn of a rival that stays loaded, or does not
LOOPS = 3  # at most so many whole images by each of the two loops


@dataclass
class Found:
    """What was measured of one rival."""

    start: dict[str, Any]
    ms: dict[str, list[float]] = field(default_factory=dict)
    turn: Turn | None = None
    step_db: NDArray[np.float64] | None = None
    image_ms: list[float] = field(default_factory=list)  # one per batch
    samples: list[Samples] = field(default_factory=list)
    slow: bool = False


class Stage:
    """The rivals, loaded when their turn comes; kept, or dropped again."""

    def __init__(self, job: Job, entries: dict[str, Rival], keep: bool) -> None:
        """Load nothing yet."""
        self.job, self.entries, self.keep = job, entries, keep
        self._loaded: dict[str, Contender] = {}

    def turn(self, name: str, work: Callable[[Any], T]) -> T:
        """Let one rival work, when all threads of the one before have come to rest."""
        contender = self._loaded.pop(name, None) or self.entries[name].load(self.job)
        time.sleep(PAUSE_S)
        done = work(contender)
        if self.keep:
            self._loaded[name] = contender
        del contender
        gc.collect()
        return done

    def clear(self) -> None:
        """Drop all rivals."""
        self._loaded.clear()
        gc.collect()


def measure_steps(stage: Stage, found: dict[str, Found], rounds: int) -> None:
    """Rounds of one turn each, after one whose times do not count."""
    names, timed = list(found), TIMED_KEPT if stage.keep else TIMED_LOADED
    names.sort(key=lambda name: name != FULL)  # the others are judged by its time
    for r in range(rounds + 1):
        if r:
            say(f"steps: round {r} of {rounds}")
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            one = found[name]
            if one.slow:
                continue
            one.turn = stage.turn(name, methodcaller("turn", timed if r else 1))
            for kind, ms in one.turn.ms.items():
                one.ms.setdefault(kind, []).extend(ms)
            one.slow = r == 0 and median(one.ms["full"]) > SLOW * median(found[FULL].ms["full"])
        for one in found.values() if r == 0 else ():
            one.ms = one.ms if one.slow else {}


def median(values: list[float]) -> float:
    """The median of a list that may not be empty."""
    return float(np.median(values))


def measure_fidelity(stage: Stage, found: dict[str, Found]) -> None:
    """PSNR of the output that each rival's last step computed, against full precision's."""
    job = stage.job
    steps = job.schedule.timesteps(job.recipe.steps)

    def compare(full: Stepper) -> None:
        table = full.table(job.schedule, job.recipe.steps)
        for one in found.values():
            if one.turn is None or one.turn.output is None:
                continue
            at, before = one.turn.step, one.turn.before
            wanted, _ = full.step(before, job.labels(), int(steps[at]), table[at])
            one.step_db = paired(one.turn.output, wanted, unit=False)

    stage.turn(FULL, compare)


def paired(made: Samples, wanted: Samples, unit: bool) -> NDArray[np.float64]:
    """PSNR per image: of pixels in [0, 1], else over the range of what is wanted."""
    if unit:
        return images.psnr_db(images.to_unit(made), images.to_unit(wanted))
    low, span = wanted.min(), np.ptp(wanted)
    return images.psnr_db((made - low) / span, (wanted - low) / span)


def measure_images(stage: Stage, found: dict[str, Found], count: int) -> None:
    """Whole trajectories of `count` images, batch by batch."""
    job = stage.job
    names = [name for name, one in found.items() if not one.slow]

    def work(rival: Contender, first: int) -> tuple[Samples, float]:
        rival.turn(0)
        began = time.monotonic_ns()
        made = rival.sample(first)
        return made, (time.monotonic_ns() - began) / 1e6

    for b, first in enumerate(range(0, count, job.batch)):
        say(f"images: batch {b + 1} of {count // job.batch}")
        shift = b % len(names)
        for name in names[shift:] + names[:shift]:
            made, ms = stage.turn(name, partial(work, first=first))
            found[name].samples.append(made)
            found[name].image_ms.append(ms / job.batch)


def measure_fewer(
    stage: Stage, found: dict[str, Found], rows: list[dict[str, Any]], count: int
) -> list[dict[str, Any]]:
    """Full precision and the strongest peer with as many steps as the best cached row has time for.

    All times are those of images, from the same minutes. Where images are made, each rival has
    the timestep spacing that is best on the first batch.
    """
    cached = [row for row in rows if row["facts"].get("cache", "none") != "none"]
    fewer = []
    for row in rows if cached else ():
        name, whole = row["name"], row["steps"]
        if name not in (FULL, NNCF):
            continue
        ratio = min(c["image_ms"]["p50"] for c in cached) / row["image_ms"]["p50"]
        steps = min(whole, round(whole * ratio))
        one: dict[str, Any] = {"name": name, "steps": steps, "spacing": None, "psnr_db": None}
        if count and steps:
            wanted = found[FULL].samples
            one |= stage.turn(name, partial(_best_spacing, steps=steps, wanted=wanted))
        fewer.append(one)
    return fewer


def _best_spacing(rival: Stepper, *, steps: int, wanted: list[Samples]) -> dict[str, Any]:
    """PSNR against `wanted`, one array per batch, of the same images in fewer steps."""
    batch, unit = rival.job.batch, rival.job.unit
    first = {
        spacing: np.median(paired(rival.sample(0, steps, spacing), wanted[0], unit=unit))
        for spacing in SPACINGS
    }
    best = max(first, key=lambda spacing: first[spacing])
    made = [rival.sample(b * batch, steps, best) for b in range(len(wanted))]
    psnr = paired(np.concatenate(made), np.concatenate(wanted), unit=unit)
    return {"spacing": best, "psnr_db": cpu_report.spread(psnr), "samples": len(psnr)}


def measure_loops(job: Job, entries: dict[str, Rival], rounds: int) -> dict[str, Any]:
    """Whole images by the graph loop and by the host loop in turns, on ONNX Runtime's CPU EP."""
    names = [name for name in entries if name.startswith("ditcast-onnxruntime-")]
    if not names:
        return {"reason": "no bundle on backend onnxruntime among the rivals"}
    contender = entries[names[-1]].load(job)  # quantized before float, cached before not
    assert isinstance(contender, Cast)
    ms: dict[Loop, list[float]] = {"host": [], "graph": []}
    say(f"loops: {min(rounds, LOOPS)} whole images by each")
    try:
        for r in range(min(rounds, LOOPS) + 1):
            for loop in list(ms)[:: 1 if r % 2 else -1]:
                began = time.monotonic_ns()
                contender.whole(loop)
                ms[loop].append((time.monotonic_ns() - began) / 1e6)
    except DitcastError as err:
        return {"reason": str(err)}
    return {"name": names[-1], **{loop: cpu_report.spread(ms[loop][1:]) for loop in ms}}


def pick(everything: dict[str, Rival], wanted: str | None) -> dict[str, Rival]:
    """The rivals that a list of names or shell patterns asks for; full precision always.

    Raises:
        ConfigError: a name or pattern that fits none.
    """
    chosen = {FULL}
    for pattern in wanted.split(",") if wanted is not None else ["*"]:
        fitting = fnmatch.filter(everything, pattern)
        if not fitting:
            raise ConfigError(
                f"rivals: nothing is called {pattern!r}; there are {', '.join(everything)}"
            )
        chosen |= {*fitting}
    return {name: entry for name, entry in everything.items() if name in chosen}


def get_ready(job: Job, entries: dict[str, Rival]) -> tuple[dict[str, Found], dict[str, str]]:
    """Prepare every rival and start it twice; those that run here, and why the others do not."""
    found, missing = {}, {}
    for name, entry in entries.items():
        try:
            prepare(job, entry.artifact)
            say(f"starting {name} afresh")
            found[name] = Found(started(job, name))
        except UnavailableError as err:
            missing[name] = str(err)
            say(f"{name} is left out: {err}")
    if FULL not in found:
        raise ConfigError(f"rivals: {FULL}, which all are compared with, fails: {missing[FULL]}")
    return found, missing


def measure(job: Job, wanted: str | None, rounds: int, count: int) -> dict[str, Any]:
    """All of it, as plain values."""
    entries = pick(rivals(job.bundle), wanted)
    found, missing = get_ready(job, entries)
    needed = sum(one.start["peak_memory_mib"] for one in found.values())
    free = machine.available_memory_mib()
    say(f"all rivals together need about {needed:.0f} MiB, {free:.0f} MiB are free")
    stage = Stage(job, entries, keep=needed < free)
    measure_steps(stage, found, rounds)
    measure_fidelity(stage, found)
    if count:
        measure_images(stage, found, count)
    rows = [make_row(job, name, entries[name].title, found) for name in found]
    fewer = measure_fewer(stage, found, rows, count)
    stage.clear()
    loops = measure_loops(job, {name: entries[name] for name in found}, rounds)
    facts = machine.describe()
    return {
        "machine": facts | {"versions": facts["versions"] | machine.versions(PACKAGES)},
        "bundle": {"model": job.model.source, "digest": job.bundle.manifest.digest},
        "request": {
            "recipe": job.recipe.model_dump(mode="json"),
            "threads": job.threads,
            "batch": job.batch,
            "rounds": rounds,
            "images": count,
            "seed": job.seed,
            "kept_loaded": stage.keep,
        },
        "rows": rows,
        "missing": missing,
        "fewer_steps": fewer,
        "loops": loops,
        "ratios": cpu_report.ratios(rows, loops),
    }


def make_row(job: Job, name: str, title: str, found: dict[str, Found]) -> dict[str, Any]:
    """The figures of one rival; a batch of whole images is summed up from steps if none is made."""
    one, steps, spread = found[name], job.recipe.steps, cpu_report.spread
    full_steps = one.start["full_steps"]
    counts = {"start": 1, "full": full_steps - 1, "reuse": steps - full_steps}
    if "start" not in one.ms:
        counts = {"full": steps}
    step_ms = {kind: spread(ms) for kind, ms in one.ms.items()}
    summed = {
        q: sum(n * step_ms[kind][q] for kind, n in counts.items() if n) / job.batch
        for q in ("p10", "p50", "p90")
    }
    fidelity: dict[str, Any] = {"of": "none", "psnr_db": None, "samples": 0}
    if one.samples:
        made, wanted = (np.concatenate(found[n].samples) for n in (name, FULL))
        psnr = paired(made, wanted, unit=job.unit)
        fidelity = {"of": "images", "psnr_db": spread(psnr), "samples": len(psnr)}
    elif one.step_db is not None:
        kind = "reuse step" if "reuse" in one.ms else "step"
        fidelity = {
            "of": kind,
            "psnr_db": spread(one.step_db),
            "samples": len(one.step_db),
        }
    return {
        "name": name,
        "title": title,
        "steps": steps,
        "full_steps": full_steps,
        "step_ms": step_ms,
        "timed_steps": {kind: len(ms) for kind, ms in one.ms.items()},
        "image_ms": spread(one.image_ms) if one.image_ms else summed,
        "image_ms_from": "images" if one.image_ms else "steps",
        "fidelity": fidelity,
        "slow": one.slow,
    } | one.start


def parse() -> argparse.Namespace:
    """The arguments; what is wrong with them is a `ConfigError`."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=BATCHES, metavar="MODEL", help=", ".join(BATCHES))
    parser.add_argument("--bundle", type=Path, required=True, help="compiled from the same MODEL")
    parser.add_argument("--work", type=Path, default=Path("build/rivals"), help="prepared files")
    parser.add_argument("--rivals", help="names or patterns, such as ort-*,openvino*,ditcast-*")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--images", type=int, help="whole images  [default: emoji 32, random 0]")
    parser.add_argument("--threads", type=int, default=0, help="0 is one per core")
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument("--plot", type=Path, help="write a chart: .html, or .png by kaleido")
    return parser.parse_args()


def check(args: argparse.Namespace) -> Job:
    """What is to be done.

    Raises:
        ConfigError: a bundle of another model or recipe, or numbers or paths that cannot be.
    """
    threads, batch = Settings(threads=args.threads).thread_count(), BATCHES[args.model]
    if args.rounds < 1:
        raise ConfigError(f"rounds: got {args.rounds}, expected at least 1")
    least = batch if args.model == "emoji" else 0  # its clipped samples hide a step's output
    if args.images is None:
        args.images = 2 * least
    if args.images < least or args.images % batch:
        raise ConfigError(f"images: got {args.images}, expected {least} or a multiple of {batch}")
    for path in filter(None, (args.json, args.plot)):
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: no folder {path.parent}; create it first")
    cpu_report.check_plot(args.plot)
    bundle = Bundle.open(args.bundle)
    held, recipe = bundle.manifest.model.source, bundle.manifest.recipe
    if held != args.model:
        raise ConfigError(f"bundle: {args.bundle} is of {held}, expected one of {args.model}")
    if recipe.sampler != "ddim" or recipe.guidance <= 1 or recipe.steps < 2:
        raise ConfigError(
            f"bundle: got {recipe.steps} {recipe.sampler} steps with guidance {recipe.guidance}; "
            "expected a recipe of at least 2 ddim steps with guidance above 1"
        )
    return Job(bundle=bundle, work=args.work.resolve(), threads=threads)


@tool("bench_cpu")
def main() -> None:
    """Measure and report: exit 2 for wrong usage or input, in one line."""
    args = parse()
    job = check(args)
    report = measure(job, args.rivals, args.rounds, args.images)
    cpu_report.show(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot is not None:
        cpu_report.plot(report, args.plot)


if __name__ == "__main__":
    main()
