"""Where full steps go: the search over what only a function knows, and a fitted bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cache.fitted import recipe_plan
from ditcast.cache.taylor import placed, plan, schedule
from ditcast.calibrate import calibrate
from ditcast.calibrate.placement import LONGER, TRIES, search
from ditcast.calibrate.trajectory import follow
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel, describe
from tests.conftest import RECIPE

STEPS = 12
FITTED = RECIPE | {"steps": STEPS, "cache": "taylor", "interval": 4, "placement": "fitted"}


@given(st.sets(st.integers(1, 29), min_size=2, max_size=6), st.integers(2, 8))
def test_a_search_stays_within_its_bounds(wanted: set[int], interval: int) -> None:
    """As many full steps as before, the first in its place, no run much longer, never worse."""
    start = tuple(np.flatnonzero(schedule(30, interval)).tolist())
    tried = list[tuple[int, ...]]()

    def closeness(places: tuple[int, ...]) -> float:
        tried.append(places)
        return float(-sum(min(abs(p - w) for p in places) for w in wanted))

    found, before, after = search(start, 30, closeness)
    assert (before, after) == (closeness(start), closeness(found))
    assert after >= before
    assert len(tried) <= TRIES + 3
    assert len(set(tried)) == len(tried) - 2  # nothing twice, but for the two above
    longest = np.diff([*start, 30]).max()
    for places in tried:
        assert len(places) == len(start)
        assert (places[0], list(places)) == (0, sorted({*places}))
        assert np.diff([*places, 30]).max() <= longest + LONGER


def test_full_steps_that_pay_are_found() -> None:
    """Single moves lead there, as long as each of them wins."""
    wanted = (0, 5, 11, 17, 25)
    start = tuple(np.flatnonzero(schedule(30, 8)).tolist())  # 0 1 9 17 25

    def closeness(places: tuple[int, ...]) -> float:
        return -float(np.abs(np.subtract(places, wanted)).sum())

    assert search(start, 30, closeness)[0] == wanted


@pytest.mark.parametrize("order", [0, 1, 2])
def test_forecasts_read_as_far_back_as_their_order(order: int) -> None:
    """All of the last full steps, once there are as many; what stays the same is forecast so."""
    places = [0, 4, 5, 11, 18]
    found = placed(places, 23, 4, order)
    assert np.flatnonzero(found.full).tolist() == places
    assert found.weights.shape == (23, order + 1, 4)
    for step in sorted({*range(23)} - {*places}):
        known = min(order + 1, sum(place < step for place in places))
        assert np.count_nonzero(found.weights[step, :, 0]) == known
        np.testing.assert_allclose(found.weights[step].sum(axis=0), 1, atol=1e-5)


def test_forecasts_are_exact_for_what_is_linear_in_time() -> None:
    """Two full steps at any distance give a straight line's values behind them."""
    found = placed([0, 3, 10], 20, 1, 1)
    line = 3.0 - 0.7 * np.arange(20)
    for step, (newest, before) in {4: (3, 0), 9: (3, 0), 15: (10, 3)}.items():
        made = found.weights[step, :, 0] @ line[[newest, before]]
        assert made == pytest.approx(line[step], abs=1e-5)


def test_a_fitted_bundle_is_closer_to_uncached_samples(tmp_path: Path, tiny: LoadedModel) -> None:
    """Its manifest says where the full steps are; the same recipe gives the same ones."""
    recipe = recipes.make(FITTED)
    places = []
    for name in ("a", "b"):
        bundle = Bundle.create(tmp_path / name, describe(tiny, recipe))
        calibrate(bundle, tiny)
        assert bundle.manifest.cache is not None
        places.append(bundle.manifest.cache.places)
    assert places[0] == places[1]
    fitted, even = recipe_plan(bundle.manifest), plan(STEPS, 4, len(tiny.adapter.slots), 1)
    assert fitted.full.sum() == even.full.sum()
    labels = [1, 2, 3]
    wanted = follow(tiny, recipe, range(3), labels)
    errors = [
        float((follow(tiny, recipe, range(3), labels, plan=p) - wanted).square().mean())
        for p in (fitted, even)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cache": "fora"}, "placement: got fitted with cache fora; expected cache taylor"),
        ({"cache": "none"}, "placement: got fitted with cache none; expected cache taylor"),
        ({"trajectories": "cached"}, "trajectories: got cached with placement fitted"),
    ],
)
def test_only_a_forecast_can_be_placed(keys: dict[str, str], message: str) -> None:
    """Other policies have full steps of their own."""
    with pytest.raises(ConfigError, match=message):
        recipes.make(FITTED | keys)
