"""RFC, relational feature caching (arXiv 2602.19506): RFE, RCS, and both together.

RFE takes the direction of an output's change from TaylorSeer's forecast, and its length from the
change of the input: `Y^ = Y_p + |Y_p - Y_q| / |A_p - A_q| * |A_now - A_p| * V / |V|`. RCS makes a
step full when the errors of the first input's own forecast have added up.
"""

from __future__ import annotations

import numpy as np

from ditcast.cache.plan import Gate, StepPlan, gated
from ditcast.cache.taylor import WARM_UP, schedule


def rfe(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """Relational feature estimation (paper, eq. of the prediction), on TaylorSeer's schedule."""
    weights = np.zeros((steps, order + 1, slots), np.float32)
    return StepPlan(full=schedule(steps, interval), weights=weights, form="relate")


def rcs(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """Relational cache scheduling alone: TaylorSeer's forecasts, refreshed when inputs say so.

    Two full steps come first: before them there is nothing to extrapolate. The interval decides
    by the threshold that calibration finds for it.
    """
    del interval
    gate = Gate(graph="surprise", order=order, adds=True)
    return gated(steps, slots, form="extrapolate", gate=gate, forced=list(range(WARM_UP)))


def plan(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """RFC: RFE's estimates, refreshed by RCS."""
    del interval
    gate = Gate(graph="surprise", order=order, adds=True)
    return gated(steps, slots, form="relate", gate=gate, forced=list(range(WARM_UP)))
