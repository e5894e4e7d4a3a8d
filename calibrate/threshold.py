"""The threshold of a policy that decides on the way, tuned to a wanted number of full steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditcast.cache import StepPlan
from ditcast.cache.fitted import Fitted
from ditcast.cache.plan import Gate
from ditcast.cache.taylor import schedule
from ditcast.calibrate.collect import draw_labels
from ditcast.calibrate.trajectory import follow
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel
from ditcast.progress import say
from ditcast.recipe import Recipe

DEGREE = 4  # of TeaCache's polynomial
CLOSE = 0.1  # full steps, on average
IMAGES = 32  # at most, in batches of the recipe's size: the worst of a batch decides for it
TRIES = 30
FIRST = 1.3  # by which the first bound moves
NARROW = 1.0005  # bounds that are no further apart are one threshold


class Tuned(NamedTuple):
    """What was found, and the mean number of full steps that it gives."""

    fitted: Fitted
    full_steps: float


def wanted(recipe: Recipe) -> int:
    """As many full steps as TaylorSeer has at the recipe's interval.

    Raises:
        ConfigError: that is all of them.
    """
    found = int(schedule(recipe.steps, recipe.interval).sum())
    given = recipe.threshold is not None or recipe.router is not None
    if found == recipe.steps and not given:
        raise ConfigError(
            f"interval: got {recipe.interval} with cache {recipe.cache}, which would make all "
            f"{recipe.steps} steps full; expected a longer interval, more steps, or cache none"
        )
    return found


def tune(
    model: LoadedModel, recipe: Recipe, plan: StepPlan, what: str, start: float = 0.1
) -> Tuned:
    """Find the gate's threshold for the network as it is now, which `what` names, from `start` on.

    The polynomial of a gate that compares neighbouring steps is fitted first. With a threshold in
    the recipe only its full steps are counted.

    Raises:
        ConfigError: the recipe's threshold makes every step full, or none that need not be.
    """
    assert plan.gate is not None
    gate, target = plan.gate, wanted(recipe)
    if gate.every_step:
        gate = replace(gate, polynomial=_polynomial(model, recipe, gate))

    def count(threshold: float) -> float:
        return _full_steps(model, recipe, replace(plan, gate=replace(gate, threshold=threshold)))

    if recipe.threshold is None:
        threshold, found = _bisect(count, target, start)
        close = abs(found - target) <= CLOSE
        note = "" if close else f"; none is closer to the {target} that the interval asks for"
        say(f"cache: {what}: threshold {threshold:.5g} gives {found:.2f} full steps{note}")
    else:
        threshold, found = recipe.threshold, count(recipe.threshold)
        if found in (recipe.steps, plan.full_steps):
            raise ConfigError(
                f"threshold: got {threshold}, with which {found:.0f} of {recipe.steps} steps are "
                f"full ({what}); expected one between, or none, to have it tuned to --interval"
            )
    return Tuned(_as_tables(threshold, gate), found)


def _as_tables(threshold: float, gate: Gate) -> Fitted:
    polynomial = np.asarray(gate.polynomial, np.float32) if gate.every_step else None
    return Fitted(threshold=np.asarray(threshold, np.float32), polynomial=polynomial)


def _bisect(count: Callable[[float], float], target: int, start: float) -> tuple[float, float]:
    """The threshold whose count is closest to a target, by bisection of its logarithm.

    From `start` a bound moves away, faster and faster, until the target lies behind it: the higher
    the threshold, the fewer steps are full.
    """
    seen: dict[float, float] = {}

    def misses(threshold: float) -> float:
        """How many full steps too many, 0 where it is close enough."""
        seen[threshold] = count(threshold)
        over = seen[threshold] - target
        return 0.0 if abs(over) <= CLOSE else over

    low = high = start
    over, factor = misses(start), FIRST
    rising = over > 0
    while over and (over > 0) == rising and len(seen) < TRIES:
        low, high = (high, high * factor) if rising else (low / factor, low)
        over, factor = misses(high if rising else low), factor**1.5
    while over and len(seen) < TRIES and high / low > NARROW:
        middle = math.sqrt(low * high)
        over = misses(middle)
        low, high = (middle, high) if over > 0 else (low, middle)
    best = min(seen, key=lambda threshold: abs(seen[threshold] - target))
    return best, seen[best]


def _batches(model: LoadedModel, recipe: Recipe) -> Iterator[tuple[range, list[int]]]:
    """Trajectories and their labels, in batches of the recipe's size."""
    labels = draw_labels(recipe, model.adapter.num_classes)[:IMAGES]
    for first in range(0, len(labels), recipe.batch):
        batch = labels[first : first + recipe.batch]
        yield range(first, first + len(batch)), batch


def _full_steps(model: LoadedModel, recipe: Recipe, plan: StepPlan) -> float:
    """The mean number of full steps of a batch, which moves in steps of one over the batches.

    Batches are of the recipe's size, since the worst sample of one decides for all of it: smaller
    ones would be tuned to another number of full steps than they are deployed with.
    """
    counts = []
    for indices, labels in _batches(model, recipe):
        full: list[bool] = []

        def count(step: int, was_full: bool, found: list[bool] = full) -> None:
            del step
            found.append(was_full)

        follow(model, recipe, indices, labels, plan=plan, callback=count)
        counts.append(sum(full))
    return float(np.mean(counts))


def _polynomial(model: LoadedModel, recipe: Recipe, gate: Gate) -> tuple[float, ...]:
    """Least squares of the network's output's change on the gauge's, of every step and sample.

    The authors give polynomials for their models only; this is how they are found (TeaCache,
    section 3.3), highest power first.
    """
    gauges, outputs = list[Tensor](), list[Tensor]()
    moved, changed = list[Tensor](), list[Tensor]()
    module = model.adapter.steps[gate.graph]

    def look(
        denoiser: torch.nn.Module, args: tuple[Tensor, ...], found: tuple[Tensor, ...]
    ) -> None:
        del denoiser
        nothing = torch.zeros(1, len(args[0]), *model.adapter.slot_shape), torch.zeros(1)
        for kept, new, changes in (
            (gauges, module(*args[:2], *nothing)[0], moved),
            (outputs, found[0], changed),
        ):
            if kept:
                changes.append(_relative(new, kept.pop()))
            kept.append(new)

    with contextlib.ExitStack() as stack:
        stack.callback(model.adapter.denoiser.register_forward_hook(look).remove)
        for indices, labels in _batches(model, recipe):
            follow(model, recipe, indices, labels)
            gauges.clear()
            outputs.clear()
    x, y = torch.cat(moved).double().numpy(), torch.cat(changed).double().numpy()
    degree = min(DEGREE, len(np.unique(x)) - 1)
    return tuple(float(c) for c in np.polyfit(x, y, degree).astype(np.float32))


def _relative(now: Tensor, before: Tensor) -> Tensor:
    """Relative L1 change of every row, (N,)."""
    distance = (now - before).abs().flatten(1).sum(dim=1)
    return distance / before.abs().flatten(1).sum(dim=1).clamp(min=1e-8)
