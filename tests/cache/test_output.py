"""Plans that predict the network's output: weights of the last full steps' outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditcast import recipe as recipes
from ditcast.cache import PLACED, make_plan
from ditcast.cache.stepping import graphs, held
from ditcast.errors import ConfigError


@given(
    steps=st.integers(4, 60),
    order=st.integers(0, 4),
    coefficients=st.lists(st.floats(-1, 1), min_size=5, max_size=5),
    data=st.data(),
)
def test_polynomials_are_predicted_exactly(
    steps: int, order: int, coefficients: list[float], data: st.DataObject
) -> None:
    """Outputs that are a polynomial of the step, of as high a degree as is known, have no error."""
    plan = make_plan(
        "output", steps=steps, interval=data.draw(st.integers(1, 4)), slots=2, order=order
    )
    full = np.flatnonzero(plan.full)
    for step in np.flatnonzero(~plan.full):
        read = full[full < step][::-1][: order + 1]
        outputs = np.polyval(coefficients[: len(read)], np.array([*read, step]) / steps)
        weights = plan.weights[step, : len(read), 0].astype(np.float64)
        scale = np.abs(weights) @ np.abs(outputs[:-1]) + 1
        assert abs(weights @ outputs[:-1] - outputs[-1]) < 1e-6 * scale
        assert (plan.weights[step, len(read) :] == 0).all()
        assert (plan.weights[step, :, 0] == plan.weights[step, :, 1]).all()


def test_weights_by_hand() -> None:
    """Full steps 0, 1, 4: two lines through the last two outputs, and nothing newer to repeat."""
    plan = make_plan("output", steps=7, interval=3, slots=1, order=1)
    assert plan.full.tolist() == [True, True, False, False, True, False, False]
    assert plan.weights[2, :, 0].tolist() == [2, -1]
    assert plan.weights[3, :, 0].tolist() == [3, -2]
    np.testing.assert_allclose(plan.weights[6, :, 0], [5 / 3, -2 / 3], rtol=1e-6)
    repeated = make_plan("output", steps=7, interval=3, slots=1, order=0)
    assert (repeated.weights[~plan.full] == 1).all()


def test_nothing_runs_between_full_steps() -> None:
    """Only the full step is a graph; what is kept is no more than the outputs."""
    plan = make_plan("output", steps=50, interval=4, slots=24, order=2)
    assert plan.full_steps == make_plan("taylor", steps=50, interval=4, slots=24).full_steps == 14
    assert graphs(plan) == ("full",)
    assert held(plan, 24) == 3


@pytest.mark.parametrize("policy", PLACED)
def test_full_steps_lie_anywhere(policy: str) -> None:
    """Of policies whose full steps calibration can place."""
    plan = PLACED[policy]([0, 2, 7], 10, 3, 1)
    assert np.flatnonzero(plan.full).tolist() == [0, 2, 7]
    np.testing.assert_allclose(plan.weights[9, :, 2], [7 / 5, -2 / 5], rtol=1e-6)
    assert recipes.make({"cache": policy, "placement": "fitted"}).placement == "fitted"


@pytest.mark.parametrize(("sampler", "policy"), [("ddim", "output"), ("ddpm", "taylor")])
def test_it_is_the_default_without_fresh_noise(sampler: str, policy: str) -> None:
    """Of order 2; a recipe may name another."""
    assert (recipes.make({"sampler": sampler}).cache, recipes.make({}).order) == (policy, 2)
    assert recipes.make({"sampler": sampler, "cache": "fora"}).cache == "fora"


def test_others_are_not_placed() -> None:
    match = "placement: got fitted with cache fora; expected cache taylor or output, which forecast"
    with pytest.raises(ConfigError, match=match):
        recipes.make({"cache": "fora", "placement": "fitted"})
