"""Samplers as tables of coefficients over plain arrays: one arithmetic for numpy and torch.

Every sampler here is the same update with another row of numbers per step:

    x0   = clip(c_x * x + c_o * o)
    next = k_0 * x0 + k_x * x + k_o * o + k_z * z

where `x` is the current sample, `o` the (guided) network output and `z` unit noise. The
graph loop holds the same table as an initializer and the same operations in the same order,
which is what makes both loops agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditcast.errors import ConfigError, UnsupportedError
from ditcast.schedule import NoiseSchedule


class Coefficients(NamedTuple):
    """One column of the table per field, each `(T,)` float32 (or one step's scalars)."""

    c_x: Any
    c_o: Any
    k_0: Any
    k_x: Any
    k_o: Any
    k_z: Any


def needs_noise(sampler: str) -> bool:
    """Whether the sampler draws fresh noise at every step."""
    return sampler == "ddpm"


def coefficients(schedule: NoiseSchedule, sampler: str, steps: int) -> NDArray[np.float32]:
    """The table of a trajectory, `(steps, 6)` float32, columns as in `Coefficients`.

    Raises:
        UnsupportedError: a learned variance with `ddpm`.
    """
    return np.stack(SAMPLERS[sampler](schedule, steps), axis=1).astype(np.float32)


def _ddim(schedule: NoiseSchedule, steps: int) -> Coefficients:
    """DDIM (Song et al. 2020, arXiv 2010.02502), eq. 12 with eta 0."""
    now, after = schedule.alpha_pairs(steps)
    c_x, c_o, e_x, e_o = _to_x0_and_epsilon(schedule.prediction, now)
    direction = np.sqrt(1 - after)
    zero = np.zeros(steps)
    return Coefficients(c_x, c_o, np.sqrt(after), direction * e_x, direction * e_o, zero)


def _ddpm(schedule: NoiseSchedule, steps: int) -> Coefficients:
    """DDPM (Ho et al. 2020, arXiv 2006.11239), Algorithm 2, posterior mean of eq. 7."""
    now, _ = schedule.alpha_pairs(steps)
    after = np.append(now[1:], 1.0)  # as diffusers, unlike DDIM: to the timestep that comes next
    c_x, c_o, _, _ = _to_x0_and_epsilon(schedule.prediction, now)
    alpha = now / after
    variance = {
        "fixed_small": (1 - after) / (1 - now) * (1 - alpha),
        "fixed_large": 1 - alpha,
    }.get(schedule.variance_type)
    if variance is None:
        raise UnsupportedError(
            f"sampler ddpm: variance_type {schedule.variance_type!r} is not supported; "
            "expected fixed_small or fixed_large, or use --sampler ddim"
        )
    k_z = np.sqrt(np.maximum(variance, 1e-20))
    k_z[schedule.timesteps(steps) == 0] = 0.0  # as diffusers: no noise at timestep 0
    k_0 = np.sqrt(after) * (1 - alpha) / (1 - now)
    k_x = np.sqrt(alpha) * (1 - after) / (1 - now)
    return Coefficients(c_x, c_o, k_0, k_x, np.zeros(steps), k_z)


SAMPLERS: dict[str, Callable[[NoiseSchedule, int], Coefficients]] = {"ddim": _ddim, "ddpm": _ddpm}


def _to_x0_and_epsilon(
    prediction: str, alpha: NDArray[np.float64]
) -> tuple[NDArray[np.float64], ...]:
    """Coefficients (c_x, c_o) of x0 and (e_x, e_o) of epsilon in terms of x and the output."""
    signal, noise = np.sqrt(alpha), np.sqrt(1 - alpha)
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "epsilon":
        return one / signal, -noise / signal, zero, one
    if prediction == "v_prediction":
        return signal, -noise, noise, signal
    return zero, one, one / noise, -signal / noise


def check_guidance(scale: float, null_label: int | None) -> None:
    """Refuse guidance of a model that knows no label to guide away from.

    Raises:
        ConfigError: a scale over 1.
    """
    if scale > 1 and null_label is None:
        raise ConfigError(
            f"guidance: got {scale}, but the model has no null label to guide away from; "
            "expected at most 1, such as --guidance 1"
        )


def with_null(labels: Sequence[int], null_label: int | None) -> list[int]:
    """The labels, and behind them the null label if there is one."""
    return [*labels] if null_label is None else [*labels, null_label]


def row_labels(labels: Sequence[int], scale: float, null_label: int | None) -> list[int]:
    """The label of every row of a batch: with guidance there are as many null rows behind.

    Raises:
        ConfigError: guidance without a null label.
    """
    check_guidance(scale, null_label)
    nulls = [] if null_label is None or scale <= 1 else [null_label] * len(labels)
    return [*labels, *nulls]


def guide(output: Any, n: int, channels: int, scale: float) -> Any:
    """Classifier-free guidance on the first `channels` channels (Ho & Salimans 2022, eq. 6).

    `output` is `(2n, C', H, W)` with conditional rows first, or `(n, ...)` without guidance,
    where both slices are the same rows and the result is the conditional output exactly.
    """
    conditional, null = output[:n, :channels], output[-n:, :channels]
    return null + np.float32(scale) * (conditional - null)


def update(x: Any, output: Any, noise: Any, row: Coefficients, clip: float | None) -> Any:
    """One sampler step on `(n, C, H, W)` arrays; `noise` is None where the sampler has none."""
    x0 = row.c_x * x + row.c_o * output
    if clip is not None:
        x0 = x0.clip(-clip, clip)
    after = row.k_0 * x0 + row.k_x * x + row.k_o * output
    return after if noise is None else after + row.k_z * noise


def correct(x: Any, gain: Any, offset: Any) -> Any:
    """Variance correction of a sample (n, C, H, W) by constants (C,) of its step."""
    return x * gain.reshape(-1, 1, 1) + offset.reshape(-1, 1, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Advance:
    """What follows each step of a request: guidance, the sampler's update, the correction.

    `table` (T, 6) is that of `coefficients`. `noise` (T, n, C, H, W) is None where the sampler has
    none, and so are `gain` and `offset` (T, C) where nothing is corrected.
    """

    guidance: float
    table: NDArray[np.float32]
    clip: float | None
    noise: Any = None
    gain: Any = None
    offset: Any = None

    def __call__(self, step: int, x: Any, output: Any) -> Any:
        """The next sample (n, C, H, W) of this one and of the network's output (N, C', H, W)."""
        output = guide(output, len(x), x.shape[1], self.guidance)
        noise = None if self.noise is None else self.noise[step]
        x = update(x, output, noise, Coefficients(*self.table[step].tolist()), self.clip)
        if self.gain is None or self.offset is None:
            return x
        return correct(x, self.gain[step], self.offset[step])


def draw_noises(
    seed: int, indices: Iterable[int], shape: tuple[int, ...], step_noises: int
) -> NDArray[Any]:
    """That of several images as a batch, `(1 + step_noises, n, *shape)`; see `draw_noise`."""
    return np.stack([draw_noise(seed, i, shape, step_noises) for i in indices], axis=1)


def draw_noise(seed: int, index: int, shape: tuple[int, ...], step_noises: int) -> NDArray[Any]:
    """Noise of image `index` of `seed`: `(1 + step_noises, *shape)` float32.

    Row 0 is the initial noise, the others the noise of each step. A picture depends on
    (seed, index) only, never on the batch it is sampled in.
    """
    rng = np.random.default_rng([seed, index])
    return rng.standard_normal((1 + step_noises, *shape), np.float32)
