"""The search for a threshold, over counts that only a function knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cache.fitted import of_target
from ditcast.cache.taylor import schedule
from ditcast.calibrate import calibrate
from ditcast.calibrate.cache import check
from ditcast.calibrate.collect import draw_labels
from ditcast.calibrate.threshold import TRIES, _bisect
from ditcast.calibrate.trajectory import follow
from ditcast.errors import ConfigError
from ditcast.manifest import REFERENCE
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from tests.conftest import RECIPE
from tests.runtime.test_dynamic import marking


@given(st.floats(1e-5, 1e5), st.floats(1e-3, 1e3), st.integers(2, 49))
def test_a_threshold_is_found_wherever_it_lies(scale: float, start: float, target: int) -> None:
    """Full steps fall with the threshold, from 50 to 1, at any scale and from any start."""
    tried = list[float]()

    def count(threshold: float) -> float:
        tried.append(threshold)
        return max(1.0, 50 - 10 * float((threshold / scale) ** 0.5))

    found, full = _bisect(count, target, start)
    assert full == count(found)
    assert abs(full - target) <= 0.1
    assert len(tried) <= TRIES + 1


def test_where_no_threshold_fits_the_closest_is_taken() -> None:
    """Counts jump over the target: 20 to 10, with 14 wanted."""
    found, full = _bisect(lambda threshold: 10.0 if threshold > 0.5 else 20.0, 14, 0.1)
    assert full == 10
    assert found > 0.5


def test_a_start_that_fits_is_kept() -> None:
    """The quantized network is asked once, where full precision's threshold does for it."""
    tried = list[float]()

    def count(threshold: float) -> float:
        tried.append(threshold)
        return 14.0

    assert _bisect(count, 14, 0.37) == (0.37, 14.0)
    assert tried == [0.37]


def test_the_mean_number_of_full_steps_is_met(tiny: LoadedModel, tmp_path: Path) -> None:
    """To 0.1 on a real network, where batches are enough for the mean to move so little."""
    keys = {"cache": "first-block", "steps": 16, "interval": 4, "samples": 10, "batch": 1}
    recipe = recipes.make(RECIPE | keys | {"scheme": "none"})
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipe))
    calibrate(bundle, tiny)
    plan = of_target(bundle, REFERENCE).plan(bundle.manifest)
    counts = []
    for i, label in enumerate(draw_labels(recipe, 5)):
        full = list[bool]()
        follow(tiny, recipe, range(i, i + 1), [label], plan=plan, callback=marking(full))
        counts.append(sum(full))
    assert len({*counts}) > 1  # not all the same, so that the mean has to be looked for
    assert np.mean(counts) == pytest.approx(schedule(16, 4).sum(), abs=0.1)
    assert bundle.manifest.cache is not None
    assert bundle.manifest.cache.full_steps == pytest.approx(np.mean(counts))


@pytest.mark.parametrize("policy", ["stack", "learned"])
def test_an_interval_that_leaves_nothing_to_reuse(tiny: LoadedModel, policy: str) -> None:
    """All steps full is no policy, unless it is asked for otherwise."""
    recipe = RECIPE | {"cache": policy, "interval": 1}
    with pytest.raises(ConfigError, match=f"interval: got 1 with cache {policy}, which would make"):
        check(tiny, recipes.make(recipe))
    other = {"threshold": 0.1} if policy == "stack" else {"reuse": 0.5}
    check(tiny, recipes.make(recipe | other))
