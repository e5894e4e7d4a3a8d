"""A learned router: which slot is computed at which step (HarmoniCa, arXiv 2410.01723)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditcast.cache.plan import StepPlan
from ditcast.cache.taylor import schedule

TAU = 0.1  # a slot with a lower score is reused; in training and after
KEPT = 5.0  # the logit of the first step, and the largest of all


def plan(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """TaylorSeer's full steps, as long as there is no router; it is to reuse as much as they do."""
    del order
    logits = np.where(schedule(steps, interval), KEPT, -KEPT).astype(np.float32)
    return routed(logits[:, None].repeat(slots, axis=1))


def computed(router: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which slots logits of any shape have computed."""
    found: NDArray[np.bool_] = 1 / (1 + np.exp(-router)) > TAU
    return found


def routed(router: NDArray[np.float32]) -> StepPlan:
    """The plan of a router's logits (T, slots).

    A slot is computed, and its cache renewed, where the sigmoid of its logit is over 0.1.
    """
    mask = computed(router)
    weights = np.zeros((len(mask), 1, mask.shape[1]), np.float32)
    return StepPlan(full=np.all(mask, axis=1), weights=weights, form="partial", mask=mask)
