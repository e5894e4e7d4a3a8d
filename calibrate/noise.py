"""What the noise guard decides on: figures of the forecasts and of plain reuse, of every slot."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ditcast.cache import StepPlan
from ditcast.cache.fitted import Table
from ditcast.cache.plan import newest
from ditcast.calibrate.collect import draw_labels
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import follow
from ditcast.models import Adapter, LoadedModel
from ditcast.recipe import Recipe
from ditcast.sampling import row_labels
from ditcast.schedule import from_config

BYTES = 1 << 31  # of the quantized network's outputs that are held for comparison
IMAGES = 16  # at most
WORTH = 0.5  # of the true change: more noise than that is not worth a forecast

Outputs = list[Tensor]  # of every slot, before its gate


@torch.no_grad()
def measure(
    model: LoadedModel, recipe: Recipe, qparams: QParams, plan: StepPlan
) -> tuple[Table, Table]:
    """What the recipe's guard compares at reuse steps: figures of forecasts, and their bounds.

    Both (T, slots); all are means of squares, along trajectories of full precision. With `error`
    they are how far the forecast and plain reuse, both made of the quantized network's outputs at
    full steps, are from what full precision computes. With `noise` they are the noise that the
    forecast amplifies, `sum_i w_i^2 n_i` for noise `n_i` of the quantized outputs that it reads,
    and half of the true change from the last full step. No paper has either.
    """
    adapter = model.adapter
    count = min(recipe.samples, IMAGES, _affordable(adapter, plan))
    labels = draw_labels(recipe, adapter.num_classes)[:count]
    samples = _samples(model, recipe, labels)
    rows = row_labels(labels, recipe.guidance, adapter.null_label)
    unique, inverse = torch.unique(torch.tensor(rows), return_inverse=True)
    timesteps = torch.from_numpy(from_config(model.scheduler).timesteps(recipe.steps)).float()

    def outputs_of(step: int) -> Outputs:
        features = adapter.temporal(timesteps[step : step + 1], unique)[0][inverse]
        nothing = torch.zeros(0, *features.shape), torch.zeros(0, len(adapter.slots))
        with _slots(adapter) as outputs:
            adapter.denoiser(samples[step], features, *nothing)
        return outputs

    with quantized(adapter, qparams):
        known = {int(step): outputs_of(int(step)) for step in np.flatnonzero(plan.full)}
    return (_noise if recipe.guard == "noise" else _errors)(plan, known, outputs_of)


def _errors(
    plan: StepPlan, known: dict[int, Outputs], exact: Callable[[int], Outputs]
) -> tuple[Table, Table]:
    """Errors of forecasts and of plain reuse.

    Quantized outputs are `known` at full steps; `exact` computes those of full precision.
    """
    forecast = np.zeros((len(plan.full), plan.weights.shape[2]), np.float32)
    reuse, hold = np.zeros_like(forecast), np.eye(plan.history, dtype=np.float32)[0]
    for step in np.flatnonzero(~plan.full).tolist():
        read = newest(plan.full, step, plan.history)
        for slot, wanted in enumerate(exact(step)):
            sources = torch.stack([known[int(t)][slot] for t in read])
            weights = plan.weights[step, :, slot]
            forecast[step, slot] = _error(weights, sources, wanted)
            reuse[step, slot] = _error(hold, sources, wanted)
    return forecast, reuse


def _noise(
    plan: StepPlan, known: dict[int, Outputs], exact: Callable[[int], Outputs]
) -> tuple[Table, Table]:
    """Noise that forecasts amplify, and half of the change that they predict."""
    amplified = np.zeros((len(plan.full), plan.weights.shape[2]), np.float32)
    change, noise = np.zeros_like(amplified), np.zeros_like(amplified)
    last: Outputs = []
    for step, full in enumerate(plan.full.tolist()):
        outputs = exact(step)
        if full:
            last = outputs
            noise[step] = [_square(a - b) for a, b in zip(known[step], last, strict=True)]
            continue
        read = newest(plan.full, step, plan.history)
        amplified[step] = (plan.weights[step, : len(read)] ** 2 * noise[read]).sum(axis=0)
        change[step] = [_square(now - before) for now, before in zip(outputs, last, strict=True)]
    return amplified, WORTH * change


def _samples(model: LoadedModel, recipe: Recipe, labels: list[int]) -> list[Tensor]:
    """What the network is given at every step of full precision: (N, C, H, W) each."""
    found: list[Tensor] = []
    hook = model.adapter.denoiser.register_forward_pre_hook(
        lambda module, args: found.append(args[0])
    )
    with contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        follow(model, recipe, range(len(labels)), labels)
    return found


def _affordable(adapter: Adapter, plan: StepPlan) -> int:
    image = 2 * 4 * math.prod(adapter.slot_shape) * len(adapter.slots)  # with its null row
    return max(1, BYTES // (image * plan.full_steps))


def _error(weights: Table, sources: Tensor, wanted: Tensor) -> float:
    """Of the weighted sum of a slot's outputs, newest first."""
    used = torch.from_numpy(weights[: len(sources)])
    return _square(torch.tensordot(used, sources, dims=1) - wanted)


def _square(values: Tensor) -> float:
    return float(values.square().mean())


@contextlib.contextmanager
def _slots(adapter: Adapter) -> Iterator[Outputs]:
    """While active, the output of every slot of a full step."""
    outputs: Outputs = []

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        del module, args
        outputs.append(output)

    modules = [adapter.denoiser.get_submodule(name) for name in adapter.slots]
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
