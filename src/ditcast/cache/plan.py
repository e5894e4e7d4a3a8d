"""What a cache policy decides: which steps compute, and with which weights others predict."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ditcast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How a dynamic policy decides before each step that it is not told to compute.

    The step's gauge, a cheap tensor, is compared with what is expected of it: the gauge of the
    step before (`every_step`) or that of the last full step, extrapolated from the last
    `order + 1` of them. Their relative L1 distance, that of the worst sample of the batch, is
    rescaled by `polynomial` (highest power first) and, where the gate `adds`, summed up since the
    last full step. The step is a reuse step where that stays below `threshold`; None is one that
    has still to be found.
    """

    graph: str  # that gives gauge and drift
    order: int = 0
    every_step: bool = False
    adds: bool = False
    polynomial: tuple[float, ...] = (1.0, 0.0)
    threshold: float | None = None

    def rescaled(self, drift: float) -> np.float32:
        """The polynomial of a drift, operation for operation as in the graph loop."""
        first, *others = map(np.float32, self.polynomial)
        found = first
        for coefficient in others:
            found = found * np.float32(drift) + coefficient
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """A cache schedule over the T steps of a trajectory.

    `full` is `(T,)` bool: True computes every slot, False is a reuse step; with a `gate` False is
    for it to decide. `form` names how both kinds of steps are computed (`cache.stepping`).

    `weights` is `(T, history, slots)` float32: at a reuse step of the form `forecast`, slot k is
    predicted as `sum_i weights[t, i, k] * Y_i[k]`, where `Y_0` is the newest full step's un-gated
    output, `Y_1` the one before, and so on; in the form `output` the network's output is predicted
    so, with the weights of any slot. Rows of full steps are zero and never read. Other forms find
    their weights on the way, and only the length of the history counts. The form `partial` has a
    `mask` (T, slots) bool instead: which slots each step computes, where the others repeat what
    they gave last.

    Raises:
        ConfigError: there is no step, the first is not full, or `weights` or `mask` do not fit.
    """

    full: NDArray[np.bool_]
    weights: NDArray[np.float32]
    form: str = "forecast"
    gate: Gate | None = None
    mask: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        """A trajectory has to start with a full step: there is nothing to reuse before it."""
        steps = len(self.full)
        masked = self.mask is not None and not self.mask[:1].all()
        if masked or not self.full[:1].any():
            raise ConfigError(
                f"plan: got {steps} steps of which the first is not full, where there is nothing "
                "to reuse; expected a full first step: set its entry of full (and of mask) to True"
            )
        tables = [self.weights] if self.mask is None else [self.weights, self.mask]
        if any(len(table) != steps for table in tables):
            got = " and ".join(str(len(table)) for table in tables)
            raise ConfigError(
                f"plan: got {got} rows of weights (and mask) for {steps} steps, expected one per "
                "step; give tables of the same number of steps"
            )

    @property
    def history(self) -> int:
        """How many full steps back a reuse step looks."""
        return int(self.weights.shape[1])

    @property
    def full_steps(self) -> int:
        """NFC: the number of full steps; with a gate the least number."""
        return int(self.full.sum())

    @property
    def reused(self) -> float:
        """CUR: the share of (step, slot) that is not computed; with a gate the largest share."""
        return 1 - float((self.full if self.mask is None else self.mask).mean())

    def first(self, steps: int) -> StepPlan:
        """The plan of the first `steps` steps."""
        mask = None if self.mask is None else self.mask[:steps]
        return replace(self, full=self.full[:steps], weights=self.weights[:steps], mask=mask)

    def ahead(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What full steps sum up for later reuse steps: `(T, R)` steps, `(T, R, slots)` weights.

        Row t holds the reuse steps that read full step t, and how much of each slot's output
        each of them takes: first those behind full step t, then those behind the next one, and
        so on, `history` times. Each run of them is filled up to the longest one with step t
        itself at weight zero, so that every full step of a plan has the same shape. Only the form
        `forecast` has any.
        """
        if self.form != "forecast":
            nothing = np.zeros((len(self.full), 0, self.weights.shape[2]), np.float32)
            return nothing[..., 0].astype(np.int64), nothing
        starts, lengths = self.segments()
        longest = int(lengths.max()) - 1
        steps = np.arange(len(self.full))[:, None].repeat(self.history * longest, axis=1)
        weights = np.zeros((*steps.shape, self.weights.shape[2]), np.float32)
        for rank, start in enumerate(starts):
            for age, i in enumerate(range(rank, min(rank + self.history, len(starts)))):
                first, run = age * longest, int(lengths[i]) - 1
                behind = np.arange(starts[i] + 1, starts[i] + 1 + run)
                steps[start, first : first + run] = behind
                weights[start, first : first + run] = self.weights[behind, age]
        return steps, weights

    def segments(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Starts and lengths of the runs "one full step, then its reuse steps", each `(S,)`."""
        starts = np.flatnonzero(self.full).astype(np.int64)
        return starts, np.diff(starts, append=len(self.full)).astype(np.int64)


def newest(full: NDArray[np.bool_], step: int, history: int) -> NDArray[np.int64]:
    """The full steps whose outputs a reuse step reads, the newest first: `history` or fewer."""
    return np.flatnonzero(full[:step])[::-1][:history].astype(np.int64)


def hold(full: NDArray[np.bool_], slots: int) -> StepPlan:
    """The plan that repeats the newest full step's outputs; `full` (T,) starts with True."""
    weights = np.where(full, 0.0, 1.0)[:, None, None] * np.ones((1, 1, slots))
    return StepPlan(full=full, weights=weights.astype(np.float32))


def gated(steps: int, slots: int, *, form: str, gate: Gate, forced: list[int]) -> StepPlan:
    """A plan whose gate decides on all steps but the `forced` ones (negative: from the end)."""
    full = np.zeros(steps, bool)
    for step in forced:
        full[step if step < 0 else min(step, steps - 1)] = True
    weights = np.zeros((steps, gate.order + 1, slots), np.float32)
    return StepPlan(full=full, weights=weights, form=form, gate=gate)
