"""The sampler over a torch model: where calibration data and reference images come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditcast.cache import StepPlan, make_plan
from ditcast.models import Adapter, LoadedModel
from ditcast.recipe import Recipe
from ditcast.sampling import (
    Coefficients,
    coefficients,
    draw_noise,
    guide,
    needs_noise,
    row_labels,
    update,
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
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample image `indices` of `seed` with `labels`; returns (n, C, H, W).

    Without a `plan` every step is full. `stop_after` ends the trajectory early, at the still
    noisy sample. `correct` gives the sample after a step in place of it. `callback` is called after
    each step with its number.
    """
    n, channels = len(labels), adapter.sample_shape[0]
    noises = steps if needs_noise(sampler) else 0
    drawn = np.stack([draw_noise(seed, i, adapter.sample_shape, noises) for i in indices], axis=1)
    noise = torch.from_numpy(drawn)  # (1 + noises, n, C, H, W)
    rows = row_labels(labels, guidance, adapter.null_label)
    unique, inverse = torch.unique(torch.tensor(rows), return_inverse=True)
    timesteps = torch.from_numpy(schedule.timesteps(steps)).float()
    features = adapter.temporal(timesteps, unique)  # (T, U, F)
    table = coefficients(schedule, sampler, steps).tolist()
    plan = plan or make_plan("none", steps=steps, interval=1, slots=len(adapter.slots))
    ahead = [torch.from_numpy(part) for part in plan.ahead()]
    pending: dict[int, Tensor] = {}  # of each reuse step to come, what its stream takes
    x = noise[0]
    for step, row in enumerate(table[:stop_after]):
        repeated = x.repeat(len(rows) // n, 1, 1, 1)
        now = features[step][inverse]
        if plan.full[step]:
            later, weights = (part[step] for part in ahead)
            output, forecast = adapter.denoiser(repeated, now, features[later][:, inverse], weights)
            for t, part in zip(later.tolist(), forecast, strict=True):
                if t != step:
                    pending[t] = pending[t] + part if t in pending else part
        else:
            output = adapter.reuse(repeated, now, pending.pop(step))
        output = guide(output, n, channels, guidance)
        x = update(
            x, output, noise[1 + step] if noises else None, Coefficients(*row), schedule.clip
        )
        if correct is not None:
            x = correct(step, x)
        if callback is not None:
            callback(step)
    return x
