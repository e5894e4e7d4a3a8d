"""Samplers and guidance; the authority on what a step computes is diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ditcast.errors import UnsupportedError
from ditcast.recipe import Recipe
from ditcast.sampling import (
    SAMPLERS,
    Coefficients,
    coefficients,
    draw_noise,
    guide,
    needs_noise,
    update,
)
from ditcast.schedule import PREDICTIONS, NoiseSchedule, from_config

SHAPE = (2, 3, 4, 4)
# The coefficients are float32; x0 of pure noise is multiplied by up to 158 on its way.
TOLERANCE = 2e-5
# Drawn with numpy 2.4; a picture must not change with any later version.
GOLDEN_NOISE = [[-1.256209135, 1.070684910], [-1.453019261, -1.300315499]]


def exact(oracle: Any, steps: int) -> NoiseSchedule:
    """The schedule of a diffusers scheduler, which from now on calculates in float64 too."""
    schedule = from_config(json.loads(oracle.to_json_string()))
    oracle.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
    oracle.final_alpha_cumprod = torch.tensor(schedule.final_alpha, dtype=torch.float64)
    oracle.set_timesteps(steps)
    return schedule


def rows(schedule: NoiseSchedule, sampler: str, steps: int) -> Iterator[Coefficients]:
    """The table step by step, as the loops read it."""
    for row in coefficients(schedule, sampler, steps).tolist():
        yield Coefficients(*row)


def arrays(seed: int, count: int) -> list[torch.Tensor]:
    """Normal float64 tensors of one batch."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 10), ("linspace", 7), ("trailing", 7)])
def test_ddim_steps_as_diffusers(prediction: str, clip: bool, spacing: str, steps: int) -> None:
    """Every step of a trajectory, eta 0, for each prediction, with clipping and without."""
    oracle = DDIMScheduler(
        prediction_type=prediction,
        clip_sample=clip,
        timestep_spacing=spacing,
        clip_sample_range=0.7,
    )
    schedule = exact(oracle, steps)
    for i, row in enumerate(rows(schedule, "ddim", steps)):
        x, output = arrays(i, 2)
        wanted = oracle.step(output, oracle.timesteps[i], x, eta=0.0).prev_sample
        found = update(x, output, None, row, schedule.clip)
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("variance", "spacing", "steps"),
    [
        ("fixed_small", "leading", 10),
        ("fixed_large", "leading", 10),
        ("fixed_small", "linspace", 7),  # 1000 is no multiple: each step has its own stride
        ("fixed_small", "trailing", 7),
        ("fixed_large", "trailing", 10),  # ends at timestep 99, and with noise
    ],
)
def test_ddpm_steps_as_diffusers(
    prediction: str, clip: bool, variance: str, spacing: str, steps: int
) -> None:
    """Every step of a trajectory with the same noise, each variance and prediction."""
    oracle = DDPMScheduler(
        prediction_type=prediction,
        clip_sample=clip,
        variance_type=variance,
        timestep_spacing=spacing,
    )
    schedule = exact(oracle, steps)
    for i, row in enumerate(rows(schedule, "ddpm", steps)):
        x, output = arrays(i, 2)
        (noise,) = arrays(100 + i, 1)
        generator = torch.Generator().manual_seed(100 + i)
        t = oracle.timesteps[i]
        wanted = oracle.step(output, t, x, generator=generator).prev_sample
        found = update(x, output, noise, row, schedule.clip)
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("clip", [None, 0.7])
def test_numpy_and_torch_agree_to_the_last_bit(sampler: str, clip: float | None) -> None:
    """Calibration samples in torch, the runtime in numpy: in float32 they are the same numbers."""
    x, output, noise = (a.float() for a in arrays(0, 3))
    z = noise if needs_noise(sampler) else None
    for row in rows(from_config({}), sampler, 5):
        by_torch = update(x, output, z, row, clip)
        by_numpy = update(x.numpy(), output.numpy(), None if z is None else z.numpy(), row, clip)
        assert by_numpy.dtype == np.float32
        np.testing.assert_array_equal(by_torch.numpy(), by_numpy)


@given(
    steps=st.integers(1, 60),
    spacing=st.sampled_from(["leading", "linspace"]),  # diffusers' trailing stops short of 1
    prediction=st.sampled_from(PREDICTIONS),
    x0=st.floats(-1, 1),
    noise=st.floats(-3, 3),
)
@settings(deadline=None, max_examples=60)
def test_a_perfect_network_is_sampled_exactly(
    steps: int, spacing: str, prediction: str, x0: float, noise: float
) -> None:
    """DDIM with a network that knows the answer ends at the answer, whatever the schedule."""
    config = {"timestep_spacing": spacing, "prediction_type": prediction, "clip_sample": False}
    schedule = from_config(config)
    x = np.float64(noise)
    alphas = schedule.alpha_pairs(steps)[0]
    for alpha, row in zip(alphas, rows(schedule, "ddim", steps), strict=True):
        epsilon = (x - np.sqrt(alpha) * x0) / np.sqrt(1 - alpha)
        v = np.sqrt(alpha) * epsilon - np.sqrt(1 - alpha) * x0
        output = {"epsilon": epsilon, "v_prediction": v, "sample": x0}[prediction]
        x = update(x, output, None, row, None)
    assert x == pytest.approx(x0, abs=1e-4)


def test_learned_variance_is_refused_only_where_it_counts() -> None:
    """DDIM has no variance; DDPM with a learned one is not implemented."""
    schedule = from_config({"variance_type": "learned_range"})
    assert coefficients(schedule, "ddim", 4).shape == (4, 6)
    with pytest.raises(UnsupportedError, match=r"'learned_range' .* use --sampler ddim"):
        coefficients(schedule, "ddpm", 4)


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_extrapolates_from_the_null_rows(scale: float) -> None:
    """Conditional rows first, null rows second; channels beyond the sample's (variance) go."""
    output = np.random.default_rng(0).standard_normal((4, 6, 2, 2), np.float32)
    conditional, null = output[:2, :3], output[2:, :3]
    found = guide(output, 2, 3, scale)
    np.testing.assert_allclose(found, null + scale * (conditional - null), rtol=1e-6, atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_the_output_is_untouched(scale: float) -> None:
    """A scale of 1 or less runs n rows, and what comes out is the network's output exactly."""
    output = np.random.default_rng(0).standard_normal((2, 6, 2, 2), np.float32)
    np.testing.assert_array_equal(guide(output, 2, 3, scale), output[:, :3])


def test_noise_is_a_function_of_seed_and_image() -> None:
    """The same request gives the same noise, whatever the batch and the sampler."""
    found = draw_noise(3, 7, (2, 2), 0)
    np.testing.assert_allclose(found[0], GOLDEN_NOISE, rtol=1e-6)
    assert found.dtype == np.float32
    assert not np.array_equal(draw_noise(3, 8, (2, 2), 0), found)
    assert not np.array_equal(draw_noise(4, 7, (2, 2), 0), found)
    np.testing.assert_array_equal(draw_noise(3, 7, (2, 2), 5)[0], found[0])


def test_every_sampler_can_be_asked_for() -> None:
    """The recipe and the table of samplers name the same ones."""
    assert get_args(Recipe.model_fields["sampler"].annotation) == tuple(SAMPLERS)
