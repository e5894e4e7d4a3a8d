"""The cache's part of calibration: the noise guard's tables and the variance correction."""

from __future__ import annotations

from ditcast.bundle import Bundle
from ditcast.cache import fitted
from ditcast.cache.fitted import Fitted, recipe_plan
from ditcast.cache.guard import held_back
from ditcast.calibrate import correction, noise, qparams
from ditcast.manifest import CacheFit
from ditcast.models import LoadedModel
from ditcast.progress import say

FILE = "calibration/cache.safetensors"


def fit(bundle: Bundle, model: LoadedModel) -> None:
    """Fit what the recipe asks for to the quantized network under its plan, and commit it.

    Does nothing where it is there, or where there is nothing to fit.
    """
    manifest = bundle.manifest
    recipe = manifest.recipe
    if not fitted.missing(manifest):
        return
    plan = recipe_plan(manifest)
    scales, found = qparams.of_bundle(bundle), Fitted()
    if fitted.guarding(manifest):
        say("cache: measuring what forecasts of quantized outputs are worth")
        found = Fitted(*noise.measure(model, recipe, scales, plan))
    safe = found.plan(manifest)
    if recipe.correction != "none":
        gain, offset = correction.fit(model, recipe, scales, safe)
        found = found._replace(gain=gain, offset=offset)
    fitted.save(found, bundle.staged(FILE))
    forecasts = (
        int((~plan.full).sum()) * len(model.adapter.slots) if found.forecast is not None else 0
    )
    section = CacheFit(
        made_from=manifest.fingerprint(),
        file=FILE,
        held_back=held_back(plan, safe),
        forecasts=forecasts,
        corrected=found.gain is not None,
    )
    if section.held_back:
        say(f"cache: noise guard: {section.held_back} of {forecasts} forecasts are plain reuse")
    bundle.commit({"cache": section})
