"""The noise guard: forecasts only where quantization leaves them closer than plain reuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ditcast.cache.plan import StepPlan


def guarded(plan: StepPlan, forecast: NDArray[np.float32], reuse: NDArray[np.float32]) -> StepPlan:
    """The plan with plain reuse wherever that is closer to the truth than its forecast.

    Both tables (T, slots) are errors at reuse steps, made of quantized outputs, so that a
    forecast's hold the noise that it amplifies. Rules that weigh that noise alone against the
    change that is to be predicted were measured to be worse than no guard (docs/caching.md).
    """
    weights, hold = plan.weights.copy(), np.zeros(plan.history, np.float32)
    hold[0] = 1
    for step in np.flatnonzero(~plan.full):
        weights[step][:, forecast[step] > reuse[step]] = hold[:, None]
    return replace(plan, weights=weights)


def held_back(plan: StepPlan, safe: StepPlan) -> int:
    """How many (step, slot) of a plan the guard has changed."""
    return int((plan.weights != safe.weights).any(axis=1).sum())
