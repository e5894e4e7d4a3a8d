"""From labels and a seed to samples: the host loop and the graph loop over a bundle."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.cache import StepPlan, make_plan
from ditcast.errors import ConfigError
from ditcast.runtime.backends import Backend, Session, make_backend
from ditcast.sampling import (
    Coefficients,
    coefficients,
    draw_noise,
    guide,
    needs_noise,
    update,
)
from ditcast.schedule import NoiseSchedule, from_config

Samples = NDArray[np.float32]
Loop = Literal["host", "graph"]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What a callback sees after each step of the host loop."""

    index: int
    full: bool
    sample: Samples


class Pipeline:
    """A bundle, loaded into a backend; sessions open when first needed and are kept."""

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        backend: Backend | str = "onnxruntime",
        target: str | None = None,
        threads: int = 0,
    ) -> None:
        """Open a bundle; `target` picks other graphs than those the backend runs fastest."""
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        self.backend = make_backend(backend, threads) if isinstance(backend, str) else backend
        self.target = target or self.backend.target
        self.recipe = self.bundle.manifest.recipe
        self.model = self.bundle.manifest.model
        self.schedule = from_config(self.bundle.manifest.schedule)
        self._sessions: dict[str, Session] = {}

    def session(self, graph: str) -> Session:
        """The session of one graph."""
        if graph not in self._sessions:
            path = self.bundle.graph(self.target, graph)
            self._sessions[graph] = self.backend.session(path)
        return self._sessions[graph]

    def plan(self, steps: int | None = None, cache: str | None = None) -> StepPlan:
        """The step plan of a request; another number of steps than the recipe's is fine here."""
        return make_plan(
            cache or self.recipe.cache,
            steps=self.recipe.steps if steps is None else steps,
            interval=self.recipe.interval,
            slots=len(self.model.slots),
        )

    def sample(
        self,
        labels: Sequence[int],
        *,
        seed: int = 0,
        first: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        cache: str | None = None,
        spacing: str | None = None,
        loop: Loop = "host",
        callback: Callable[[Step], None] | None = None,
    ) -> Samples:
        """Sample one image per label; returns `(n, C, H, W)` float32.

        Image i is that of (seed, first + i), whatever the batch. `guidance`, `steps` and `cache`
        default to the recipe's; `spacing` to the model's. `callback` is called after each step.

        Raises:
            ConfigError: no labels or one outside the classes, bad steps, or a graph loop that is
                asked for what its graph does not hold.
        """
        self._check_labels(labels)
        guidance = self.recipe.guidance if guidance is None else guidance
        if not 0 <= guidance < float("inf"):
            raise ConfigError(f"guidance: got {guidance}, expected a number from 0")
        steps = self.recipe.steps if steps is None else steps
        self.schedule.timesteps(steps)  # refuses a bad number of steps before any work is done
        plan = self.plan(steps, cache)
        noises = steps if needs_noise(self.recipe.sampler) else 0
        shape = self.model.sample_shape
        drawn = [draw_noise(seed, first + i, shape, noises) for i in range(len(labels))]
        noise = np.stack(drawn, axis=1)  # (1 + noises, n, C, H, W)
        if loop == "graph":
            self._check_graph_loop(steps, cache, spacing, callback)
            return self._graph_loop(labels, noise, guidance)
        schedule = self.schedule
        if spacing is not None:
            schedule = dataclasses.replace(schedule, spacing=spacing)
        return self._host_loop(
            labels, noise, guidance, plan=plan, schedule=schedule, callback=callback
        )

    def features(
        self, labels: Sequence[int], timesteps: NDArray[np.int64], guided: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Temporal features (T, U, F) of the distinct labels, and each row's index into U."""
        null = self.model.num_classes
        unique, inverse = np.unique([*labels, null], return_inverse=True)
        feeds = {"timesteps": timesteps.astype(np.float32), "class_labels": unique}
        found = self.session("temporal").run(feeds, ["features"])["features"]
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
        callback: Callable[[Step], None] | None,
    ) -> Samples:
        steps, n, channels = len(plan.full), len(labels), self.model.sample_shape[0]
        features, rows = self.features(labels, schedule.timesteps(steps), guidance > 1)
        caches: deque[dict[str, Any]] = deque(maxlen=plan.history)
        x: Samples = noise[0]
        for step, row in enumerate(coefficients(schedule, self.recipe.sampler, steps).tolist()):
            feeds = {
                "sample": np.tile(x, (len(rows) // n, 1, 1, 1)),
                "features": features[step][rows],
            }
            output = self._network(feeds, plan, step, caches)
            output = guide(output, n, channels, guidance)
            step_noise = noise[1 + step] if len(noise) > 1 else None
            x = update(x, output, step_noise, Coefficients(*row), schedule.clip)
            if callback is not None:
                callback(Step(step, bool(plan.full[step]), x))
        return x

    def _network(
        self,
        feeds: dict[str, Any],
        plan: StepPlan,
        step: int,
        caches: deque[dict[str, Any]],
    ) -> Samples:
        """One full or reuse step; a full step that later ones read adds to `caches`."""
        if not plan.full[step]:
            past = {
                f"cache.{slot}" + (f"@{age}" if age else ""): cache[f"cache.{slot}"]
                for age, cache in enumerate(caches)
                for slot in self.model.slots
            }
            feeds = feeds | {"weights": plan.weights[step]} | past
            return self.session("reuse").run(feeds, ["output"])["output"]
        names = [f"cache.{slot}" for slot in self.model.slots] if plan.feeds_reuse(step) else []
        found = self.session("full").run(feeds, ["output", *names])
        output = found.pop("output")
        if found:
            caches.appendleft(found)
        return output

    def _graph_loop(self, labels: Sequence[int], noise: Samples, guidance: float) -> Samples:
        feeds = {
            "noise": noise[0],
            "class_labels": np.asarray(labels, np.int64),
            "guidance_scale": np.array(guidance, np.float32),
        }
        if len(noise) > 1:
            feeds["step_noise"] = noise[1:]
        return self.session("sampler").run(feeds, ["latents"])["latents"]

    def _check_graph_loop(
        self, steps: int, cache: str | None, spacing: str | None, callback: object
    ) -> None:
        """The plan and the schedule are constants of `sampler.onnx`."""
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

    def _check_labels(self, labels: Sequence[int]) -> None:
        last = self.model.num_classes - 1
        if not labels:
            raise ConfigError(f"labels: got none, expected at least one from 0 to {last}")
        for label in labels:
            if not 0 <= label <= last:
                raise ConfigError(f"labels: got {label}, expected 0 to {last}")
