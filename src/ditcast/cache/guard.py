"""The noise guard: forecasts only where the noise of quantized outputs leaves them worth it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ditcast.cache.plan import StepPlan


def guarded(plan: StepPlan, forecast: NDArray[np.float32], reuse: NDArray[np.float32]) -> StepPlan:
    """The plan with plain reuse wherever the forecast's figure is above that of plain reuse.

    Both tables (T, slots) are those of the recipe's rule, see `ditcast.calibrate.noise.measure`.
    """
    weights, hold = plan.weights.copy(), np.zeros(plan.history, np.float32)
    hold[0] = 1
    for step in np.flatnonzero(~plan.full):
        weights[step][:, forecast[step] > reuse[step]] = hold[:, None]
    return replace(plan, weights=weights)


def held_back(plan: StepPlan, safe: StepPlan) -> int:
    """How many (step, slot) of a plan the guard has changed."""
    return int((plan.weights != safe.weights).any(axis=1).sum())
