"""Cache policies as pure functions. To add one: a file with `plan`, and a line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ditcast.cache import (
    deepcache,
    first_block,
    fora,
    learned,
    none,
    output,
    relational,
    stack,
    taylor,
)
from ditcast.cache.plan import StepPlan
from ditcast.errors import ConfigError
from ditcast.recipe import POWER

# name -> (steps, interval, slots, order) -> its plan
POLICIES: dict[str, Callable[[int, int, int, int], StepPlan]] = {
    "none": none.plan,
    "fora": fora.plan,
    "deepcache": deepcache.plan,
    "taylor": taylor.plan,
    "output": output.plan,
    "rfe": relational.rfe,
    "rcs": relational.rcs,
    "relational": relational.plan,
    "learned": learned.plan,
    "first-block": first_block.plan,
    "stack": stack.plan,
}

# policies whose full steps may lie anywhere: (places, steps, slots, order) -> the plan
PLACED: dict[str, Callable[[Sequence[int], int, int, int], StepPlan]] = {
    "taylor": taylor.placed,
    "output": output.placed,
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
    """Why a cache policy does nothing under a plan, or all it can; None where it chooses."""
    if policy == "none" or plan.gate is not None:
        return None
    if plan.full.all():
        return (
            f"cache {policy} never reuses: all {len(plan.full)} steps are full; "
            "take a longer interval or more steps, or cache none"
        )
    if plan.mask is not None and not plan.mask[1:].any():
        return (
            f"cache {policy} reuses every slot at every step but the first; take a smaller --reuse "
            "or a shorter interval"
        )
    return None


def idle_run(policy: str, plan: StepPlan, full: Sequence[int]) -> str | None:
    """The same of a policy that decides on the way, by the full steps of each batch that has run.

    None where it reused some of the steps that it may in some batch, or does not decide.
    """
    if plan.gate is None:
        return None
    steps, threshold = len(plan.full), f"its threshold is {plan.gate.threshold:.5g}"
    if all(count == steps for count in full):
        return f"cache {policy} never reused: all {steps} steps were full; {threshold}"
    if all(count == plan.full_steps for count in full):
        return f"cache {policy} reused every step that it may: {threshold}"
    return None


__all__ = ["PLACED", "POLICIES", "StepPlan", "idle", "idle_run", "make_plan"]
