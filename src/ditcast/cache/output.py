"""Forecasts of the network's output itself: steps between full ones run nothing of the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditcast.cache.plan import StepPlan, newest
from ditcast.cache.taylor import schedule


def plan(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """TaylorSeer's full steps, and between them what the last outputs say.

    The sampler takes all of its steps. A linear multistep method (PLMS of PNDM, arXiv 2202.09778,
    after Adams and Bashforth) extrapolates outputs over steps of its own length; here they are
    extrapolated to the steps that a finer sampler takes. Order 0 repeats the newest output, as
    AdaptiveDiffusion (arXiv 2410.09873) does.
    """
    return placed(np.flatnonzero(schedule(steps, interval)).tolist(), steps, slots, order)


def placed(places: Sequence[int], steps: int, slots: int, order: int) -> StepPlan:
    """Forecasts between full steps at any places, the first of them 0.

    By Lagrange's polynomial through the outputs of the last `order + 1` full steps, or as many as
    there are, over the numbers of their steps. It takes one weight for all slots.
    """
    full = np.zeros(steps, bool)
    full[list(places)] = True
    weights = np.zeros((steps, order + 1, slots), np.float32)
    for step in np.flatnonzero(~full).tolist():
        nodes = newest(full, step, order + 1).astype(float)
        for i, node in enumerate(nodes):
            others = np.delete(nodes, i)
            weights[step, i] = np.prod((step - others) / (node - others))
    return StepPlan(full=full, weights=weights, form="output")
