"""Noise schedules: what a diffusers scheduler config says, as plain arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditcast.errors import ConfigError, UnsupportedError

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

# Keys whose other values change the arithmetic in ways that are not implemented.
FIXED = {"thresholding": (False,), "rescale_betas_zero_snr": (False,)}
# Keys that are read below, or that change nothing for the samplers offered.
KNOWN = {
    *FIXED,
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("variance_type", "clip_sample", "clip_sample_range", "prediction_type"),
    *("timestep_spacing", "steps_offset", "set_alpha_to_one"),
    *("dynamic_thresholding_ratio", "sample_max_value"),
}


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The training noise schedule and the sampling conventions of a model.

    `alphas_cumprod` is `(num_train_timesteps,)` float64; `final_alpha` is the value used
    "before" timestep 0; `clip` bounds the predicted sample, None means no clipping.
    """

    alphas_cumprod: NDArray[np.float64]
    final_alpha: float
    prediction: str
    variance_type: str
    clip: float | None
    spacing: str
    steps_offset: int

    def timesteps(self, steps: int) -> NDArray[np.int64]:
        """The timesteps of a trajectory, noisiest first, shape `(steps,)`, as diffusers has them.

        Raises:
            ConfigError: `steps` is not between 1 and the training steps.
        """
        total = len(self.alphas_cumprod)
        if not 1 <= steps <= total:
            raise ConfigError(
                f"steps: got {steps}, expected 1 to {total} (the model's training timesteps)"
            )
        if self.spacing == "linspace":
            found: NDArray[Any] = np.linspace(0, total - 1, steps).round()[::-1]
        elif self.spacing == "trailing":
            # The slice: for some numbers of steps, rounding makes `arange` one too long.
            found = np.round(np.arange(total, 0, -total / steps)[:steps]) - 1
        else:
            found = (np.arange(steps) * (total // steps))[::-1] + self.steps_offset
        clipped: NDArray[np.int64] = np.clip(found, 0, total - 1).astype(np.int64)
        return clipped

    def alpha_pairs(self, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Cumulative alphas at each timestep and at the one it steps to, each `(steps,)`."""
        now = self.timesteps(steps)
        previous = now - len(self.alphas_cumprod) // steps
        after = np.where(previous >= 0, self.alphas_cumprod[previous], self.final_alpha)
        return self.alphas_cumprod[now], after


def betas(config: Mapping[str, Any]) -> NDArray[np.float64]:
    """The training betas, `(num_train_timesteps,)`."""
    total = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        trained = np.asarray(config["trained_betas"], np.float64)
        if trained.shape != (total,):
            raise ValueError(f"{trained.size} trained_betas for {total} num_train_timesteps")
        return trained
    if kind == "linear":
        return np.linspace(first, last, total)
    if kind == "scaled_linear":
        return np.linspace(first**0.5, last**0.5, total) ** 2
    if kind == "squaredcos_cap_v2":
        bar = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        capped: NDArray[np.float64] = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        return capped
    raise UnsupportedError(
        f"scheduler: beta_schedule {kind!r} is not supported; "
        "expected linear, scaled_linear, squaredcos_cap_v2 or trained_betas"
    )


def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """Read a diffusers scheduler config.

    Raises:
        UnsupportedError: a scheduler class, key or value that is not implemented.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if name not in SCHEDULERS:
        raise UnsupportedError(
            f"scheduler: {name} is not supported; expected {' or '.join(SCHEDULERS)}"
        )
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in values.items():
        if key not in KNOWN or value not in FIXED.get(key, (value,)):
            raise UnsupportedError(
                f"scheduler: {key}={value!r} is not supported; remove it from scheduler_config.json"
                " only if the model was trained without it"
            )
    spacing = values.get("timestep_spacing", "leading")
    prediction = values.get("prediction_type", "epsilon")
    for key, got, expected in (
        ("timestep_spacing", spacing, SPACINGS),
        ("prediction_type", prediction, PREDICTIONS),
    ):
        if got not in expected:
            raise UnsupportedError(
                f"scheduler: {key}={got!r} is not supported; expected {', '.join(expected)}"
            )
    try:
        return _schedule(values, spacing, prediction)
    except (TypeError, ValueError) as err:
        raise UnsupportedError(
            f"scheduler: a value in scheduler_config.json cannot be read ({err}); "
            "save the scheduler again with save_pretrained"
        ) from err


def _schedule(values: Mapping[str, Any], spacing: str, prediction: str) -> NoiseSchedule:
    alphas = np.cumprod(1 - betas(values), dtype=np.float64)
    clip = float(values.get("clip_sample_range", 1.0)) if values.get("clip_sample", True) else None
    return NoiseSchedule(
        alphas_cumprod=alphas,
        final_alpha=1.0 if values.get("set_alpha_to_one", True) else float(alphas[0]),
        prediction=prediction,
        variance_type=values.get("variance_type", "fixed_small"),
        clip=clip,
        spacing=spacing,
        steps_offset=int(values.get("steps_offset", 0)),
    )
