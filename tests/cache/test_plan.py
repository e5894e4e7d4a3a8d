"""Step plans: which steps compute, and with which weights the others predict."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditcast import recipe as recipes
from ditcast.cache import POLICIES, StepPlan, make_plan
from ditcast.cache.taylor import schedule
from ditcast.errors import ConfigError
from ditcast.recipe import Recipe


def plan_of(
    steps: int, interval: int, slots: int = 3, policy: str = "fora", order: int = 1
) -> StepPlan:
    """A plan, FORA's unless told otherwise."""
    return make_plan(policy, steps=steps, interval=interval, slots=slots, order=order)


@pytest.mark.parametrize(
    ("steps", "interval", "full_steps"),
    # The official code counts down and forces the first step (methods/caching.md, 4.1).
    [(50, 2, 26), (50, 3, 18), (50, 4, 14), (50, 5, 11), (50, 7, 8), (250, 3, 84), (50, 1, 50)],
)
def test_fora_computes_as_often_as_published(steps: int, interval: int, full_steps: int) -> None:
    """NFC of the paper's settings."""
    assert plan_of(steps, interval).full_steps == full_steps


# methods/caching.md, 4.4: ceil(T / N) full steps, counted up from the first.
DEEPCACHE = [
    (50, 2, 25),
    (50, 3, 17),
    (50, 4, 13),
    (50, 5, 10),
    (50, 7, 8),
    (20, 3, 7),
    (50, 1, 50),
]


@pytest.mark.parametrize(("steps", "interval", "full_steps"), DEEPCACHE)
@pytest.mark.parametrize("placement", ["even", "power"])
def test_deepcache_computes_as_often_as_published(
    steps: int, interval: int, full_steps: int, placement: str
) -> None:
    """In both placements; every other step repeats the newest full one's outputs."""
    plan = make_plan("deepcache", steps=steps, interval=interval, slots=2, placement=placement)
    assert plan.full_steps == full_steps
    assert plan.history == 1
    assert (plan.weights[~plan.full] == 1).all()


def test_deepcache_places_full_steps_as_published() -> None:
    """T=50, N=5: every fifth, or by powers of 1.4 around step 15 (caching.md, 4.4)."""
    even, power = (
        make_plan("deepcache", steps=50, interval=5, slots=1, placement=placement)
        for placement in ("even", "power")
    )
    assert np.flatnonzero(even.full).tolist() == list(range(0, 50, 5))
    assert np.flatnonzero(power.full).tolist() == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]


