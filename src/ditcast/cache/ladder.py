"""TaylorSeer's ladder of finite differences, as weights of the outputs it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Ladder:
    """What a step predicts from the last `order + 1` full steps (TaylorSeer, arXiv 2503.06923).

    k steps after the last full step an output is predicted as `sum_i k^i / i! * F_i`: F_0 is the
    newest output, F_i the change of F_{i-1} since the full step before, over the distance of
    the two. One more i is known after every full step, up to `order`. Each F is linear in the
    outputs, so that the sum is a row of weights. A graph loop computes the same in float32, in
    the same order of operations.
    """

    def __init__(self, order: int, dtype: Any = np.float32) -> None:
        """Before the first full step nothing is known, and all weights are zero."""
        self.rungs: NDArray[Any] = np.zeros((order + 1, order + 1), dtype)  # F_i, newest first
        self.known = 0  # full steps so far
        self.newest = 0  # the last of them

    def climb(self, step: int) -> None:
        """Take in a full step."""
        distance = self.rungs.dtype.type(step - self.newest)
        aged = np.pad(self.rungs[:, :-1], ((0, 0), (1, 0)))  # the newest is the second newest now
        found = [np.eye(1, len(aged), dtype=aged.dtype)[0]]
        for i, before in enumerate(aged[:-1]):
            known = i < self.known
            found.append((found[-1] - before) / distance if known else np.zeros_like(before))
        self.rungs, self.known, self.newest = np.stack(found), self.known + 1, step

    def weights(self, step: int) -> NDArray[Any]:
        """How much a reuse step takes of the last full steps' outputs, newest first."""
        kind = self.rungs.dtype.type
        distance, power = kind(step - self.newest), kind(1)
        found: NDArray[Any] = self.rungs[0].copy()
        for i, rung in enumerate(self.rungs[1:], start=1):
            power = power * distance / kind(i)
            found = found + power * rung
        return found
