"""TaylorSeer (Liu et al. 2025, arXiv 2503.06923): outputs extrapolated from past full steps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ditcast.cache.plan import StepPlan

WARM_UP = 2  # full steps before the first reuse step (official code for DiT)


def plan(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """Full in the warm-up, then whenever N - 1 reuse steps have passed (official code).

    k steps after the last full step an output is predicted as `sum_i k^i / i! * F_i`: F_0 is the
    newest output, F_i the change of F_{i-1} since the full step before, over the distance of
    the two. One more i is known after every full step, up to `order`. Each F is linear in the
    outputs of the last i + 1 full steps, so that the sum is a row of weights.
    """
    full = np.zeros(steps, bool)
    full[:WARM_UP] = True
    full[WARM_UP + interval - 1 :: interval] = True
    weights = np.zeros((steps, order + 1, slots), np.float32)
    ladder = np.zeros((0, order + 1))  # F_i as weights of the outputs, newest first
    newest = 0
    for step in range(steps):
        if full[step]:
            ladder = _climb(ladder, step - newest, order)
            newest = step
            continue
        powers = [(step - newest) ** i / math.factorial(i) for i in range(len(ladder))]
        weights[step] = (powers @ ladder)[:, None]
    return StepPlan(full=full, weights=weights)


def _climb(ladder: NDArray[np.float64], distance: int, order: int) -> NDArray[np.float64]:
    """The ladder after one more full step, with one more rung."""
    aged = np.pad(ladder[:, :-1], ((0, 0), (1, 0)))  # its newest output is now the second newest
    found = [np.eye(1, order + 1)[0]]
    for before in aged[:order]:
        found.append((found[-1] - before) / distance)
    return np.stack(found)