@given(steps=st.integers(1, 300), data=st.data())
def test_powers_fit_any_trajectory(steps: int, data: st.DataObject) -> None:
    """Whatever the steps: as many full ones as without a power, the first among them."""
    interval = data.draw(st.integers(1, steps))
    plan = make_plan("deepcache", steps=steps, interval=interval, slots=1, placement="power")
    assert plan.full_steps == -(-steps // interval)
    assert plan.full[0]


def test_powers_are_of_deepcache_only() -> None:
    """In Python as in a recipe."""
    match = "placement: got power with cache fora; expected cache deepcache"
    with pytest.raises(ConfigError, match=match):
        make_plan("fora", steps=6, interval=2, slots=1, placement="power")
    with pytest.raises(ConfigError, match=match):
        recipes.make({"cache": "fora", "placement": "power"})


def test_fora_counts_down() -> None:
    """T=7, N=3: full at j = 6 (the first), 6 mod 3, 3 and 0, so at steps 0, 3 and 6."""
    assert plan_of(7, 3).full.tolist() == [True, False, False, True, False, False, True]
    assert plan_of(6, 3).full.tolist() == [True, False, True, False, False, True]


def test_segments_are_full_steps_with_their_reuse_steps() -> None:
    """Starts and lengths of T=6, N=3: 1+1, 1+2 and 1 steps."""
    starts, lengths = plan_of(6, 3).segments()
    assert (starts.tolist(), lengths.tolist()) == ([0, 2, 5], [2, 3, 1])


def test_full_steps_look_ahead_to_the_reuse_steps_after_them() -> None:
    """T=6, N=3: step 0 is read once, step 2 twice, step 5 never; the rest fills up R=2."""
    plan = plan_of(6, 3, slots=2)
    assert plan.full.tolist() == [True, False, True, False, False, True]
    steps, weights = plan.ahead()
    assert steps.tolist() == [[1, 0], [1, 1], [3, 4], [3, 3], [4, 4], [5, 5]]
    used, unused = [1, 1], [0, 0]
    filling = [unused, unused]
    assert weights.tolist() == [[used, unused], filling, [used, used], filling, filling, filling]
    assert steps.dtype == np.int64
    assert weights.dtype == np.float32


def test_a_longer_history_is_read_from_further_ahead() -> None:
    """Two full steps back: step 0 is read at step 1 and, past full step 2, at steps 3 and 4."""
    full = np.array([True, False, True, False, False, True, False])
    table = np.zeros((7, 2, 2), np.float32)
    table[1] = [[1, 2], [99, 99]]  # there is only one full step to read yet
    table[3] = [[3, 4], [5, 6]]
    table[4] = [[7, 8], [9, 10]]
    table[6] = [[11, 12], [13, 14]]
    steps, weights = StepPlan(full=full, weights=table).ahead()
    assert steps.tolist() == [
        [1, 0, 3, 4],
        [1, 1, 1, 1],
        [3, 4, 6, 2],
        [3, 3, 3, 3],
        [4, 4, 4, 4],
        [6, 5, 5, 5],
        [6, 6, 6, 6],
    ]
    unused = [0, 0]
    assert weights[0].tolist() == [[1, 2], unused, [5, 6], [9, 10]]
    assert weights[2].tolist() == [[3, 4], [7, 8], [13, 14], unused]
    assert weights[5].tolist() == [[11, 12], unused, unused, unused]
    assert (weights[~full] == 0).all()


@pytest.mark.parametrize(
    "plan", [plan_of(4, 1, policy="none"), plan_of(1, 1)], ids=["no cache", "one step"]
)
def test_without_reuse_steps_there_is_nothing_ahead(plan: StepPlan) -> None:
    """R is 0."""
    steps, weights = plan.ahead()
    assert steps.shape == (len(plan.full), 0)
    assert weights.shape == (len(plan.full), 0, 3)
    assert steps.dtype == np.int64
    assert weights.dtype == np.float32


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """Any plan: full steps anywhere, any history, no weight like another and none zero."""
    full = np.array([True, *draw(st.lists(st.booleans(), max_size=30))])
    history, slots = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    weights = np.arange(1, 1 + len(full) * history * slots, dtype=np.float32)
    weights = weights.reshape(len(full), history, slots) * ~full[:, None, None]
    return StepPlan(full=full, weights=weights)


@given(plans())
def test_every_reuse_step_is_looked_ahead_to(plan: StepPlan) -> None:
    """From as many full steps as its history holds, with its own weights, and nothing more."""
    steps, weights = plan.ahead()
    total, widest = steps.shape
    assert total == len(plan.full)
    assert weights.shape == (total, widest, plan.weights.shape[2])
    reads: dict[int, dict[int, list[float]]] = {step: {} for step in range(total)}
    for t in range(total):
        used = steps[t] != t
        ahead = steps[t, used]
        assert ahead.tolist() == sorted({*ahead.tolist()})  # in order, each once
        assert (ahead > t).all()
        assert (weights[t, ~used] == 0).all()
        for later, taken in zip(ahead.tolist(), weights[t, used].tolist(), strict=True):
            reads[later][t] = taken
    for step in range(total):
        before = [t for t in range(step) if plan.full[t]][::-1][: plan.history]
        newest_first = dict(zip(before, plan.weights[step].tolist(), strict=False))
        assert reads[step] == ({} if plan.full[step] else newest_first)
    longest = plan.segments()[1].max() - 1
    assert widest == plan.history * longest  # no full step asks for more than it can have to


def test_no_cache_computes_every_step() -> None:
    """Policy none, whatever the interval, even one longer than the trajectory."""
    plan = plan_of(5, 99, policy="none")
    assert plan.full.all()
    assert plan.full_steps == 5


@given(steps=st.integers(1, 300), data=st.data(), slots=st.integers(1, 56))
def test_every_fora_plan_holds_together(steps: int, data: st.DataObject, slots: int) -> None:
    """First step full; N-1 reuse steps at most in a row; segments partition the steps."""
    interval = data.draw(st.integers(1, steps))
    plan = plan_of(steps, interval, slots)
    starts, lengths = plan.segments()
    assert plan.full[0]
    assert plan.full[-1]  # the last step, which counts most, is j = 0
    assert lengths.max() <= interval
    assert len(starts) == plan.full_steps == int(plan.full.sum())
    covered = [s for a, n in zip(starts, lengths, strict=True) for s in range(a, a + n)]
    assert covered == list(range(steps))
    assert plan.full_steps in ((steps - 1) // interval + 1, (steps - 1) // interval + 2)


@given(steps=st.integers(1, 60), data=st.data(), slots=st.integers(1, 8))
def test_reuse_steps_repeat_the_newest_outputs(steps: int, data: st.DataObject, slots: int) -> None:
    """FORA's weights: one for every slot of a reuse step, history of one full step."""
    plan = plan_of(steps, data.draw(st.integers(1, steps)), slots)
    assert plan.history == 1
    assert plan.weights.shape == (steps, 1, slots)
    assert plan.weights.dtype == np.float32
    assert (plan.weights[~plan.full] == 1).all()
    assert (plan.weights[plan.full] == 0).all()


@pytest.mark.parametrize(
    ("interval", "full_steps"),
    # methods/caching.md, 4.2: the official schedule for DiT, T=50.
    [(2, 26), (3, 18), (4, 14), (5, 11), (6, 10), (7, 8), (8, 8), (9, 7)],
)
def test_taylor_computes_as_often_as_published(interval: int, full_steps: int) -> None:
    """NFC of the paper's settings; the first two steps are full."""
    plan = plan_of(50, interval, policy="taylor")
    assert plan.full_steps == full_steps
    assert plan.full[:2].all()


@pytest.mark.parametrize(("interval", "full_steps"), [(4, 14), (5, 12), (6, 10), (9, 8)])
def test_a_longer_warm_up_is_as_published(interval: int, full_steps: int) -> None:
    """The official schedule for FLUX, T=50: the first three steps are full (caching.md, 4.2)."""
    full = schedule(50, interval, warm_up=3)
    assert full.sum() == full_steps
    assert full[:4].tolist() == [True, True, True, False]


@given(steps=st.integers(1, 40), data=st.data(), order=st.integers(0, 4), seed=st.integers(0, 99))
def test_taylor_weights_are_the_official_ladder(
    steps: int, data: st.DataObject, order: int, seed: int
) -> None:
    """Differences of outputs over distances, kept and extrapolated as the official code does."""
    plan = plan_of(steps, data.draw(st.integers(1, steps)), policy="taylor", order=order)
    outputs = np.random.default_rng(seed).normal(size=steps)
    ladder: list[float] = []
    newest, kept = 0, list[float]()
    for step in range(steps):
        if plan.full[step]:
            found = [outputs[step]]
            for before in ladder[:order]:
                found.append((found[-1] - before) / (step - newest))
            ladder, newest, kept = found, step, [outputs[step], *kept][: order + 1]
            continue
        k, factorial, wanted = step - newest, 1, 0.0
        for i, value in enumerate(ladder):
            factorial *= max(i, 1)
            wanted += k**i / factorial * value
        row = plan.weights[step, :, 0]
        assert (row[len(kept) :] == 0).all()
        found_value = float(row[: len(kept)] @ np.array(kept))
        assert found_value == pytest.approx(wanted, rel=1e-4, abs=1e-3 * float(np.abs(row).sum()))


def test_taylor_is_exact_where_outputs_are_lines() -> None:
    """Order 1, once two full steps are known; order 0 repeats the newest output."""
    line = 3.0 + 0.5 * np.arange(12)
    plan = plan_of(12, 4, policy="taylor", order=1)
    for step in np.flatnonzero(~plan.full):
        before = [t for t in range(step) if plan.full[t]][::-1][:2]
        assert float(plan.weights[step, :, 0] @ line[before]) == pytest.approx(line[step])
    held = plan_of(12, 4, policy="taylor", order=0)
    assert held.history == 1
    assert (held.weights[~held.full] == 1).all()


def test_a_plan_starts_with_a_full_step() -> None:
    """There is nothing to reuse before it; and every step has its row of weights."""
    match = (
        r"plan: got 2 steps of which the first is not full, where there is nothing to reuse; expect"
        r"ed a full first step: set its entry of full \(and of mask\) to True"
    )
    weights, full = np.ones((2, 1, 1), np.float32), np.array([True, True])
    with pytest.raises(ConfigError, match=match):
        StepPlan(full=~full, weights=weights)
    with pytest.raises(ConfigError, match=match):
        StepPlan(full=full, weights=weights, form="partial", mask=np.array([[False], [True]]))
    with pytest.raises(ConfigError, match="plan: got 0 steps of which the first is not full"):
        StepPlan(full=full[:0], weights=weights[:0])
    with pytest.raises(ConfigError, match="plan: got 3 rows of weights .* for 2 steps, expected o"):
        StepPlan(full=full, weights=np.ones((3, 1, 1), np.float32))
    with pytest.raises(ConfigError, match="plan: got 2 and 3 rows .*; give tables of the same num"):
        StepPlan(full=full, weights=weights, mask=np.ones((3, 1), bool))


@pytest.mark.parametrize(
    ("policy", "interval", "match"),
    [
        ("fora", 6, r"interval: got 6, expected at most the number of steps \(5\); take more"),
        ("fora", 0, "interval: got 0, expected at least 1"),
        ("taylor", -1, "interval: got -1, expected at least 1"),
        (
            "teacache",
            2,
            "cache: unknown policy 'teacache'; expected one of none, fora, deepcache, taylor",
        ),
    ],
)
def test_bad_requests_say_what_is_expected(policy: str, interval: int, match: str) -> None:
    """An interval that never comes round, a policy that is none."""
    with pytest.raises(ConfigError, match=match):
        plan_of(5, interval, policy=policy)


def test_every_policy_can_be_asked_for() -> None:
    """The recipe and the table of policies name the same ones."""
    assert set(get_args(Recipe.model_fields["cache"].annotation)) == set(POLICIES)
