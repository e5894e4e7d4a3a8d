"""The noise guard: forecasts only where they gain more than the noise that they amplify."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ditcast.cache.plan import StepPlan

LIMIT = 0.5  # of the true change: what a forecast may add in noise


def guarded(plan: StepPlan, noise: NDArray[np.float32], change: NDArray[np.float32]) -> StepPlan:
    """The plan with plain reuse where a forecast is not worth its noise.

    Both tables are (T, slots), mean squares over a slot's output: `noise` of what quantization
    does to it at a full step, `change` from the newest full step to a reuse step. A forecast
    `sum_i w_i Y_i` carries the noise `sum_i w_i^2 noise_i`, if it is independent from step to step
    (where rounded weights make the same error at every step, that is too much); it is kept where
    this stays below half of the change that it is there to predict.
    """
    weights, hold = plan.weights.copy(), np.zeros(plan.history, np.float32)
    hold[0] = 1
    for step in np.flatnonzero(~plan.full):
        sources = np.flatnonzero(plan.full[:step])[::-1][: plan.history]
        row = plan.weights[step, : len(sources)].astype(np.float64)
        carried = (row**2 * noise[sources]).sum(axis=0)
        refused = (carried >= LIMIT * change[step]) & (row != hold[: len(sources), None]).any(
            axis=0
        )
        weights[step][:, refused] = hold[:, None]
    return replace(plan, weights=weights)


def held_back(plan: StepPlan, safe: StepPlan) -> int:
    """How many (step, slot) of a plan the guard has changed."""
    return int((plan.weights != safe.weights).any(axis=1).sum())
