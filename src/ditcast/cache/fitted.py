"""What calibration fitted to one plan: the noise guard's tables and the variance correction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache import PLACED, make_plan
from ditcast.cache.guard import guarded
from ditcast.cache.learned import routed
from ditcast.cache.plan import StepPlan
from ditcast.manifest import REFERENCE, Manifest
from ditcast.recipe import Recipe

Table = NDArray[np.float32]


class Fitted(NamedTuple):
    """Tables over the T steps of one plan; None where there is nothing of the kind.

    `forecast` and `reuse` (T, slots) are what the noise guard compares. `gain` and
    `offset` (T, C) correct the sample after each step: `x * gain + offset` per channel. A gate
    has its `threshold` () and its `polynomial` (P,), highest power first. A `router` (T, slots) is
    the logits of a learned policy.
    """

    forecast: Table | None = None
    reuse: Table | None = None
    gain: Table | None = None
    offset: Table | None = None
    threshold: Table | None = None
    polynomial: Table | None = None
    router: Table | None = None

    def plan(self, manifest: Manifest) -> StepPlan:
        """The recipe's plan, with forecasts where the guard lets them, and what its gate needs."""
        if self.router is not None:
            return routed(self.router)
        found = recipe_plan(manifest)
        if found.gate is not None and self.threshold is not None:
            polynomial = found.gate.polynomial
            if self.polynomial is not None:
                polynomial = tuple(self.polynomial.tolist())
            gate = replace(found.gate, threshold=float(self.threshold), polynomial=polynomial)
            return replace(found, gate=gate)
        if self.forecast is None or self.reuse is None:
            return found
        return guarded(found, self.forecast, self.reuse)


def plan_of(recipe: Recipe, slots: int) -> StepPlan:
    """The plan that a recipe asks for, of a model with so many slots."""
    return make_plan(
        recipe.cache,
        steps=recipe.steps,
        interval=recipe.interval,
        order=recipe.order,
        slots=slots,
        placement=recipe.placement,
    )


def recipe_plan(manifest: Manifest) -> StepPlan:
    """The plan that a bundle's recipe asks for, its full steps where calibration has put them."""
    recipe, slots = manifest.recipe, len(manifest.model.slots)
    places = None if manifest.cache is None else manifest.cache.places
    if places is None:
        return plan_of(recipe, slots)
    return PLACED[recipe.cache](places, recipe.steps, slots, recipe.order)


def guarding(manifest: Manifest) -> bool:
    """Whether a bundle's plan has forecasts of quantized outputs, and the guard is on."""
    plan = recipe_plan(manifest)
    forecasts = plan.history > 1 and not plan.full.all() and plan.form == "forecast"
    return forecasts and manifest.recipe.guard != "off" and manifest.quantization is not None


def missing(manifest: Manifest) -> bool:
    """Whether the recipe asks for something that has not been fitted."""
    section, plan = manifest.cache, recipe_plan(manifest)
    needed = (
        plan.gate is not None
        or plan.mask is not None
        or manifest.recipe.placement == "fitted"
        or guarding(manifest)
        or manifest.recipe.correction != "none"
    )
    return needed and (section is None or section.made_from != manifest.fingerprint())


def save(fitted: Fitted, reference: Fitted, path: Path) -> None:
    """Write as safetensors: what the plan needs, and what it needs in full precision."""
    found = {
        f"{prefix}{name}": table
        for prefix, tables in (("", fitted), (f"{REFERENCE}.", reference))
        for name, table in tables._asdict().items()
        if table is not None
    }
    tensors.save(found, path)


def of_target(bundle: Bundle, target: str) -> Fitted:
    """What was fitted to the plan as a target runs it.

    Raises:
        BundleError: it is damaged.
    """
    section = bundle.manifest.cache
    if section is None:
        return Fitted()
    bundle.check(section.file)
    found, prefix = tensors.load(bundle.file(section.file))[0], f"{REFERENCE}."
    of_reference = {key for key in found if key.startswith(prefix)}
    keys = of_reference if target == REFERENCE else found.keys() - of_reference
    return Fitted(**{key.removeprefix(prefix): found[key] for key in keys})
