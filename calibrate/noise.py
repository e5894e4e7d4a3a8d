"""What the noise guard decides on: the errors of a forecast and of plain reuse, of every slot."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ditcast.cache import StepPlan
from ditcast.cache.fitted import Table
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

Outputs = list[Tensor]  # of every slot, before its gate


@torch.no_grad()
def measure(
    model: LoadedModel, recipe: Recipe, qparams: QParams, plan: StepPlan
) -> tuple[Table, Table]:
    """Mean squared errors of every slot at reuse steps, (T, slots): forecast, and plain reuse.

    Both are made of the quantized network's outputs at full steps, and compared with what full
    precision computes; along trajectories of full precision.
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
    forecast = np.zeros((recipe.steps, len(adapter.slots)), np.float32)
    reuse, hold = np.zeros_like(forecast), np.eye(plan.history, dtype=np.float32)[0]
    for step in np.flatnonzero(~plan.full).tolist():
        read = [known[t] for t in range(step - 1, -1, -1) if t in known][: plan.history]
        for slot, wanted in enumerate(outputs_of(step)):
            sources = torch.stack([outputs[slot] for outputs in read])
            weights = plan.weights[step, :, slot]
            forecast[step, slot] = _error(weights, sources, wanted)
            reuse[step, slot] = _error(hold, sources, wanted)
    return forecast, reuse


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
    return float((torch.tensordot(used, sources, dims=1) - wanted).square().mean())


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
