"""Steps of a contender: those of a plain network, and those of a bundle with its cache.

`tools/bench_cpu.py` interleaves them. Both sorts do the same work in a timed step: two rows per
image, the network, guidance, and the sampler's update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.manifest import ModelInfo
from ditcast.recipe import Recipe
from ditcast.runtime import Pipeline
from ditcast.runtime.pipeline import Loop, Step
from ditcast.sampling import Coefficients, coefficients, draw_noise, guide, update
from ditcast.schedule import NoiseSchedule, from_config
from ditcast.settings import Settings

BATCHES = {"random:dit-s-2": 1, "random:dit-xl-2": 1, "emoji": 16}  # images of one batch

Samples = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What everybody has to do: batches of a bundle's request, with guidance."""

    bundle: Bundle
    work: Path
    threads: int

    @property
    def recipe(self) -> Recipe:
        """Steps, guidance and cache of the request."""
        return self.bundle.manifest.recipe

    @property
    def model(self) -> ModelInfo:
        """The denoiser."""
        return self.bundle.manifest.model

    @property
    def batch(self) -> int:
        """Images of one batch; each is two rows of the network's input."""
        return BATCHES[self.model.source]

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        """The model's noise schedule."""
        return from_config(self.bundle.manifest.schedule)

    def folder(self, artifact: str) -> Path:
        """Where an artifact of this model lies."""
        return self.work / self.model.source.replace(":", "-") / artifact

    def labels(self, first: int = 0) -> list[int]:
        """Classes of the batch that starts with image `first`, all classes in turn."""
        return [(first + i) % self.model.num_classes for i in range(self.batch)]

    def noise(self, seed: int, first: int = 0) -> Samples:
        """Initial noise of that batch, `(n, C, H, W)`: what `Pipeline.sample` draws."""
        shape = self.model.sample_shape
        return np.stack([draw_noise(seed, first + i, shape, 0)[0] for i in range(self.batch)])

    @property
    def unit(self) -> bool:
        """Whether samples are pixels; latents are compared over their range."""
        return self.model.sample_shape[0] == 3

    @property
    def seed(self) -> int:
        """Of the measured images: not the noise that anybody's scales were found on."""
        return self.recipe.seed + 1


class Turn(NamedTuple):
    """What one turn of a contender measured, and what its last step read and computed."""

    ms: dict[str, list[float]]  # "full", "reuse", and "start": a first step with what goes before
    first_done_ns: int
    step: int
    before: Samples
    output: Samples | None  # guided; None where the sample after the step does not give it away


class Contender(Protocol):
    """Something that was loaded and can take steps."""

    facts: dict[str, Any]
    full_steps: int  # of a whole trajectory

    def turn(self, timed: int) -> Turn:
        """One step that is not timed, then `timed` steps of each kind or a few more."""
        ...

    def sample(self, first: int) -> Samples:
        """The batch that starts with image `first`, all steps."""
        ...


class Network(NamedTuple):
    """A denoiser as its runtime has it: sample, timesteps and classes in rows, output out."""

    run: Callable[[Samples, NDArray[np.int64], NDArray[np.int64]], Samples]
    facts: dict[str, Any]


class Stepper:
    """A network that does the same at every step, under the sampler arithmetic of ditcast."""

    def __init__(self, job: Job, load: Callable[[Job], Network]) -> None:
        """Load the network."""
        self.job, self.network = job, load(job)
        self.facts = self.network.facts
        self.full_steps = job.recipe.steps

    def step(self, x: Samples, labels: list[int], timestep: int, row: Any) -> tuple[Samples, ...]:
        """One step of a batch: the guided output and the sample after it."""
        n, channels = len(x), x.shape[1]
        classes = np.array([*labels, *[self.job.model.num_classes] * n], np.int64)
        found = self.network.run(
            np.tile(x, (2, 1, 1, 1)), np.full(2 * n, timestep, np.int64), classes
        )
        output: Samples = guide(found, n, channels, self.job.recipe.guidance)
        return output, update(x, output, None, Coefficients(*row), self.job.schedule.clip)

    def turn(self, timed: int) -> Turn:
        """The first step of the first batch, again and again."""
        job, marks = self.job, [time.monotonic_ns()]
        x, steps = job.noise(job.seed), job.recipe.steps
        timestep, row = job.schedule.timesteps(steps)[0], self.table(job.schedule, steps)[0]
        for _ in range(timed + 1):
            output, _ = self.step(x, job.labels(), timestep, row)
            marks.append(time.monotonic_ns())
        return Turn({"full": [ms / 1e6 for ms in np.diff(marks)[1:]]}, marks[1], 0, x, output)

    def table(self, schedule: NoiseSchedule, steps: int) -> list[list[float]]:
        """The sampler's coefficients."""
        found: list[list[float]] = coefficients(schedule, self.job.recipe.sampler, steps).tolist()
        return found

    def sample(self, first: int, steps: int | None = None, spacing: str | None = None) -> Samples:
        """The batch that starts with image `first`."""
        *_, last = self.walk(self.job.seed, first, steps, spacing)
        return last[1]

    def walk(
        self, seed: int, first: int, steps: int | None = None, spacing: str | None = None
    ) -> Iterator[tuple[int, Samples]]:
        """A trajectory: at each step its timestep and the sample after it."""
        job = self.job
        steps, schedule = steps or job.recipe.steps, job.schedule
        schedule = dataclasses.replace(schedule, spacing=spacing or schedule.spacing)
        x = job.noise(seed, first)
        table = self.table(schedule, steps)
        for timestep, row in zip(schedule.timesteps(steps), table, strict=True):
            _, x = self.step(x, job.labels(first), timestep, row)
            yield int(timestep), x


