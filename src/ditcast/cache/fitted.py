"""What calibration fitted to one plan: the noise guard's tables and the variance correction."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache import make_plan
from ditcast.cache.guard import guarded
from ditcast.cache.plan import StepPlan
from ditcast.manifest import REFERENCE, Manifest

Table = NDArray[np.float32]


class Fitted(NamedTuple):
    """Tables over the T steps of one plan; None where there is nothing of the kind.

    `forecast` and `reuse` (T, slots) are the errors that the noise guard decides on. `gain` and
    `offset` (T, C) correct the sample after each step: `x * gain + offset` per channel.
    """

    forecast: Table | None = None
    reuse: Table | None = None
    gain: Table | None = None
    offset: Table | None = None

    def plan(self, manifest: Manifest) -> StepPlan:
        """The recipe's plan, with forecasts where the guard lets them."""
        found = recipe_plan(manifest)
        if self.forecast is None or self.reuse is None:
            return found
        return guarded(found, self.forecast, self.reuse)


def recipe_plan(manifest: Manifest) -> StepPlan:
    """The plan that a bundle's recipe asks for, as no calibration has changed it."""
    recipe = manifest.recipe
    return make_plan(
        recipe.cache,
        steps=recipe.steps,
        interval=recipe.interval,
        order=recipe.order,
        slots=len(manifest.model.slots),
    )


def guarding(manifest: Manifest) -> bool:
    """Whether a bundle's plan has forecasts of quantized outputs, and the guard is on."""
    plan = recipe_plan(manifest)
    forecasts = plan.history > 1 and not plan.full.all()
    return forecasts and manifest.recipe.guard == "on" and manifest.quantization is not None


def missing(manifest: Manifest) -> bool:
    """Whether the recipe asks for something that has not been fitted."""
    section, needed = manifest.cache, guarding(manifest) or manifest.recipe.correction != "none"
    return needed and (section is None or section.made_from != manifest.fingerprint())


def save(fitted: Fitted, path: Path) -> None:
    """Write as safetensors."""
    found = {name: table for name, table in fitted._asdict().items() if table is not None}
    tensors.save(found, path)


def of_target(bundle: Bundle, target: str) -> Fitted:
    """What was fitted to the plan as a target runs it: nothing for full precision.

    Raises:
        BundleError: it is damaged.
    """
    section = bundle.manifest.cache
    if section is None or target == REFERENCE:
        return Fitted()
    bundle.check(section.file)
    return Fitted(**tensors.load(bundle.file(section.file))[0])
