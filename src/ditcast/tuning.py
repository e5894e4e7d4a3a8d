"""The search for a recipe: measured speed and paired fidelity, full precision where nothing pays.

What differs between quantizations is compiled once each; cache policies are plans over the same
graphs. The search is Optuna's TPE, seeded by the number of finished trials, so that one that was
killed goes on as it would have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.cache import StepPlan, make_plan
from ditcast.errors import BundleError, ConfigError, optional
from ditcast.progress import say
from ditcast.recipe import ORDERED, Recipe
from ditcast.runtime import Pipeline, fidelity, images
from ditcast.runtime.choice import open_backend
from ditcast.sampling import needs_noise
from ditcast.settings import Settings

PAYS = 1.05  # a recipe that is not this much faster than full precision is not worth its loss
HOPELESS_DB = 3.0  # so far under the limit after the first batch, a trial is given up
SCHEMES = ("none", "w8a8", "w7a8", "w4a8")
METHODS = ("absmax", "percentile", "mse")
CACHES = ("none", "fora", "output", "taylor")  # plans that nothing has to be fitted to
INTERVALS, ORDERS = (2, 8), (1, 2)
STUDY, TABLE, RECIPE = "study.db", "tune.json", "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One operating point of the search; interval and order are those of its cache."""

    scheme: str
    method: str
    cache: str
    interval: int
    order: int

    def keys(self) -> dict[str, Any]:
        """What it changes in a recipe: nothing that it does not use."""
        found: dict[str, Any] = {"scheme": self.scheme, "cache": self.cache}
        if self.scheme != "none":
            found["method"] = self.method
        if self.cache != "none":
            found["interval"] = self.interval
        if self.cache in ORDERED:
            found["order"] = self.order
        return found


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is asked: the largest loss, and on how many images of which seed it is measured.

    A loss is the root mean square error of pixels over their range, so that 0.01 is 40 dB.
    """

    max_loss: float
    count: int
    seed: int
    fixed: dict[str, Any]  # keys of the recipe that are not searched
    caches: list[str] = field(default_factory=lambda: list(CACHES))  # that are

    @property
    def min_psnr(self) -> float:
        """The same in dB."""
        return float(-20 * np.log10(self.max_loss))


class Bench:
    """Measures points: images of full precision are kept, its time is taken again each time."""

    def __init__(
        self,
        compiled: Callable[[str, str], Bundle],
        base: Recipe,
        backend: str,
        settings: Settings,
        goal: Goal,
    ) -> None:
        """`compiled` gives the bundle of a scheme and a method."""
        self.compiled, self.base, self.goal = compiled, base, goal
        self.backend, self.settings = backend, settings
        self._pipelines: dict[tuple[str, str], Pipeline] = {}
        self._reference: Pipeline | None = None
        self._wanted: dict[int, NDArray[np.float32]] = {}

    def __call__(self, point: Point) -> Iterator[dict[str, float]]:
        """Speed-up and median PSNR over the images so far, after each batch."""
        pipeline, reference = self._pipeline(point)
        plan = make_plan(
            point.cache,
            steps=self.base.steps,
            interval=point.interval,
            order=point.order,
            slots=len(pipeline.model.slots),
        )
        classes, size = pipeline.model.num_classes, self.base.batch
        labels = [i % classes for i in range(self.goal.count)]
        psnr: list[float] = []
        speedup = 0.0
        for first in range(0, len(labels), size):
            batch = labels[first : first + size]
            if first == 0:  # timed in turn with the point
                self._run(pipeline, batch, first, plan)  # warm-up
                self._wanted[0], exact_s = self._run(reference, batch, first, "none")
            elif first not in self._wanted:
                self._wanted[first], _ = self._run(reference, batch, first, "none")
            made, seconds = self._run(pipeline, batch, first, plan)
            if first == 0:
                speedup = exact_s / seconds
            pair = fidelity.comparable(made, self._wanted[first])
            psnr += images.psnr_db(*pair).tolist()
            yield {"speedup": speedup, "psnr_db": float(np.median(psnr)), "samples": len(psnr)}

    def _run(
        self, pipeline: Pipeline, labels: list[int], first: int, cache: StepPlan | str
    ) -> tuple[NDArray[np.float32], float]:
        """Samples of one batch, and its seconds."""
        started = time.perf_counter()
        found = pipeline.sample(labels, seed=self.goal.seed, first=first, cache=cache)
        return found, time.perf_counter() - started

    def _pipeline(self, point: Point) -> tuple[Pipeline, Pipeline]:
        """What runs the point, and full precision."""
        key = (point.scheme, point.method if point.scheme != "none" else METHODS[0])
        if key not in self._pipelines:
            bundle = self.compiled(*key)
            runtime = open_backend(self.backend, bundle, self.settings)
            if self._reference is None:
                self._reference = Pipeline(bundle, backend=runtime, target="reference")
            self._pipelines[key] = Pipeline(bundle, backend=runtime)
        reference = self._reference
        assert reference is not None
        return self._pipelines[key], reference


def search(
    folder: Path,
    goal: Goal,
    measure: Callable[[Point], Iterator[dict[str, float]]],
    *,
    first: Point,
    steps: int,
    trials: int,
    seconds: float = float("inf"),
) -> list[dict[str, Any]]:
    """Run trials until so many have been finished, or the time is up; returns all, in order.

    The `first` one is given: what is found is never worse than that. `folder` holds the study: the
    same call goes on where an earlier one was killed. `seconds` are those of all calls together,
    a killed trial's not among them, so that what was killed gets no more time than what was not.

    Raises:
        BundleError: the folder holds a search for something else.
        MissingDependencyError: Optuna is not installed.
    """
    optuna = optional("optuna", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY}")
    try:
        study = optuna.create_study(
            storage=storage, study_name="ditcast", direction="maximize", load_if_exists=True
        )
        _check_same(study, goal, folder)
        states = optuna.trial.TrialState
        for trial in study.get_trials(states=(states.RUNNING,)):  # killed in the middle
            study.tell(trial.number, state=states.FAIL)
        while (number := len(_finished(study))) < trials and _spent(study) < seconds:
            started = time.monotonic()
            if number == 0:
                given = {k: v for k, v in first.keys().items() if k not in goal.fixed}
                study.enqueue_trial(given)
            study.sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=8)
            outcome = _run(study, study.ask(), goal, measure, steps)
            study.set_user_attr("seconds", _spent(study) + time.monotonic() - started)
            left = _left(study, trials, seconds)
            say(f"tuning: {number + 1} of {trials} done, at most {left:.0f} s left; {outcome}")
        return _finished(study)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _run(
    study: Any,
    trial: Any,
    goal: Goal,
    measure: Callable[[Point], Iterator[dict[str, float]]],
    steps: int,
) -> str:
    """One trial: given up early where it is hopeless, not measured again where it is known.

    Returns its outcome in words.
    """
    point = suggest(trial, goal, steps)
    known = [found for found in _finished(study) if found["point"] == asdict(point)]
    figures = {key: known[0][key] for key in ("speedup", "psnr_db", "samples")} if known else {}
    if not known:
        for figures in measure(point):
            if figures["psnr_db"] < goal.min_psnr - HOPELESS_DB:
                break
    trial.set_user_attr("found", {"point": asdict(point), **figures})
    # A point that loses too much is worth less than any that does not, the more so the more.
    short = goal.min_psnr - figures["psnr_db"]
    study.tell(trial, figures["speedup"] if short <= 0 else -short)
    speed = f"{figures['speedup']:.2f}x at {figures['psnr_db']:.1f} dB"
    said = ("again, " if known else "") + describe(point)
    return f"{said}: {speed}" + (", loses too much" if short > 0 else "")


def _spent(study: Any) -> float:
    """Seconds of all finished trials, of this call and those before it."""
    return float(study.user_attrs.get("seconds", 0.0))


def _left(study: Any, trials: int, seconds: float) -> float:
    """Seconds to the end if further trials take as long as those so far, or to the deadline."""
    done, spent = len(_finished(study)), _spent(study)
    return max(min(seconds - spent, (trials - done) * spent / done), 0.0)


def start(base: Recipe) -> Point:
    """The point of a recipe itself, as near as the search can come to it."""
    return Point(
        scheme=base.scheme if base.scheme in SCHEMES else SCHEMES[1],
        method=base.method if base.method in METHODS else METHODS[0],
        cache=base.cache if base.cache in CACHES else CACHES[-1],
        interval=min(max(base.interval, INTERVALS[0]), INTERVALS[1], base.steps),
        order=min(max(base.order, ORDERS[0]), ORDERS[1]),
    )


def caches(base: Recipe) -> list[str]:
    """Those that go with a recipe's sampler: outputs are not forecast over fresh noise."""
    return [name for name in CACHES if name != "output" or not needs_noise(base.sampler)]


