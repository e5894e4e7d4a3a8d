"""From labels and a seed to samples: the host loop and the graph loop over a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.cache import StepPlan, make_plan
from ditcast.cache.fitted import Fitted, of_target
from ditcast.cache.stepping import graphs as graphs_of
from ditcast.cache.stepping import stepper
from ditcast.errors import ConfigError
from ditcast.manifest import REFERENCE
from ditcast.recipe import NO_NOISE
from ditcast.runtime.backends import Array, Backend, Memory, Session, graph_file
from ditcast.runtime.choice import check_policy, open_backend
from ditcast.runtime.memory import check_memory
from ditcast.runtime.request import HostRequest
from ditcast.sampling import (
    Advance,
    check_guidance,
    coefficients,
    draw_noises,
    needs_noise,
    with_null,
)
from ditcast.schedule import SPACINGS, NoiseSchedule, from_config
from ditcast.settings import Settings

Samples = NDArray[np.float32]
Loop = Literal["host", "graph"]
Cache = str | StepPlan | None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What a callback sees after each step of the host loop."""

    index: int  # from 0, the noisiest
    full: bool
    sample: Samples  # (n, C, H, W), as the step has left it


class Pipeline:
    """A bundle, loaded into a backend; sessions open when first needed and are kept.

    Its `bundle`, `backend`, `recipe`, `model` (what the manifest says of it) and `schedule` are
    there to be read, and so is `full_steps`, how many steps of its last request were full.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        backend: Backend | str = "onnxruntime",
        target: str | None = None,
        settings: Settings | None = None,
        low_memory: bool = False,
    ) -> None:
        """Open a bundle; `target` picks other graphs than those the backend runs fastest.

        `backend` is a name (`auto` is the one that is fastest here), or one that is open. With
        `low_memory` the temporal features' weights leave memory before those of the steps are
        loaded, and are loaded again for the next request.

        Raises:
            BundleError: no bundle there, or a damaged one.
            ConfigError: no such backend, or more threads than cores.
            MissingDependencyError: the backend's package is not installed.
            UnsupportedError: the backend cannot run here.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        if isinstance(backend, str):
            backend = open_backend(backend, self.bundle, settings)
        self.backend = backend
        self.target = target or self.backend.target
        self.recipe = self.bundle.manifest.recipe
        self.model = self.bundle.manifest.model
        self.schedule = from_config(self.bundle.manifest.schedule)
        self.low_memory = low_memory
        # Where temporal features are stored, there are those of one schedule and these labels.
        self.stored_labels = (
            None if self.target == REFERENCE else self.bundle.manifest.stored_labels()
        )
        self.fitted = of_target(self.bundle, self.target)
        self.full_steps = 0
        self._sessions: dict[str, Session] = {}

    def session(self, graph: str) -> Session:
        """The session of one graph."""
        if graph not in self._sessions:
            file = graph_file(self.bundle, self.target, graph)
            self._sessions[graph] = self.backend.session(file)
        return self._sessions[graph]

    def plan(self, steps: int | None = None, cache: Cache = None) -> StepPlan:
        """The step plan of a request: of a policy, or `cache` itself.

        Another number of steps than the recipe's is fine here.

        Raises:
            ConfigError: a bad number of steps, no such policy, or one that the backend or the
                bundle has no graphs for.
        """
        steps = self.recipe.steps if steps is None else steps
        self.schedule.timesteps(steps)  # refuses a bad number of steps before any work is done
        if isinstance(cache, StepPlan):
            shape, slots = (len(cache.full), cache.weights.shape[2]), len(self.model.slots)
            if shape != (steps, slots):
                raise ConfigError(
                    f"cache: got a plan of {shape[0]} steps and {shape[1]} slots, "
                    f"expected one of {steps} and {slots}"
                )
            self._check_graphs(f"a plan of form {cache.form}", cache)
            return cache
        policy = cache or self.recipe.cache
        check_policy(policy, self.backend)
        if self.deployed(steps, cache):
            return self.fitted.plan(self.bundle.manifest)
        found = make_plan(
            policy,
            steps=steps,
            interval=self.recipe.interval,
            order=self.recipe.order,
            slots=len(self.model.slots),
            placement=self.recipe.placement if policy == self.recipe.cache else "even",
        )
        if policy != self.recipe.cache:
            self._check_graphs(policy, found)
        return found

    def _check_graphs(self, what: str, plan: StepPlan) -> None:
        """Refuse a plan that the bundle was not made for."""
        if plan.form == "output" and needs_noise(self.recipe.sampler):
            raise ConfigError(NO_NOISE)
        graphs = self.bundle.manifest.graphs
        here = {graph.name for graph in graphs if graph.target == self.target}
        if lacking := [name for name in graphs_of(plan) if name not in here]:
            raise ConfigError(
                f"cache: got {what}, which needs the graphs {', '.join(lacking)}, but this bundle "
                f"was made for {self.recipe.cache}; compile one with that --cache"
            )

    def deployed(self, steps: int, cache: Cache) -> bool:
        """Whether a request is for the very plan that calibration fitted its tables to."""
        return steps == self.recipe.steps and cache in (None, self.recipe.cache)

    def fixed_steps(self, cache: Cache = None) -> bool:
        """Whether a policy (the recipe's by default) can be sampled in the recipe's steps only."""
        return self.stored_labels is not None or self._fixed_cache(cache)

    def _fixed_cache(self, cache: Cache) -> bool:
        section = self.bundle.manifest.cache
        if section is None or cache not in (None, self.recipe.cache):
            return False
        if section.threshold is not None or self.recipe.cache == "learned" or section.places:
            return True
        return self.target != REFERENCE and (section.corrected or section.held_back > 0)

    def sample(
        self,
        labels: Sequence[int],
        *,
        seed: int = 0,
        first: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        cache: Cache = None,
        spacing: str | None = None,
        loop: Loop = "host",
        callback: Callable[[Step], None] | None = None,
    ) -> Samples:
        """Sample one image per label; returns `(n, C, H, W)` float32; pixels are in about [-1, 1].

        Image i is that of (seed, first + i), whatever the batch. `guidance`, `steps` and `cache`
        (the name of a policy, or a plan) default to the recipe's; `spacing` (leading, linspace,
        trailing) to the model's. `loop` graph is one run of `sampler.onnx`, host one graph after
        the other, with `callback` after each step.

        Raises:
            ConfigError: no labels or one outside the classes, bad seed, steps, spacing, loop or
                guidance, a plan of an unknown form or of other steps or slots, a graph loop that is
                asked for what its graph does not hold, stored features or tables that do not fit
                the request, or caches that memory does not hold.
            BundleError: a graph is missing or stale, or the backend cannot load or run it.
        """
        self._check_labels(labels)
        _check_choice("loop", loop, get_args(Loop))
        if min(seed, first) < 0:
            raise ConfigError(f"seed: got {seed} with first {first}, expected integers from 0")
        _check_choice("spacing", self.schedule.spacing if spacing is None else spacing, SPACINGS)
        guidance = self.recipe.guidance if guidance is None else guidance
        if not 0 <= guidance < float("inf"):
            raise ConfigError(f"guidance: got {guidance}, expected a number from 0")
        steps = self.recipe.steps if steps is None else steps
        check_guidance(guidance, self.model.null_label)
        plan = self.plan(steps, cache)
        self._check_stored(labels, steps, spacing)
        self._check_fitted(steps, cache, spacing)
        if loop == "graph":
            self._check_graph_loop(steps, cache, spacing, callback)
        check_memory(plan, self.model, self.recipe.interval, len(labels), guidance)
        noises = steps if needs_noise(self.recipe.sampler) else 0
        indices = range(first, first + len(labels))
        noise = draw_noises(seed, indices, self.model.sample_shape, noises)
        if loop == "graph":
            return self._graph_loop(labels, noise, guidance, plan)
        schedule = self.schedule
        if spacing is not None:
            schedule = dataclasses.replace(schedule, spacing=spacing)
        return self._host_loop(
            labels,
            noise,
            guidance,
            plan=plan,
            schedule=schedule,
            fitted=self.fitted if self.deployed(steps, cache) else Fitted(),
            callback=callback,
        )

    def features(
        self, labels: Sequence[int], timesteps: NDArray[np.int64], guided: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Temporal features (T, U, F) of the distinct labels, and each row's index into U."""
        with self.backend.memory(self.session) as memory:
            found, rows = self._features(memory, labels, timesteps, guided)
            return memory.get(found), rows

    def _features(
        self, memory: Memory, labels: Sequence[int], timesteps: NDArray[np.int64], guided: bool
    ) -> tuple[Array, NDArray[np.int64]]:
        """The same, where the sessions keep them."""
        unique, inverse = np.unique(with_null(labels, self.model.null_label), return_inverse=True)
        feeds = {"timesteps": timesteps.astype(np.float32), "class_labels": unique}
        found = memory.run("temporal", feeds, ["features"])["features"]
        if self.low_memory:
            del self._sessions["temporal"]
        n = len(labels)
        return found, np.concatenate([inverse[:n], inverse[n:].repeat(n if guided else 0)])

    def _host_loop(
        self,
        labels: Sequence[int],
        noise: Samples,
        guidance: float,
        *,
        plan: StepPlan,
        schedule: NoiseSchedule,
        fitted: Fitted,
        callback: Callable[[Step], None] | None,
    ) -> Samples:
        timesteps = schedule.timesteps(len(plan.full))
        advance = Advance(
            guidance=guidance,
            table=coefficients(schedule, self.recipe.sampler, len(timesteps)),
            clip=schedule.clip,
            noise=noise[1:] if len(noise) > 1 else None,
            gain=fitted.gain,
            offset=fitted.offset,
        )
        with self.backend.memory(self.session) as memory:
            features, rows = self._features(memory, labels, timesteps, guidance > 1)
            request = HostRequest(self.session, memory, self.model, features, rows)
            network, sampler = stepper(plan, request), memory.sampler(advance, noise.shape[1:])
            x = memory.array(noise[0])
            self.full_steps = 0
            for step in range(len(timesteps)):
                output, full = network.run(step, x)
                self.full_steps += full
                x = sampler(step, x, output)
                if callback is not None:
                    callback(Step(step, full, memory.get(x)))
            return memory.get(x)

    def _graph_loop(
        self, labels: Sequence[int], noise: Samples, guidance: float, plan: StepPlan
    ) -> Samples:
        feeds = {
            "noise": noise[0],
            "class_labels": np.asarray(labels, np.int64),
            "guidance_scale": np.array(guidance, np.float32),
        }
        if len(noise) > 1:
            feeds["step_noise"] = noise[1:]
        counted = ["full_steps"] if plan.gate is not None else []  # by the loop, on the way
        found = self.session("sampler").run(feeds, ["latents", *counted])
        self.full_steps = int(found["full_steps"]) if counted else plan.full_steps
        return found["latents"]

    def _check_graph_loop(
        self, steps: int, cache: Cache, spacing: str | None, callback: object
    ) -> None:
        """The plan and the schedule are constants of `sampler.onnx`."""
        if "graph" not in self.backend.loops:
            raise ConfigError(
                f"loop graph: backend {self.backend.name} runs a whole Loop many times slower than "
                "its steps; use --loop host, or --backend onnxruntime"
            )
        if isinstance(cache, StepPlan):
            raise ConfigError(
                "loop graph: got a plan, but sampler.onnx holds the bundle's own; use the host loop"
            )
        asked = {"steps": steps, "cache": cache or self.recipe.cache}
        for key, value in asked.items():
            held = getattr(self.recipe, key)
            if value != held:
                raise ConfigError(
                    f"loop graph: got {key} {value}, but sampler.onnx holds the plan of {key} "
                    f"{held}; use --loop host, or compile a bundle with --{key} {value}"
                )
        if callback is not None or spacing is not None:
            raise ConfigError(
                "loop graph: steps cannot be watched and their spacing cannot be changed; "
                "use the host loop"
            )

    def _check_stored(self, labels: Sequence[int], steps: int, spacing: str | None) -> None:
        """Refuse what the stored temporal features do not hold."""
        stored = self.stored_labels
        if stored is None:
            return
        if steps != self.recipe.steps or spacing not in (None, self.schedule.spacing):
            raise ConfigError(
                f"steps: got {steps}{f' with {spacing} spacing' if spacing else ''}, but the "
                f"bundle stores the temporal features of its {self.recipe.steps} steps; "
                f"compile one with --steps {steps}, or with --temporal tib"
            )
        for label in labels:
            if label not in stored:
                raise ConfigError(
                    f"labels: got {label}, but the bundle stores the temporal features of "
                    f"{', '.join(map(str, stored))} only; compile one with --labels {label}, "
                    "or with --temporal tib"
                )

    def _check_fitted(self, steps: int, cache: Cache, spacing: str | None) -> None:
        """Refuse other steps where the noise guard or the correction is tied to them."""
        if not self._fixed_cache(cache):
            return
        if steps != self.recipe.steps or spacing not in (None, self.schedule.spacing):
            other = ", or use --cache none" if self.recipe.cache != "none" else ""
            raise ConfigError(
                f"steps: got {steps}{f' with {spacing} spacing' if spacing else ''}, but the "
                f"cache of the bundle was calibrated for its {self.recipe.steps} steps; compile "
                f"one with --steps {steps}{other}"
            )

    def _check_labels(self, labels: Sequence[int]) -> None:
        last = self.model.num_classes - 1
        if not labels:
            raise ConfigError(f"labels: got none, expected at least one from 0 to {last}")
        for label in labels:
            if not 0 <= label <= last:
                raise ConfigError(f"labels: got {label}, expected 0 to {last}")


def _check_choice(key: str, got: str, known: Sequence[str]) -> None:
    """Refuse what would be taken for the default."""
    if got not in known:
        raise ConfigError(f"{key}: got {got!r}, expected one of {', '.join(known)}")
