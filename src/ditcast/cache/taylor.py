"""TaylorSeer (Liu et al. 2025, arXiv 2503.06923): outputs extrapolated from past full steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ditcast.cache.ladder import Ladder
from ditcast.cache.plan import StepPlan

WARM_UP = 2  # full steps before the first reuse step (official code for DiT)


def plan(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """Full in the warm-up, then whenever N - 1 reuse steps have passed (official code)."""
    return placed(np.flatnonzero(schedule(steps, interval)).tolist(), steps, slots, order)


def placed(places: Sequence[int], steps: int, slots: int, order: int) -> StepPlan:
    """TaylorSeer's forecasts between full steps at any places, the first of them 0."""
    full = np.zeros(steps, bool)
    full[list(places)] = True
    weights = np.zeros((steps, order + 1, slots), np.float32)
    ladder = Ladder(order, np.float64)
    for step in range(steps):
        if full[step]:
            ladder.climb(step)
        else:
            weights[step] = ladder.weights(step)[:, None]
    return StepPlan(full=full, weights=weights)


def schedule(steps: int, interval: int, warm_up: int = WARM_UP) -> NDArray[np.bool_]:
    """Which of the steps are full, (T,); the official code for FLUX has a warm-up of 3."""
    full = np.zeros(steps, bool)
    full[:warm_up] = True
    full[warm_up + interval - 1 :: interval] = True
    return full
