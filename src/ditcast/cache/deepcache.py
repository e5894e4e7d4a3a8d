"""DeepCache (Ma et al. 2023, arXiv 2312.00858): where its full steps are, and plain reuse."""

from __future__ import annotations

import math

import numpy as np

from ditcast.cache.plan import StepPlan, hold

POWER, SMALLER = 1.4, 0.02  # of the official script, and by how much it comes down
CENTER = 0.3  # of the trajectory; the official script has step 15 of 50


def plan(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """Every N-th step is full, counted up from the first; the order is not used."""
    del order
    return hold(np.arange(steps) % interval == 0, slots)


def powered(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """As many full steps, ceil(T / N), closer together around a center c (official code).

    They lie at `c + int(x^p)` for k + 1 evenly spaced x from `(-c)^(1/p)` to `(T - c)^(1/p)`, but
    for the first, which is 0, and the last; p is the largest, from 1.4 down, that gives k different
    ones. The official code takes the real part of the complex roots of negative numbers, and so
    does this. It leaves no step out where N is 1.
    """
    count, center = math.ceil(steps / interval), round(CENTER * steps)
    found, power = list(range(steps)) if interval == 1 else [], POWER
    while len(found) != count:
        first, last = (complex(end) ** (1 / power) for end in (-center, steps - center))
        ends = (np.linspace(first, last, count + 1) ** power).real.astype(np.int64)
        found = [0, *(center + np.unique(ends)[1:-1]).tolist()]
        power -= SMALLER
    full = np.zeros(steps, bool)
    full[found] = True
    return hold(full, slots)
