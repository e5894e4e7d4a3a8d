"""FORA: Fast-Forward Caching (Selvaraju et al. 2024, arXiv 2407.01425)."""

from __future__ import annotations

import numpy as np

from ditcast.cache.plan import StepPlan, hold


def plan(steps: int, interval: int, slots: int, order: int) -> StepPlan:
    """Counting steps down j = T-1..0, step j is full if j = T-1 or j mod N = 0 (official code).

    All other steps reuse the newest un-gated attention and MLP outputs of every block,
    whatever the order.
    """
    del order
    down = np.arange(steps)[::-1]
    return hold((down == steps - 1) | (down % interval == 0), slots)
