"""Noise schedules; the authority on what a scheduler config means is diffusers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler

from ditcast.errors import ConfigError, UnsupportedError
from ditcast.schedule import SPACINGS, from_config

KINDS = (DDIMScheduler, DDPMScheduler)


def config_of(scheduler: Any) -> dict[str, Any]:
    """The config as `save_pretrained` writes it."""
    found: dict[str, Any] = json.loads(scheduler.to_json_string())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_those_of_diffusers(kind: Any, spacing: str, offset: int) -> None:
    """Every spacing, at step counts that divide 1000 and at some that do not."""
    oracle = kind(timestep_spacing=spacing, steps_offset=offset)
    schedule = from_config(config_of(oracle))
    for steps in (1, 2, 3, 7, 20, 50, 333, 999):
        oracle.set_timesteps(steps)
        np.testing.assert_array_equal(schedule.timesteps(steps), oracle.timesteps.numpy())


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_always_fall(spacing: str) -> None:
    """For any number of steps there are that many timesteps, all different, noisiest first.

    diffusers itself makes 62 trailing timesteps for 61 steps, the last of them -1.
    """
    schedule = from_config({"timestep_spacing": spacing})
    for steps in range(1, 1001):
        found = schedule.timesteps(steps)
        assert len(found) == steps
        assert (np.diff(found) < 0).all()
        assert 0 <= found[-1] <= found[0] < 1000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_are_those_of_diffusers(kind: Any, schedule: str) -> None:
    """Equal to the accuracy of diffusers' own float32 products (about 1000 roundings)."""
    oracle = kind(beta_schedule=schedule, beta_start=0.0009, beta_end=0.013)
    found = from_config(config_of(oracle)).alphas_cumprod
    np.testing.assert_allclose(found, oracle.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-8)


def test_trained_betas_replace_a_schedule() -> None:
    """Explicit betas win over `beta_schedule`."""
    oracle = DDPMScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)
    found = from_config(config_of(oracle)).alphas_cumprod
    np.testing.assert_allclose(found, [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], rtol=1e-12)


@pytest.mark.parametrize("to_one", [True, False])
def test_final_alpha_is_that_of_diffusers(to_one: bool) -> None:
    """`set_alpha_to_one` decides where the last DDIM step ends."""
    oracle = DDIMScheduler(set_alpha_to_one=to_one)
    schedule = from_config(config_of(oracle))
    assert schedule.final_alpha == pytest.approx(float(oracle.final_alpha_cumprod), rel=1e-6)
    assert schedule.alpha_pairs(10)[1][-1] == schedule.final_alpha


@pytest.mark.parametrize(
    ("config", "clip"),
    [
        ({}, 1.0),  # the default of both diffusers classes
        ({"clip_sample": False}, None),
        ({"clip_sample_range": 2.5}, 2.5),
        ({"clip_sample": False, "clip_sample_range": 2.5}, None),
    ],
)
def test_clipping_follows_the_config(config: dict[str, Any], clip: float | None) -> None:
    """The bound of the predicted sample, or none."""
    assert from_config(config).clip == clip


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler .* expected DDPM"),
        ({"thresholding": True}, "thresholding=True is not supported"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is not supported"),
        ({"solver_order": 2}, "solver_order=2 is not supported; remove it"),
        (
            {"timestep_spacing": "karras"},
            "timestep_spacing='karras' .* leading, linspace, trailing",
        ),
        ({"prediction_type": "flow"}, "prediction_type='flow' .* epsilon, v_prediction, sample"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' .* expected linear"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000 num_train_timesteps"),
        ({"beta_start": "low"}, "a value in scheduler_config.json cannot be read .*'low'"),
        ({"steps_offset": None}, "a value in scheduler_config.json cannot be read"),
    ],
)
def test_unsupported_keys_are_errors(config: dict[str, Any], match: str) -> None:
    """A key whose effect is not implemented is never passed over in silence."""
    with pytest.raises(UnsupportedError, match=match):
        from_config(config)


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_steps_outside_the_training_range_are_errors(steps: int) -> None:
    """There are as many timesteps as the model was trained on, and at least one."""
    with pytest.raises(ConfigError, match=f"steps: got {steps}, expected 1 to 1000"):
        from_config({}).timesteps(steps)
