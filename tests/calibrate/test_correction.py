"""Variance correction: its gains against their definitions, and what it does to a sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cache import fitted, make_plan
from ditcast.calibrate import calibrate, correction
from ditcast.calibrate.correction import GAINS, GUARD, LIMITS, exact, moment, printed
from ditcast.calibrate.qparams import QParams
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from tests.conftest import RECIPE


def latents(seed: int = 0, mean: float = 0.0) -> Tensor:
    """Some samples (n, C, H, W)."""
    return torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) + mean


def mean_of(x: Tensor) -> Tensor:
    return x.mean(dim=(0, 2, 3), keepdim=True)


def test_a_scaled_chain_gets_the_inverse_as_its_gain() -> None:
    """X = 1.15 wanted with a mean of zero: every form gives 1 / 1.15 (caching.md 1.4, i)."""
    wanted = latents()
    wanted = wanted - mean_of(wanted)
    for gain in GAINS.values():
        found = gain(1.15 * wanted, wanted, torch.zeros(1))
        torch.testing.assert_close(found, torch.full((2,), 1 / 1.15))


@pytest.mark.parametrize("kind", ["exact", "moment"])
def test_equal_chains_are_left_alone(kind: str) -> None:
    """K = 1 (ii), whatever the mean."""
    x = latents(mean=0.58)
    torch.testing.assert_close(GAINS[kind](x, x, mean_of(x)), torch.ones(2))


def test_the_moment_form_gives_the_reference_deviation() -> None:
    """Exactly (iv), and without pairs."""
    x, wanted = latents(0) * 1.1, latents(1)
    mean = mean_of(x)
    corrected = mean + moment(x, wanted, mean)[:, None, None] * (x - mean)
    torch.testing.assert_close(corrected.std(dim=(0, 2, 3)), wanted.std(dim=(0, 2, 3)))


def test_the_exact_form_is_the_minimum_of_the_objective() -> None:
    """On a grid of gains, of the weighted squared error with guarded weights, per channel."""
    wanted = latents(0, mean=0.58)
    x = 1.15 * wanted + 0.1 * latents(1)
    mean = mean_of(x)
    floor = (GUARD * wanted.std(dim=(0, 2, 3), keepdim=True)).square()
    weight = 1 + 1 / torch.maximum(wanted.square(), floor)
    grid = torch.linspace(0.5, 1.2, 1401)
    loss = [(weight * (mean + k * (x - mean) - wanted).square()).sum(dim=(0, 2, 3)) for k in grid]
    best = grid[torch.stack(loss).argmin(dim=0)]
    torch.testing.assert_close(exact(x, wanted, mean), best, rtol=0, atol=6e-4)


def test_the_printed_form_is_another_one_off_zero() -> None:
    """With a mean of 0.58 it shrinks a chain that has the right variance (caching.md 1.4)."""
    wanted = latents(mean=0.58)
    mean = mean_of(wanted)
    assert (printed(wanted, wanted, mean) < 0.9).all()
    torch.testing.assert_close(exact(wanted, wanted, mean), torch.ones(2))


def test_least_squares_shrinks_what_is_not_paired() -> None:
    """With independent errors the exact gain is below the ratio of deviations."""
    wanted = latents(0)
    x = wanted + 0.5 * latents(1)
    assert (exact(x, wanted, mean_of(x)) < moment(x, wanted, mean_of(x))).all()


def run(model: LoadedModel, **keys: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset of full precision under a recipe's plan."""
    recipe = recipes.make(RECIPE | {"correction": "exact", "samples": 16} | keys)
    plan = make_plan(
        recipe.cache, steps=recipe.steps, interval=recipe.interval, slots=len(model.adapter.slots)
    )
    return correction.fit(model, recipe, QParams(), plan)


