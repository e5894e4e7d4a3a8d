"""Where the full steps of a forecasting cache go, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ditcast.cache import PLACED, StepPlan
from ditcast.calibrate.collect import draw_labels
from ditcast.calibrate.trajectory import follow
from ditcast.models import LoadedModel
from ditcast.progress import counting, say
from ditcast.recipe import Recipe

IMAGES = 8  # at most: a trajectory of each for every try
TRIES = 120
SHIFTS = (3, 2, 1)  # steps that one full step moves by, the widest first
LEAST = 0.02  # dB that a move has to win
LONGER = 2  # steps by which the longest run may grow, as every full step forecasts for as many

Places = tuple[int, ...]


def fit(model: LoadedModel, recipe: Recipe, plan: StepPlan) -> Places:
    """The full steps of a plan, moved to where cached samples are closest to those of all steps.

    As many as before, the first in its place. One after the other moves to both sides as long as
    the mean over samples of the PSNR to uncached samples of the same noise grows, in full
    precision. No paper's method: TaylorSeer has them at equal distances, with two at the start.
    """
    labels = draw_labels(recipe, model.adapter.num_classes)[:IMAGES]
    slots, order = plan.weights.shape[2], plan.history - 1
    wanted = follow(model, recipe, range(len(labels)), labels)

    def closeness(places: Places) -> float:
        tried = PLACED[recipe.cache](places, recipe.steps, slots, order)
        found = follow(model, recipe, range(len(labels)), labels, plan=tried)
        return _psnr(found, wanted)

    start = tuple(np.flatnonzero(plan.full).tolist())
    found, before, after = search(start, recipe.steps, closeness)
    say(
        f"cache: full steps at {' '.join(map(str, found))}: {after:.2f} dB to uncached samples, "
        f"{before:.2f} dB at equal distances"
    )
    return found


def search(
    start: Places, steps: int, closeness: Callable[[Places], float]
) -> tuple[Places, float, float]:
    """Places from which no single move is better, or `TRIES` are over; closeness before and after.

    Deterministic: full steps from the first to the last, to later steps before earlier ones.
    """
    longest = max(np.diff([*start, steps])) + LONGER
    tried = {start: closeness(start)}

    def better(places: Places, shift: int) -> Places | None:
        """The first move that wins, of those that have not been tried."""
        for candidate in _moves(places, shift, steps, longest):
            if candidate in tried or len(tried) > TRIES:
                continue
            tried[candidate] = closeness(candidate)
            advance()
            if tried[candidate] > tried[places] + LEAST:
                return candidate
        return None

    best = start
    with counting("placing full steps", TRIES) as advance:
        for shift in SHIFTS:
            while moved := better(best, shift):
                best = moved
    return best, tried[start], tried[best]


def _moves(places: Places, shift: int, steps: int, longest: int) -> list[Places]:
    """What one full step's move by `shift` makes of the places."""
    found = []
    for i in range(1, len(places)):
        for to in (places[i] + shift, places[i] - shift):
            moved = sorted({*places[:i], to, *places[i + 1 :]})
            inside = 0 < to < steps and len(moved) == len(places)
            if inside and max(np.diff([*moved, steps])) <= longest:
                found.append(tuple(moved))
    return found


def _psnr(found: Tensor, wanted: Tensor) -> float:
    """Mean over samples, in dB, relative to the wanted samples' range."""
    error = (found - wanted).square().flatten(1).mean(dim=1).clamp(min=1e-20)
    span = (wanted.max() - wanted.min()).square()
    return float((10 * torch.log10(span / error)).mean())
