"""The noise guard: forecasts where they are closer than plain reuse."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ditcast.cache import StepPlan, make_plan
from ditcast.cache.guard import guarded, held_back


def taylor(steps: int = 10, interval: int = 3, order: int = 1, slots: int = 2) -> StepPlan:
    """A plan with forecasts."""
    return make_plan("taylor", steps=steps, interval=interval, slots=slots, order=order)


def tables(plan: StepPlan, forecast: float, reuse: float) -> tuple[np.ndarray, np.ndarray]:
    """The same errors everywhere."""
    shape = (len(plan.full), plan.weights.shape[2])
    return np.full(shape, forecast, np.float32), np.full(shape, reuse, np.float32)


def test_better_forecasts_stay() -> None:
    """And where it makes no difference, too."""
    plan = taylor()
    for forecast in (0.5, 1.0):
        safe = guarded(plan, *tables(plan, forecast, 1.0))
        assert np.array_equal(safe.weights, plan.weights)
        assert held_back(plan, safe) == 0


def test_worse_forecasts_are_plain_reuse() -> None:
    plan = taylor()
    safe = guarded(plan, *tables(plan, 1.1, 1.0))
    assert (safe.weights[~plan.full, 0] == 1).all()
    assert (safe.weights[~plan.full, 1:] == 0).all()
    assert (safe.weights[plan.full] == 0).all()
    assert held_back(plan, safe) == (~plan.full).sum() * 2


def test_every_step_and_slot_decides_for_itself() -> None:
    plan = taylor(steps=5)
    assert plan.weights[2, :, 0].tolist() == [2, -1]
    assert plan.weights[3, :, 0].tolist() == [3, -2]
    forecast, reuse = tables(plan, 0.5, 1.0)
    forecast[2, 1] = 1.5
    safe = guarded(plan, forecast, reuse)
    assert safe.weights[2].T.tolist() == [[2, -1], [1, 0]]
    assert safe.weights[3].T.tolist() == [[3, -2], [3, -2]]
    assert held_back(plan, safe) == 1


def test_plain_reuse_has_nothing_to_hold_back() -> None:
    plan = make_plan("fora", steps=10, interval=3, slots=2)
    assert held_back(plan, guarded(plan, *tables(plan, 9.0, 1.0))) == 0


@given(order=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_guard_takes_the_weights_or_reuses(order: int, seed: int) -> None:
    """Per (step, slot), by the rule that its docstring gives."""
    plan, rng = taylor(20, 4, order, 3), np.random.default_rng(seed)
    forecast, reuse = rng.uniform(0, 1, (2, 20, 3)).astype(np.float32)
    safe = guarded(plan, forecast, reuse)
    for step in np.flatnonzero(~plan.full):
        for slot in range(3):
            keep = forecast[step, slot] <= reuse[step, slot]
            wanted = plan.weights[step, :, slot] if keep else np.eye(1, order + 1)[0]
            assert safe.weights[step, :, slot].tolist() == wanted.tolist()
