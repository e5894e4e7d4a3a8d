"""TeaCache (Liu et al. 2025, arXiv 2411.19108): residuals while inputs are alike."""

from __future__ import annotations

from ditcast.cache.plan import Gate, StepPlan, gated


def plan(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """First and last step full; others when the rescaled change of the gauge has added up.

    The gauge is the first block's modulated input, compared with that of the step before
    (official code). The interval decides by the threshold that calibration finds for it.
    """
    del interval, order
    gate = Gate(graph="change", every_step=True, adds=True)
    return gated(steps, slots, form="residual", gate=gate, forced=[0, -1])
