"""The cache's part of calibration: thresholds, the noise guard's tables, variance correction."""

from __future__ import annotations

from ditcast.bundle import Bundle
from ditcast.cache import fitted
from ditcast.cache.fitted import Fitted, Table, plan_of, recipe_plan
from ditcast.cache.guard import held_back
from ditcast.cache.stepping import graphs
from ditcast.calibrate import correction, noise, placement, qparams, router, threshold
from ditcast.calibrate.clock import Clock
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.errors import ConfigError
from ditcast.manifest import CacheFit
from ditcast.models import LoadedModel
from ditcast.progress import say
from ditcast.recipe import Recipe

FILE = "calibration/cache.safetensors"


def check(model: LoadedModel, recipe: Recipe) -> None:
    """Refuse a policy whose steps the model cannot be taken apart into, or that would never reuse.

    Raises:
        ConfigError: naming what is missing.
    """
    plan = plan_of(recipe, slots=len(model.adapter.slots))
    lacking = [name for name in graphs(plan) if name not in model.adapter.steps]
    if lacking:
        raise ConfigError(
            f"cache: got {recipe.cache}, which needs the graphs {', '.join(lacking)}, but there "
            f"are none for a {model.adapter.architecture}; expected none, fora, deepcache, taylor "
            "or output"
        )
    if plan.gate is not None or (plan.mask is not None and recipe.reuse is None):
        threshold.wanted(recipe)
    if recipe.router is not None:
        router.load(model, recipe)


def fit(bundle: Bundle, model: LoadedModel, clock: Clock) -> None:
    """Fit what the recipe asks for to the quantized network under its plan, and commit it.

    Does nothing where it is there, or where there is nothing to fit.
    """
    manifest = bundle.manifest
    recipe = manifest.recipe
    if not fitted.missing(manifest):
        return
    places = None
    if recipe.placement == "fitted":
        places = placement.fit(model, recipe, plan_of(recipe, len(model.adapter.slots)))
        clock.lap("cache: placement")
    section = CacheFit(made_from=manifest.fingerprint(), file=FILE, places=places)
    manifest = manifest.model_copy(update={"cache": section})
    plan = recipe_plan(manifest)
    scales, found, reference = qparams.of_bundle(bundle), Fitted(), Fitted()
    full_steps = None
    if plan.gate is not None:
        reference, full_steps = threshold.tune(model, recipe, plan, "full precision")
        found = reference
        if manifest.quantization is not None:  # which moves what a gate looks at
            with quantized(model.adapter, scales):
                assert reference.threshold is not None
                start = float(reference.threshold)
                found, full_steps = threshold.tune(model, recipe, plan, "quantized", start)
        clock.lap("cache: threshold")
    if plan.mask is not None:
        found = reference = Fitted(router=_router(model, recipe, scales))
        clock.lap("cache: router")
    if fitted.guarding(manifest):
        say("cache: measuring what forecasts of quantized outputs are worth")
        found = Fitted(*noise.measure(model, recipe, scales, plan))
        clock.lap("cache: noise guard")
    safe = found.plan(manifest)
    if recipe.correction != "none":
        gain, offset = correction.fit(model, recipe, scales, safe)
        found = found._replace(gain=gain, offset=offset)
        clock.lap("cache: correction")
    fitted.save(found, reference, bundle.staged(FILE))
    forecasts = (
        int((~plan.full).sum()) * len(model.adapter.slots) if found.forecast is not None else 0
    )
    section = section.model_copy(
        update={
            "held_back": held_back(plan, safe),
            "forecasts": forecasts,
            "corrected": found.gain is not None,
            "threshold": None if found.threshold is None else float(found.threshold),
            "full_steps": full_steps,
            "reused": safe.reused if safe.mask is not None else None,
        }
    )
    if section.held_back:
        say(f"cache: noise guard: {section.held_back} of {forecasts} forecasts are plain reuse")
    bundle.commit({"cache": section})


def _router(model: LoadedModel, recipe: Recipe, scales: QParams) -> Table:
    """The recipe's router, trained on the network that it names, if it has to be."""
    if recipe.router is not None:
        return router.load(model, recipe)
    with quantized(model.adapter, scales if recipe.router_on == "quantized" else QParams()):
        return router.train(model, recipe)