def suggest(trial: Any, goal: Goal, steps: int) -> Point:
    """The next point of a study; keys of the recipe that were given are not searched."""
    fixed = goal.fixed

    def choose(name: str, choices: Sequence[str]) -> str:
        return str(fixed[name] if name in fixed else trial.suggest_categorical(name, choices))

    def number(name: str, low: int, high: int) -> int:
        return int(fixed[name] if name in fixed else trial.suggest_int(name, low, high))

    scheme = choose("scheme", SCHEMES)
    cache = choose("cache", goal.caches)
    return Point(
        scheme=scheme,
        method=choose("method", METHODS) if scheme != "none" else METHODS[0],
        cache=cache,
        interval=number("interval", min(INTERVALS[0], steps), min(INTERVALS[1], steps))
        if cache != "none"
        else 1,
        order=number("order", *ORDERS) if cache in ORDERED else 0,
    )


def describe(point: Point) -> str:
    """A point in words."""
    keys = point.keys()
    if keys == {"scheme": "none", "cache": "none"}:
        return "full precision"
    return ", ".join(f"{key} {value}" for key, value in keys.items())


def pareto(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other one beats in speed and fidelity, fastest first."""
    front: list[dict[str, Any]] = []
    for entry in sorted(found, key=lambda entry: (-entry["speedup"], -entry["psnr_db"])):
        if not front or entry["psnr_db"] > front[-1]["psnr_db"]:
            front.append(entry)
    return front


def check(base: Recipe, fixed: dict[str, Any]) -> None:
    """Refuse what the search cannot vary a recipe around.

    Raises:
        ConfigError: rules, groups or quantized temporal features, which do not go with every
            scheme, or a cache that something has to be fitted to.
    """
    if base.rules or base.group or base.temporal != "fp":
        raise ConfigError(
            "tune: got a recipe with rules, a group or --temporal other than fp, which do not go "
            "with every scheme; tune without them"
        )
    if base.placement != "even":
        raise ConfigError(
            f"placement: got {base.placement}, expected even; tune finds interval and order, then "
            "compile its recipe with --placement fitted"
        )
    if fixed.get("cache", CACHES[0]) not in CACHES:
        raise ConfigError(f"cache: got {fixed['cache']}, expected one of {', '.join(CACHES)}")


def choose(found: list[dict[str, Any]], goal: Goal) -> dict[str, Any] | None:
    """The fastest point that loses no more than was asked; None where nothing pays."""
    fit = [entry for entry in found if entry["psnr_db"] >= goal.min_psnr]
    best = max(fit, key=lambda entry: float(entry["speedup"]), default=None)
    return best if best is not None and best["speedup"] >= PAYS else None


def write(
    folder: Path, base: Recipe, goal: Goal, found: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Write every trial and the chosen recipe; returns the chosen trial."""
    chosen = choose(found, goal)
    keys = (
        {"scheme": "none", "cache": "none"} if chosen is None else Point(**chosen["point"]).keys()
    )
    values = base.model_dump(mode="json", exclude_defaults=True) | keys
    (folder / RECIPE).write_text(yaml.safe_dump(values, sort_keys=False))
    table = {"goal": asdict(goal), "chosen": chosen, "pareto": pareto(found), "trials": found}
    (folder / TABLE).write_text(json.dumps(table, indent=1) + "\n")
    return chosen


def _finished(study: Any) -> list[dict[str, Any]]:
    trials = study.get_trials(deepcopy=False)
    return [trial.user_attrs["found"] for trial in trials if trial.state.name == "COMPLETE"]


def _check_same(study: Any, goal: Goal, folder: Path) -> None:
    """A study goes on only for what it was started for."""
    held, asked = study.user_attrs.get("goal"), asdict(goal)
    if held is None:
        study.set_user_attr("goal", asked)
    elif held != asked:
        key = next(key for key, value in asked.items() if held.get(key) != value)
        raise BundleError(
            f"tune: {folder} holds a search with {key} {held.get(key)}, asked for {asked[key]}; "
            "give another -o or remove it"
        )