@pytest.mark.parametrize("kind", ["exact", "moment"])
def test_full_precision_without_cache_needs_none(tiny: LoadedModel, kind: str) -> None:
    """K = 1 and no offset, to 1e-6 (iii)."""
    gain, offset = run(tiny, cache="none", correction=kind)
    assert gain.shape == offset.shape == (6, 3)
    np.testing.assert_allclose(gain, 1, atol=1e-6)
    np.testing.assert_allclose(offset, 0, atol=1e-6)


def test_a_cached_chain_gets_another_one(tiny: LoadedModel) -> None:
    """From the first reuse step on, the third here; inside the limits, the same every time."""
    gain, offset = run(tiny, steps=6, interval=2)
    assert (gain[:2] == 1).all()
    assert (gain[2:] != 1).any(axis=1).all()
    assert gain.min() >= LIMITS[0]
    assert gain.max() <= LIMITS[1]
    again = run(tiny, steps=6, interval=2)
    np.testing.assert_array_equal(again[0], gain)
    np.testing.assert_array_equal(again[1], offset)


def test_gains_out_of_range_are_cut_and_said(
    tiny: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed form would destroy the sample."""
    monkeypatch.setitem(correction.GAINS, "printed", lambda x, wanted, mean: torch.full((3,), 0.1))
    gain, _ = run(tiny, correction="printed")
    assert (gain == np.float32(0.8)).all()
    assert "correction: step 0 asks for gains 0.10 to 0.10" in capsys.readouterr().err


def test_a_bundle_keeps_what_was_fitted(tiny: LoadedModel, tmp_path: Path) -> None:
    """Both tables of the guard and both of the correction; a second run does nothing."""
    keys = {"cache": "taylor", "steps": 8, "interval": 3, "correction": "moment", "scheme": "w4a8"}
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipes.make(RECIPE | keys)))
    calibrate(bundle, tiny)
    section = bundle.manifest.cache
    assert section is not None
    assert section.corrected
    assert section.forecasts == 4 * 4  # steps 2, 3, 5, 6
    found = fitted.of_target(bundle, "onnxruntime")
    assert found.noise is not None
    assert found.change is not None
    assert found.gain is not None
    plan = found.plan(bundle.manifest)
    assert found.noise.shape == found.change.shape == (8, 4)
    assert (found.noise[plan.full] > 0).all()
    assert (found.noise[~plan.full] == 0).all()
    assert (found.change[~plan.full] > 0).all()
    assert fitted.of_target(bundle, "reference") == fitted.Fitted()
    before = bundle.manifest.digest
    calibrate(bundle, tiny)
    assert bundle.manifest.digest == before


@pytest.mark.parametrize("keys", [{"cache": "fora"}, {"guard": "off"}, {"scheme": "none"}], ids=str)
def test_nothing_is_fitted_where_nothing_is_asked_for(
    tiny: LoadedModel, tmp_path: Path, keys: dict[str, str]
) -> None:
    """Plain reuse, no guard, or no quantization."""
    values = RECIPE | {"cache": "taylor"} | keys
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipes.make(values)))
    calibrate(bundle, tiny)
    assert bundle.manifest.cache is None


def test_coarser_codes_are_noisier(tiny: LoadedModel, tmp_path: Path) -> None:
    """W4A8 against W8A8, in every slot; the change of full precision is the same."""
    tables = []
    for scheme in ("w8a8", "w4a8"):
        keys = {"cache": "taylor", "scheme": scheme}
        bundle = Bundle.create(tmp_path / scheme, describe(tiny, recipes.make(RECIPE | keys)))
        calibrate(bundle, tiny)
        tables.append(fitted.of_target(bundle, "onnxruntime"))
    fine, coarse = tables
    assert fine.noise is not None
    assert coarse.noise is not None
    used = fine.noise > 0
    assert (coarse.noise[used] > 4 * fine.noise[used]).all()
    np.testing.assert_array_equal(fine.change, coarse.change)


def test_a_correction_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="correction: got exact with scheme none and cache none"):
        recipes.make({"correction": "exact", "scheme": "none", "cache": "none"})
