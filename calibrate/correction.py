"""Variance correction: the VC of Q&C (arXiv 2503.02508).

Quantization and caching together change the variance of the samples on their way. After each
step every channel is scaled around its mean: `mu + K (x - mu)`, with K and mu constants of the
bundle, so that a picture never depends on its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditcast.cache import StepPlan
from ditcast.cache.fitted import Table
from ditcast.calibrate.collect import check_finite, draw_labels
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import follow
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel
from ditcast.progress import counting, tell
from ditcast.recipe import Recipe
from ditcast.sampling import correct

GUARD = 0.3  # of the deviation of the reference: the least magnitude that is divided by
IMAGES = 64  # at most: they are sampled in one batch
LIMITS = (0.8, 1.2)  # a gain outside of them is no correction of a variance any more

Gain = Callable[[Tensor, Tensor, Tensor], Tensor]


def exact(x: Tensor, wanted: Tensor, mean: Tensor) -> Tensor:
    """The minimiser of the paper's objective, rQNSR^2 + MSE, per channel (C,).

    With d = x - mu and e = wanted - mu it is `sum w (K d - e)^2`, w = 1 + 1 / wanted^2, which
    has the minimum `K = sum w d e / sum w d^2`. Near zeros of `wanted` w would be all there is;
    there it divides by 0.3 deviations.
    """
    deviation = wanted.std(dim=(0, 2, 3), keepdim=True)
    weight = 1 + 1 / torch.maximum(wanted.square(), (GUARD * deviation).square())
    d, e = x - mean, wanted - mean
    return (weight * d * e).sum(dim=(0, 2, 3)) / (weight * d * d).sum(dim=(0, 2, 3))


def moment(x: Tensor, wanted: Tensor, mean: Tensor) -> Tensor:
    """The ratio of deviations, the paper's ideal for a Gaussian (eq. 9); (C,)."""
    del mean
    return wanted.std(dim=(0, 2, 3)) / x.std(dim=(0, 2, 3))


def printed(x: Tensor, wanted: Tensor, mean: Tensor) -> Tensor:
    """The closed form as it is printed, for study: right only for a mean of zero; (C,)."""
    d, e = x - mean, wanted - mean
    above = (d * e).sum(dim=(0, 2, 3)) + (d / wanted).sum(dim=(0, 2, 3))
    below = d.square().sum(dim=(0, 2, 3)) + (d / wanted).square().sum(dim=(0, 2, 3))
    return above / below


GAINS: dict[str, Gain] = {"exact": exact, "moment": moment, "printed": printed}


@torch.no_grad()
def fit(
    model: LoadedModel, recipe: Recipe, qparams: QParams, plan: StepPlan
) -> tuple[Table, Table]:
    """Gain and offset, (T, C) each, of the quantized and cached sampler.

    Both chains start from the same noise and see the same noise at every step, in one batch of at
    most 64 of the recipe's trajectories. Each gain is fitted to the samples that those before it
    have corrected, or it would correct them twice.

    Raises:
        ConfigError: NaN or Inf in a sample, or a gain that is no number.
    """
    adapter, wanted = model.adapter, list[Tensor]()
    count = min(recipe.samples, IMAGES)
    gains, offsets = list[Tensor](), list[Tensor]()

    def remember(step: int, x: Tensor) -> Tensor:
        check_finite(x, "the sample", step)
        wanted.append(x)
        advance()
        return x

    def learn(step: int, x: Tensor) -> Tensor:
        check_finite(x, "the sample of the quantized and cached network", step)
        advance()
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        gain = GAINS[recipe.correction](x, wanted[step], mean)
        if not bool(gain.isfinite().all()):
            raise ConfigError(
                f"correction: got {recipe.correction}, whose gain at step {step} is no number; "
                "expected exact or moment"
            )
        gains.append(gain.clamp(*LIMITS))
        offsets.append((1 - gains[-1]) * mean.flatten())
        if not torch.equal(gain, gains[-1]):
            tell(f"correction: step {step} asks for gains {_range(gain)}, cut to {LIMITS}")
        corrected: Tensor = correct(x, gains[-1], offsets[-1])
        return corrected

    labels = draw_labels(recipe, adapter.num_classes)[:count]
    with counting("fitting the correction", 2 * recipe.steps) as advance:
        follow(model, recipe, range(count), labels, correct=remember)
        with quantized(adapter, qparams):
            follow(model, recipe, range(count), labels, plan=plan, correct=learn)
    return torch.stack(gains).numpy(), torch.stack(offsets).numpy()


def _range(gain: Tensor) -> str:
    return f"{float(gain.min()):.2f} to {float(gain.max()):.2f}"
