"""The noise guard: which forecasts are worth the noise that they amplify."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ditcast.cache import StepPlan, make_plan
from ditcast.cache.guard import LIMIT, guarded, held_back


def taylor(steps: int = 10, interval: int = 3, order: int = 1, slots: int = 2) -> StepPlan:
    """A plan with forecasts."""
    return make_plan("taylor", steps=steps, interval=interval, slots=slots, order=order)


def tables(plan: StepPlan, noise: float, change: float) -> tuple[np.ndarray, np.ndarray]:
    """The same noise and change everywhere."""
    shape = (len(plan.full), plan.weights.shape[2])
    return np.full(shape, noise, np.float32), np.full(shape, change, np.float32)


def test_without_noise_every_forecast_stays() -> None:
    plan = taylor()
    safe = guarded(plan, *tables(plan, 0.0, 1e-9))
    assert np.array_equal(safe.weights, plan.weights)
    assert held_back(plan, safe) == 0


def test_what_does_not_change_is_only_reused() -> None:
    """A forecast of nothing would be noise alone."""
    plan = taylor()
    safe = guarded(plan, *tables(plan, 1e-9, 0.0))
    assert (safe.weights[~plan.full, 0] == 1).all()
    assert (safe.weights[~plan.full, 1:] == 0).all()
    assert (safe.weights[plan.full] == 0).all()
    assert held_back(plan, safe) == (~plan.full).sum() * 2


def test_the_limit_is_half_of_the_change() -> None:
    """Step 2 has weights 2 and -1, which turn noise 0.1 into 0.5; step 3, of 3 and -2, into 1.3.

    Against changes of 1.1 and 0.9 at step 2, and 2.7 and 2.5 at step 3.
    """
    plan = taylor(steps=5)
    assert plan.weights[2, :, 0].tolist() == [2, -1]
    assert plan.weights[3, :, 0].tolist() == [3, -2]
    noise, change = tables(plan, 0.1, 1.0)
    change[2], change[3] = [1.1, 0.9], [2.7, 2.5]
    safe = guarded(plan, noise, change)
    assert safe.weights[2].T.tolist() == [[2, -1], [1, 0]]
    assert safe.weights[3].T.tolist() == [[3, -2], [1, 0]]
    assert held_back(plan, safe) == 2


def test_each_source_carries_its_own_noise() -> None:
    """Only the older full step is noisy: 1 * 0.6 is more than half of 1."""
    plan = taylor(steps=5)
    noise, change = tables(plan, 0.0, 1.0)
    noise[0, 0] = 0.6
    assert guarded(plan, noise, change).weights[2].T.tolist() == [[1, 0], [2, -1]]


def test_plain_reuse_has_nothing_to_hold_back() -> None:
    plan = make_plan("fora", steps=10, interval=3, slots=2)
    assert held_back(plan, guarded(plan, *tables(plan, 9.0, 0.0))) == 0


@given(order=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_guard_takes_the_weights_or_reuses(order: int, seed: int) -> None:
    """Per (step, slot), by the rule that its docstring gives."""
    plan, rng = taylor(20, 4, order, 3), np.random.default_rng(seed)
    noise, change = rng.uniform(0, 1, (2, 20, 3)).astype(np.float32)
    safe = guarded(plan, noise, change * 20)
    for step in np.flatnonzero(~plan.full):
        sources = [t for t in range(step) if plan.full[t]][::-1][: order + 1]
        for slot in range(3):
            row = plan.weights[step, :, slot]
            pairs = zip(row.tolist(), sources, strict=False)
            carried = sum(w**2 * noise[t, slot] for w, t in pairs)
            keep = carried < LIMIT * change[step, slot] * 20
            wanted = row if keep else np.eye(1, order + 1)[0]
            assert safe.weights[step, :, slot].tolist() == wanted.tolist()
