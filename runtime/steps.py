"""What happens at each timestep, for the report: the plan of every slot, errors, and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache import StepPlan
from ditcast.cache.fitted import Fitted, recipe_plan
from ditcast.recipe import Bits
from ditcast.runtime.images import PSNR_CAP
from ditcast.runtime.pipeline import Pipeline

FULL, REUSED, FORECAST, HELD = "f", "r", "p", "h"  # computed, reused, predicted, held back
MODULE, STORED = "m", "c"  # temporal features: by the quantized module, stored
OF_INPUTS = ("|activation", "|zero_point", "|bits", "|peak")  # ends of names in the scales' file

Samples = NDArray[np.float32]
Tensors = dict[str, NDArray[Any]]


def describe(
    pipeline: Pipeline, cache: str, full: NDArray[np.bool_], paths: dict[str, Samples]
) -> dict[str, Any]:
    """Everything that has a value per timestep, as plain values.

    `pipeline` is what the bundle runs, and `full` (T,) says which steps were. `paths` are the
    samples (T, n, C, H, W) after each step of the variants with that many steps, full precision's
    first.
    """
    bundle, steps = pipeline.bundle, len(full)
    timesteps = pipeline.schedule.timesteps(steps)
    wanted, *made = paths.values()
    errors = {
        name: [round(float(db), 2) for db in closeness_db(path, wanted)]
        for name, path in zip(list(paths)[1:], made, strict=True)
    }
    plan = pipeline.plan(steps, cache)
    deployed = pipeline.deployed(steps, cache)
    fitted = pipeline.fitted if deployed else Fitted()
    asked = recipe_plan(bundle.manifest) if deployed else plan
    return {
        "timesteps": timesteps.tolist(),
        "slots": list(bundle.manifest.model.slots),
        "plan": None if cache == "none" else kinds(plan, asked, full),
        "closeness_db": errors,
        "forecast_error": _table(fitted.forecast),
        "reuse_error": _table(fitted.reuse),
        **_calibrated(bundle, timesteps, pipeline.schedule.timesteps(pipeline.recipe.steps)),
    }


def kinds(plan: StepPlan, asked: StepPlan, full: NDArray[np.bool_]) -> list[str]:
    """What each slot does at each step, one letter per step and one text per slot.

    `asked` is the plan before the noise guard: where it has a forecast and `plan` has none, that
    is held back. A plan with a mask computes some slots of a step and reuses the others. `full`
    (T,) are the steps that computed everything.
    """
    forecast = np.count_nonzero(plan.weights, axis=1) > 1  # (T, slots)
    held = (np.count_nonzero(asked.weights, axis=1) > 1) & ~forecast
    found = np.where(forecast, FORECAST, REUSED)
    found = np.where(held, HELD, found)
    if plan.mask is not None:
        found[plan.mask] = FULL
    found[full] = FULL
    return ["".join(column) for column in found.T]


def closeness_db(path: Samples, wanted: Samples) -> NDArray[np.float64]:
    """PSNR of the samples after each step, over the range of those wanted, (T,); at most 100."""
    axes = (1, 2, 3, 4)
    error = np.square(path.astype(np.float64) - wanted).mean(axis=axes)
    spans = np.square(wanted.max(axis=axes).astype(np.float64) - wanted.min(axis=axes))
    spans = np.maximum(spans, np.finfo(np.float32).tiny)  # of a sample that is the same all over
    found: NDArray[np.float64] = -10 * np.log10(np.maximum(error / spans, 10 ** (-PSNR_CAP / 10)))
    return found


def feature_cosine(
    pipeline: Pipeline, exact: Pipeline, labels: Sequence[int], steps: int
) -> list[float] | None:
    """Cosine of the temporal features of a target with those of another one at each step, (T,).

    It is the mean over these labels and null. None where both are of one target, or where factors
    of balancing or scales per step are folded into the features, which then do not compare.
    """
    if pipeline.target == exact.target or _balanced(pipeline.bundle):
        return None
    timesteps = pipeline.schedule.timesteps(steps)
    guided = pipeline.recipe.guidance > 1
    made, wanted = (p.features(labels, timesteps, guided)[0] for p in (pipeline, exact))
    if made.shape != wanted.shape:  # (T, U, F), and behind them a scale per layer
        return None

    def products(a: Samples, b: Samples) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.einsum("tuf,tuf->tu", a, b, dtype=np.float64)
        return found

    norms = np.sqrt(products(made, made) * products(wanted, wanted))
    cosines = products(made, wanted) / np.maximum(norms, np.finfo(np.float64).tiny)
    return [float(f"{cosine:.6g}") for cosine in cosines.mean(axis=1)]


def _balanced(bundle: Bundle) -> bool:
    """Whether channel balancing has changed the features."""
    section = bundle.manifest.quantization
    if section is None:
        return False
    found, _ = tensors.load(bundle.file(section.file), lambda name: name.startswith("balance|"))
    return bool(found)


def _table(values: NDArray[np.float32] | None) -> list[list[float]] | None:
    """A table (T, slots) with four digits, slots first."""
    if values is None:
        return None
    return [_rounded(column) for column in values.T]


def _wanted(name: str) -> bool:
    """Whether a tensor of calibration is of a layer's input, or may have a value per step."""
    of_input = name.startswith("layers|") and name.endswith(OF_INPUTS)
    return of_input or name in ("edges", "stored|module")


