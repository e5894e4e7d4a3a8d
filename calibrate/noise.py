"""What the noise guard decides on: quantization noise and true change of every slot's output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ditcast.cache import StepPlan
from ditcast.cache.fitted import Table
from ditcast.calibrate.collect import draw_labels
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import sample
from ditcast.models import Adapter, LoadedModel
from ditcast.recipe import Recipe
from ditcast.schedule import from_config

BYTES = 1 << 31  # of the outputs of full precision that are held for comparison
IMAGES = 16  # at most


@torch.no_grad()
def measure(
    model: LoadedModel, recipe: Recipe, qparams: QParams, plan: StepPlan
) -> tuple[Table, Table]:
    """Noise and change, (T, slots) each, along trajectories of full precision.

    Noise is the mean square of what the quantized network's slot outputs differ by on the same
    samples, at full steps. Change is that from the newest full step to each reuse step.
    """
    adapter, steps = model.adapter, recipe.steps
    count = min(recipe.samples, IMAGES, _affordable(adapter, plan))
    noise = np.zeros((steps, len(adapter.slots)), np.float32)
    change = np.zeros_like(noise)
    kept: dict[int, list[Tensor]] = {}
    inputs: dict[int, Tensor] = {}
    newest = 0

    def after(step: int) -> None:
        nonlocal newest
        if plan.full[step]:
            newest, kept[step] = step, list(outputs)
        else:
            change[step] = _mean_squares(outputs, kept[newest])
        inputs[step] = samples[0]

    labels = draw_labels(recipe, adapter.num_classes)[:count]
    with _slots(adapter) as (samples, outputs):
        sample(
            adapter,
            from_config(model.scheduler),
            sampler=recipe.sampler,
            steps=steps,
            guidance=recipe.guidance,
            seed=recipe.seed,
            indices=range(count),
            labels=labels,
            callback=after,
        )
    rows = labels + [adapter.num_classes] * (count if recipe.guidance > 1 else 0)
    unique, inverse = torch.unique(torch.tensor(rows), return_inverse=True)
    timesteps = torch.from_numpy(from_config(model.scheduler).timesteps(steps)).float()
    with quantized(adapter, qparams), _slots(adapter) as (_, outputs):
        for step, wanted in kept.items():
            features = adapter.temporal(timesteps[step : step + 1], unique)[0][inverse]
            nothing = torch.zeros(0, *features.shape), torch.zeros(0, len(adapter.slots))
            adapter.denoiser(inputs[step], features, *nothing)
            noise[step] = _mean_squares(outputs, wanted)
    return noise, change


def _affordable(adapter: Adapter, plan: StepPlan) -> int:
    tokens, width = adapter.slot_shape
    image = 2 * 4 * tokens * width * len(adapter.slots)  # with its null row
    return max(1, BYTES // (image * plan.full_steps))


def _mean_squares(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((a - b).square().mean()) for a, b in zip(found, wanted, strict=True)]


@contextlib.contextmanager
def _slots(adapter: Adapter) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """While active, the sample and the output of every slot of the newest full step."""
    samples = [torch.zeros(0)]
    outputs = [torch.zeros(0)] * len(adapter.slots)

    def keep_sample(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        samples[0] = args[0]

    def keeper(slot: int) -> torch.utils.hooks.RemovableHandle:
        def keep(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            del module, args
            outputs[slot] = output

        return adapter.denoiser.get_submodule(adapter.slots[slot]).register_forward_hook(keep)

    hooks = [keeper(slot) for slot in range(len(adapter.slots))]
    hooks.append(adapter.denoiser.register_forward_pre_hook(keep_sample))
    try:
        yield samples, outputs
    finally:
        for hook in hooks:
            hook.remove()
