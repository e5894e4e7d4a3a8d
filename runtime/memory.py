"""Refusing caches that memory does not hold, with what would fit in their place."""

from __future__ import annotations

import math
from dataclasses import replace

from ditcast.cache import StepPlan, make_plan
from ditcast.cache.stepping import held
from ditcast.errors import ConfigError
from ditcast.manifest import ModelInfo
from ditcast.runtime.machine import available_memory_mib
from ditcast.runtime.verdict import count


def check_memory(
    plan: StepPlan, model: ModelInfo, interval: int, images: int, guidance: float
) -> None:
    """Refuse a request's caches before the runtime dies of them; guidance doubles the rows.

    `interval` is the bundle's, at which FORA would run.

    Raises:
        ConfigError: the outputs that `plan` keeps of `images` images are more than is available.
    """
    slots, rows = len(model.slots), 2 if guidance > 1 else 1
    free, image = available_memory_mib(), 4 * rows * math.prod(model.slot_shape) / 2**20

    def needed(other: StepPlan, many: int = images) -> float:
        return held(other, slots) * image * many

    if needed(plan) <= free:
        return
    steps = len(plan.full)
    rival = make_plan("fora", steps=steps, interval=min(interval, steps), slots=slots)
    lower = (replace(plan, weights=plan.weights[:, : n + 1]) for n in range(plan.history - 1))
    fitting = [other for other in lower if needed(other) <= free]
    found = []
    if fewer := int(free / needed(plan, 1)):
        found.append(f"batches of {count(fewer, 'image')} ({needed(plan, fewer):.1f} MiB)")
    if fitting:
        highest = fitting[-1]
        found.append(f"a bundle of --order {highest.history - 1} ({needed(highest):.1f} MiB)")
    if needed(rival) <= free:
        found.append(f"--cache fora ({needed(rival):.1f} MiB)")
    advice = f"take {' or '.join(found)}"
    if not found:
        advice = "no smaller batch, lower order or --cache fora would fit; take --cache none"
    raise ConfigError(
        f"cache: got {needed(plan):.1f} MiB of kept outputs for {count(images, 'image')} in "
        f"{rows * images} rows, expected at most the {free:.1f} MiB that are available; {advice}"
    )