def _calibrated(
    bundle: Bundle, timesteps: NDArray[np.int64], own: NDArray[np.int64]
) -> dict[str, Any]:
    """How large inputs are, their scales where these differ from step to step, and the selection.

    `own` are the timesteps of calibration. A letter of the selection says whether the vectors of a
    part of the temporal features are computed by its module (m) or stored (c), one text per part.
    """
    section = bundle.manifest.quantization
    if section is None:
        return {"inputs": None, "ranges": {}, "selection": None}
    found, _ = tensors.load(bundle.file(section.file), _wanted)
    bins, own_bins = ((t[:, None] >= found["edges"]).sum(axis=1) for t in (timesteps, own))
    names = [f"layers|{layer.name}|activation" for layer in section.layers]  # as in the network
    scales = {name.split("|")[1]: found[name] for name in names if name in found}
    selection = None
    if "stored|module" in found:
        parts = found["stored|module"].astype(bool).T
        kinds_of = {True: MODULE, False: STORED}
        selection = ["".join(kinds_of[bool(module)] for module in part) for part in parts]
    return {
        "inputs": _inputs(found, scales, own, own_bins),
        "ranges": {n: _rounded(scale[bins]) for n, scale in scales.items() if scale.size > 1},
        "selection": selection,
    }


def _inputs(
    found: Tensors, scales: Tensors, timesteps: NDArray[np.int64], bins: NDArray[np.int64]
) -> dict[str, Any] | None:
    """The largest magnitude of each rounded input at each step of calibration, noisiest first.

    Beside it is the largest one that its scale can represent there. None where calibration has not
    kept them, as earlier versions did not.
    """
    peaks = {name: found.get(f"layers|{name}|peak") for name in scales}
    largest = {name: _rounded(peak) for name, peak in peaks.items() if peak is not None}
    if len(largest) < len(scales):
        return None
    representable = {}
    for name, scale in scales.items():
        top = Bits(*found[f"layers|{name}|bits"].tolist()).input_top()
        zero = found.get(f"layers|{name}|zero_point")
        limit = scale * (top if zero is None else np.maximum(top - zero, top + 1 + zero))
        representable[name] = _rounded(np.broadcast_to(limit, len(found["edges"]) + 1)[bins])
    return {"timesteps": timesteps.tolist(), "largest": largest, "representable": representable}


def _rounded(values: NDArray[np.float32]) -> list[float]:
    """Numbers with four digits."""
    return [float(f"{value:.4g}") for value in values]