class _Enough(Exception):  # noqa: N818 - it ends a trajectory that has shown enough steps
    """Raised by a callback."""


class Cast:
    """A bundle through `ditcast.runtime.Pipeline`, with the recipe's cache or without."""

    def __init__(
        self, job: Job, *, backend: str, target: str | None, cache: str, low_memory: bool = False
    ) -> None:
        """Load it."""
        self.job, self.cache = job, cache
        self.pipeline = Pipeline(
            job.bundle,
            backend=backend,
            target=target,
            settings=Settings(threads=job.threads),
            low_memory=low_memory,
        )
        self.full_steps = self.pipeline.plan(cache=cache).full_steps
        self.facts = self.pipeline.backend.facts()
        self.facts |= {"target": self.pipeline.target, "cache": cache}

    def turn(self, timed: int) -> Turn:
        """The request's first steps: after a step that features and caches follow, of each kind."""
        job, last = self.job, self._last(timed)
        ms: dict[str, list[float]] = {}
        seen, marks = [job.noise(job.seed)], [time.monotonic_ns()]
        done: list[int] = []

        def watch(step: Step) -> None:
            done.append(time.monotonic_ns())
            kind = ("full" if step.full else "reuse") if step.index else "start"
            ms.setdefault(kind, []).append((done[-1] - marks[-1]) / 1e6)
            seen.append(step.sample.copy())
            if step.index == last:
                raise _Enough
            marks.append(time.monotonic_ns())

        with contextlib.suppress(_Enough):
            self.pipeline.sample(job.labels(), seed=job.seed, cache=self.cache, callback=watch)
        return Turn(ms, done[0], last, seen[last], self._output(last, *seen[-2:]))

    def _last(self, timed: int) -> int:
        """The step to stop after: behind a full step that reuse steps read, and all of these."""
        full = self.pipeline.plan(cache=self.cache).full
        read = np.flatnonzero(full[1:-1] & ~full[2:]) + 1
        if not len(read):
            return len(full) - 1 if not full.all() else min(timed, len(full) - 1)
        following = np.flatnonzero(full[read[0] + 1 :])
        return int(read[0] + following[0] if len(following) else len(full) - 1)

    def _output(self, index: int, before: Samples, after: Samples) -> Samples | None:
        """The guided output that led from one sample to the next; clipping would hide it."""
        schedule, recipe = self.job.schedule, self.job.recipe
        if schedule.clip is not None:
            return None
        table = coefficients(schedule, recipe.sampler, recipe.steps).astype(np.float64)
        row = Coefficients(*table[index])
        rest = after.astype(np.float64) - (row.k_0 * row.c_x + row.k_x) * before
        output: Samples = (rest / (row.k_0 * row.c_o + row.k_o)).astype(np.float32)
        return output

    def sample(self, first: int) -> Samples:
        """The batch that starts with image `first`."""
        labels, seed = self.job.labels(first), self.job.seed
        return self.pipeline.sample(labels, seed=seed, first=first, cache=self.cache)

    def whole(self, loop: Loop) -> None:
        """The first batch by one of the two loops, with the recipe's cache."""
        self.pipeline.sample(self.job.labels(), seed=self.job.seed, loop=loop)
