"""Range estimators as pure functions over a dictionary of tensors, one line each in `OBSERVERS`.

An observer sees every batch of one layer's input. Its state is bounded and consists of float64
tensors, so it can be written down and taken up again. What comes out is one bound per tensor:
the symmetric range is [-bound, bound].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]

BINS = 2048
EXACT = 1 << 24  # `histc` counts in float32, which is exact up to this many values
MOMENTUM = 0.95
SHRINK_STEPS = 80  # the 80-point search of the TFMQ-DM code: ranges of 1.00, 0.99 ... 0.21


def observe_absmax(state: State, x: Tensor) -> State:
    """Keep the largest magnitude seen."""
    largest = x.abs().max().double()
    return {"absmax": torch.maximum(state.get("absmax", largest), largest)}


def bound_absmax(state: State, percentile: float, levels: int) -> float:
    """The largest magnitude."""
    del percentile, levels
    return float(state["absmax"])


def observe_minmax(state: State, x: Tensor) -> State:
    """Keep minimum and maximum of the mini-batch at hand, beside the moving ones."""
    low, high = x.min().double(), x.max().double()
    return state | {
        "low": torch.minimum(state.get("low", low), low),
        "high": torch.maximum(state.get("high", high), high),
    }


def end_minmax(state: State) -> State:
    """Fold the mini-batch into the moving minimum and maximum (momentum 0.95).

    A mini-batch is one batch of whole trajectories: averaged over single steps, the range
    would be that of the last steps alone.
    """
    return {
        f"moving_{key}": torch.lerp(
            state.get(f"moving_{key}", state[key]), state[key], 1 - MOMENTUM
        )
        for key in ("low", "high")
    }


def bound_minmax(state: State, percentile: float, levels: int) -> float:
    """The larger magnitude of the moving minimum and maximum."""
    del percentile, levels
    return float(torch.maximum(-state["moving_low"], state["moving_high"]))


def observe_histogram(state: State, x: Tensor) -> State:
    """Count magnitudes in 2048 equal bins; the width doubles when a larger value comes."""
    magnitude = x.abs().flatten()
    largest = magnitude.max().double()
    width = state.get("width", largest.clamp(min=1e-12))
    counts = state.get("counts", torch.zeros(BINS, dtype=torch.float64))
    while largest > width:
        merged = counts.reshape(-1, 2).sum(1)
        counts, width = torch.cat([merged, torch.zeros_like(merged)]), width * 2
    for part in magnitude.split(EXACT):
        counts = counts + torch.histc(part, BINS, 0, float(width))
    return {"counts": counts, "width": width}


def bound_percentile(state: State, percentile: float, levels: int) -> float:
    """The magnitude below which `percentile` percent of all values lie."""
    del levels
    share = torch.cumsum(state["counts"], 0) / state["counts"].sum()
    index = int(torch.searchsorted(share, torch.tensor(percentile / 100, dtype=share.dtype)))
    return float(state["width"]) * (min(index, BINS - 1) + 1) / BINS


def bound_mse(state: State, percentile: float, levels: int) -> float:
    """The bound with the least mean squared rounding and clipping error, of 80 candidates."""
    del percentile
    width = float(state["width"])
    centers = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (width / BINS)
    occupied = int(state["counts"].nonzero().max()) + 1
    best, bound = float("inf"), width
    for i in range(SHRINK_STEPS):
        candidate = width * occupied / BINS * (1 - 0.01 * i)
        scale = candidate / levels
        rounded = torch.clamp(torch.round(centers / scale), max=levels) * scale
        error = float((state["counts"] * (rounded - centers) ** 2).sum())
        if error < best:
            best, bound = error, candidate
    return bound


def observe_channels(state: State, x: Tensor) -> State:
    """Keep the largest magnitude of every channel, (I,)."""
    largest = x.abs().flatten(0, -2).amax(dim=0)
    return {"channels": torch.maximum(state.get("channels", largest), largest)}


def observe_inputs(state: State, x: Tensor) -> State:
    """Keep the inputs themselves, (N, ...)."""
    return {"inputs": torch.cat([state["inputs"], x]) if state else x.clone()}


def bound_nothing(state: State, percentile: float, levels: int) -> float:
    """What is kept is no range."""
    raise NotImplementedError


class Observer(NamedTuple):
    """`observe` takes each tensor, `end_batch` closes a mini-batch, `bound` gives the range.

    `bound` takes the percentile and the largest code of the range.
    """

    observe: Callable[[State, Tensor], State]
    bound: Callable[[State, float, int], float]
    end_batch: Callable[[State], State] = dict


OBSERVERS: dict[str, Observer] = {
    "absmax": Observer(observe_absmax, bound_absmax),
    "minmax": Observer(observe_minmax, bound_minmax, end_minmax),
    "percentile": Observer(observe_histogram, bound_percentile),
    "mse": Observer(observe_histogram, bound_mse),
}

CHANNELS = Observer(observe_channels, bound_nothing)
INPUTS = Observer(observe_inputs, bound_nothing)
