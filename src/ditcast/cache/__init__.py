"""Cache policies as pure functions. To add one: a file with `plan`, and a line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable

from ditcast.cache import deepcache, first_block, fora, learned, none, relational, stack, taylor
from ditcast.cache.plan import StepPlan
from ditcast.errors import ConfigError
from ditcast.recipe import POWER

# name -> (steps, interval, slots, order) -> its plan
POLICIES: dict[str, Callable[[int, int, int, int], StepPlan]] = {
    "none": none.plan,
    "fora": fora.plan,
    "deepcache": deepcache.plan,
    "taylor": taylor.plan,
    "rfe": relational.rfe,
    "rcs": relational.rcs,
    "relational": relational.plan,
    "learned": learned.plan,
    "first-block": first_block.plan,
    "stack": stack.plan,
}


def make_plan(
    policy: str,
    *,
    steps: int,
    interval: int,
    slots: int,
    order: int = 1,
    placement: str = "even",
) -> StepPlan:
    """The step plan of a policy for a trajectory of `steps` steps and a model with `slots` slots.

    `placement` power is DeepCache's non-uniform one; full steps that calibration is to place start
    at equal distances.

    Raises:
        ConfigError: no such policy, an interval below 1 or longer than the trajectory, or a
            placement of another policy.
    """
    if policy not in POLICIES:
        raise ConfigError(
            f"cache: unknown policy {policy!r}; expected one of {', '.join(POLICIES)}"
        )
    if interval < 1:
        raise ConfigError(f"interval: got {interval}, expected at least 1")
    if policy != "none" and interval > steps:
        raise ConfigError(
            f"interval: got {interval}, expected at most the number of steps ({steps}); "
            "take more steps, or a bundle with a shorter interval"
        )
    if placement != POWER:
        return POLICIES[policy](steps, interval, slots, order)
    if policy != "deepcache":
        raise ConfigError(f"placement: got {POWER} with cache {policy}; expected cache deepcache")
    return deepcache.powered(steps, interval, slots, order)


def idle(policy: str, plan: StepPlan) -> str | None:
    """Why a cache policy does nothing under a plan; None where it does something."""
    if policy == "none" or plan.gate is not None or not plan.full.all():
        return None
    return (
        f"cache {policy} never reuses: all {len(plan.full)} steps are full; "
        "take a longer interval or more steps, or cache none"
    )


__all__ = ["POLICIES", "StepPlan", "idle", "make_plan"]
