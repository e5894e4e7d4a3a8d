"""First-Block-Cache (ParaAttention): the rest is reused while the first block's residual is."""

from __future__ import annotations

from ditcast.cache.plan import Gate, StepPlan, gated


def plan(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """Every step runs the first block; its residual is compared with that of the last full step.

    The interval decides by the threshold that calibration finds for it.
    """
    del interval, order
    return gated(steps, slots, form="first-block", gate=Gate(graph="block"), forced=[0])
