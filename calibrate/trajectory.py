"""The sampler over a torch model: where calibration data and reference images come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditcast.cache import StepPlan, make_plan
from ditcast.cache.stepping import GRAPHS, stepper
from ditcast.models import Adapter, LoadedModel
from ditcast.recipe import Recipe
from ditcast.sampling import (
    Advance,
    coefficients,
    draw_noises,
    needs_noise,
    row_labels,
)
from ditcast.schedule import NoiseSchedule, from_config


def follow(
    model: LoadedModel, recipe: Recipe, indices: range, labels: Sequence[int], **options: Any
) -> Tensor:
    """Calibration trajectories `indices` of a recipe, with their labels; `options` of `sample`."""
    return sample(
        model.adapter,
        from_config(model.scheduler),
        sampler=recipe.sampler,
        steps=recipe.steps,
        guidance=recipe.guidance,
        seed=recipe.seed,
        indices=indices,
        labels=labels,
        **options,
    )


@torch.no_grad()
def sample(
    adapter: Adapter,
    schedule: NoiseSchedule,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    seed: int,
    indices: Sequence[int],
    labels: Sequence[int],
    plan: StepPlan | None = None,
    stop_after: int | None = None,
    correct: Callable[[int, Tensor], Tensor] | None = None,
    callback: Callable[[int, bool], None] | None = None,
) -> Tensor:
    """Sample image `indices` of `seed` with `labels`; returns (n, C, H, W).

    Without a `plan` every step is full. `stop_after` ends the trajectory early, at the still
    noisy sample. `correct` gives the sample after a step in place of it. `callback` is called after
    each step with its number, and whether it was full.
    """
    noises = steps if needs_noise(sampler) else 0
    noise = torch.from_numpy(
        draw_noises(seed, indices, adapter.sample_shape, noises)
    )  # (1 + noises, n, C, H, W)
    rows = row_labels(labels, guidance, adapter.null_label)
    timesteps = torch.from_numpy(schedule.timesteps(steps)).float()
    plan = plan or make_plan("none", steps=steps, interval=1, slots=len(adapter.slots))
    network = stepper(plan, TorchRequest(adapter, timesteps, rows))
    advance = Advance(
        guidance=guidance,
        table=coefficients(schedule, sampler, steps),
        clip=schedule.clip,
        noise=noise[1:] if noises else None,
    )
    x = noise[0]
    for step in range(steps)[:stop_after]:
        output, full = network.run(step, x)
        x = advance(step, x, output)
        if correct is not None:
            x = correct(step, x)
        if callback is not None:
            callback(step, full)
    return x


class TorchRequest:
    """`cache.stepping.Request` over the adapter's modules."""

    def __init__(self, adapter: Adapter, timesteps: Tensor, rows: Sequence[int]) -> None:
        """Compute the temporal features of the timesteps (T,); `rows` are the rows' labels."""
        unique, self.inverse = torch.unique(torch.tensor(rows), return_inverse=True)
        self.all_features: Tensor = adapter.temporal(timesteps, unique)  # (T, U, F)
        self.adapter, self.slots = adapter, len(adapter.slots)

    def begin(self, step: int, x: Tensor) -> None:
        """Take the sample (n, C, H, W) and the features of a step."""
        repeats = len(self.inverse) // len(x)
        self.held = {
            "sample": x.repeat(repeats, 1, 1, 1),
            "features": self.all_features[step][self.inverse],
        }

    def features(self, steps: Sequence[int]) -> Tensor:
        """(R, N, F)."""
        return self.all_features[steps][:, self.inverse]

    def run(self, graph: str, **inputs: Tensor) -> dict[str, Tensor]:
        """Run a step module."""
        (needed, names), given = GRAPHS[graph].names(self.slots), self.held | inputs
        found = self.adapter.steps[graph](*(given[name] for name in needed))
        outputs = found if isinstance(found, tuple) else (found,)
        return dict(zip(names, outputs, strict=True))

    def array(self, values: Any) -> Tensor:
        """Float32 numbers as a tensor."""
        return torch.from_numpy(np.asarray(values, np.float32))

    def keep(self, output: Tensor) -> Tensor:
        """The tensor itself: no other step writes over it."""
        return output

    def rows(self, history: int, slots: int = 0) -> Tensor:
        """Zeros, (history, [slots,] N, *slot_shape)."""
        many = (slots,) if slots else ()
        return torch.zeros(history, *many, len(self.inverse), *self.adapter.slot_shape)

    def join(self, newest: Tensor, older: Tensor) -> Tensor:
        """The newest in front of older ones, as many as before."""
        return torch.cat([newest[None], older[:-1]])

    def add(self, part: Tensor, older: Tensor) -> None:
        """Add older values to a part of an output, where that lies."""
        part += older
