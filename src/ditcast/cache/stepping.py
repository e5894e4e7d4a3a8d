"""The steps of one request under a plan: one algorithm for numpy sessions and torch modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ditcast.cache.ladder import Ladder
from ditcast.cache.plan import Gate, StepPlan
from ditcast.errors import ConfigError

Array = Any  # of numpy or torch


class Signature(NamedTuple):
    """Inputs and outputs of a step graph, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def names(self, slots: int) -> tuple[list[str], list[str]]:
        """Those of a network with K slots."""
        found: tuple[list[str], list[str]] = [], []
        for names, into in zip(self, found, strict=True):
            for name in names:
                stem, many, _ = name.partition("*")
                into += [f"{stem}{k}" for k in range(slots)] if many else [name]
        return found


# A name that ends in `.*` stands for K tensors, one per slot: `cache.0` and so on.
# Rows N of a batch, slots K, H full steps back. `sample` (N, C, H, W) and `features` (N, F) are of
# the step; `stream`, `gauge` and `residual` have the shape of one slot's output, (N, *slot_shape).
GRAPHS: dict[str, Signature] = {
    "full": Signature(("sample", "features", "ahead", "weights"), ("output", "forecast")),
    "reuse": Signature(("sample", "features", "forecast"), ("output",)),
    "change": Signature(("sample", "features", "before", "factors"), ("gauge", "drift")),
    "surprise": Signature(("sample", "features", "before", "factors"), ("gauge", "drift")),
    "block": Signature(("sample", "features", "before", "factors"), ("gauge", "drift", "stream")),
    "rest": Signature(("stream", "features"), ("output", "residual")),
    "finish": Signature(("stream", "features", "residual"), ("output",)),
    "observe": Signature(("sample", "features", "y", "a"), ("output", "y_now", "a_now", "slope")),
    "extrapolate": Signature(("sample", "features", "factors", "y"), ("output",)),
    "relate": Signature(("sample", "features", "factors", "y", "a", "slope"), ("output",)),
    "partial": Signature(("sample", "features", "mask", "cache.*"), ("output", "kept.*")),
}


class Request(Protocol):
    """The network on N rows of one request, at the step that was begun last.

    Outputs last until the same graph has run once more after the next time.
    """

    slots: int

    def begin(self, step: int, x: Array) -> None:
        """Take the sample and the features of a step."""
        ...

    def features(self, steps: Sequence[int]) -> Array:
        """Temporal features of several steps, (R, N, F)."""
        ...

    def run(self, graph: str, **inputs: Array) -> dict[str, Array]:
        """Run a step graph; the sample and the features of the step are given to it."""
        ...

    def array(self, values: Any) -> Array:
        """Float32 numbers, as the graphs take them."""
        ...

    def keep(self, output: Array) -> Array:
        """A copy of the network's output that lasts, where numbers are."""
        ...

    def rows(self, history: int, slots: int = 0) -> Array:
        """Zeros in the shape of one slot's output, (history, [slots,] N, *slot_shape)."""
        ...

    def join(self, newest: Array, older: Array) -> Array:
        """The newest (N, ...) in front of older ones (history, N, ...), as many as before."""
        ...

    def add(self, part: Array, older: Array) -> None:
        """Add older values to a part of an output, where that lies."""
        ...


class Stepper:
    """Decides on each step, and runs it. Subclasses say how; see `FORMS`."""

    def __init__(self, plan: StepPlan, request: Request) -> None:
        """Start a trajectory: nothing is kept from another one.

        Raises:
            ConfigError: a gate without a threshold.
        """
        self.plan, self.request = plan, request
        self.meter = None if plan.gate is None else Meter(plan, plan.gate, request)

    def run(self, step: int, x: Array) -> tuple[Array, bool]:
        """The output (N, C', H, W) on samples x (n, C, H, W), and whether the step was full.

        N is n, or 2 n with guidance: the conditional rows, then the null ones.
        """
        self.request.begin(step, x)
        full = bool(self.plan.full[step]) if self.meter is None else self.meter.decide(step)
        return (self.full(step) if full else self.reuse(step)), full

    def full(self, step: int) -> Array:
        """Compute every slot; keep what reuse steps need."""
        raise NotImplementedError

    def reuse(self, step: int) -> Array:
        """Predict every slot."""
        raise NotImplementedError

    @staticmethod
    def held(plan: StepPlan, slots: int) -> int:
        """How many tensors of a slot's output, per row of the batch, are kept."""
        del slots
        return 4 + plan.history


class Meter:
    """What a gate knows of the trajectory so far."""

    def __init__(self, plan: StepPlan, gate: Gate, request: Request) -> None:
        """Refuse a gate whose threshold has not been found.

        Raises:
            ConfigError: it has none.
        """
        if gate.threshold is None:
            raise ConfigError(
                "cache: this policy needs a threshold, and the bundle has none; compile one with "
                "it as --cache, or give --threshold"
            )
        self.plan, self.gate, self.request = plan, gate, request
        self.threshold = np.float32(gate.threshold)
        self.spent = np.float32(0)
        self.before = request.rows(gate.order + 1)
        self.ladder = Ladder(gate.order)
        self.found: dict[str, Array] = {}

    def decide(self, step: int) -> bool:
        """Whether a step is full."""
        factors = self.request.array(self.ladder.weights(step))
        self.found = self.request.run(self.gate.graph, before=self.before, factors=factors)
        full = bool(self.plan.full[step])
        if not full:  # before there is anything to compare with, a drift means nothing
            added = self.gate.rescaled(float(self.found["drift"]))
            self.spent = self.spent + added if self.gate.adds else added
            full = not self.spent < self.threshold
        if full or self.gate.every_step:
            self.before = self.request.join(self.found["gauge"], self.before)
            self.ladder.climb(step)
        if full:
            self.spent = np.float32(0)
        return full


class Forecasting(Stepper):
    """Full steps sum up what each later reuse step adds to its stream (`StepPlan.ahead`)."""

    def __init__(self, plan: StepPlan, request: Request) -> None:
        """Lay out which reuse steps each full step serves."""
        super().__init__(plan, request)
        self.steps, self.weights = plan.ahead()
        self.pending: dict[int, Array] = {}  # of each reuse step to come, what its stream takes

    def full(self, step: int) -> Array:
        """The step, and its part of the forecasts."""
        later = self.steps[step].tolist()
        ahead, weights = self.request.features(later), self.request.array(self.weights[step])
        found = self.request.run("full", ahead=ahead, weights=weights)
        for t, part in zip(later, found["forecast"], strict=True):
            if t != step:
                if t in self.pending:  # the sum moves into the newer buffer
                    self.request.add(part, self.pending[t])
                self.pending[t] = part
        return found["output"]

    def reuse(self, step: int) -> Array:
        """The stream takes the forecast in place of the slots."""
        return self.request.run("reuse", forecast=self.pending.pop(step))["output"]

    @staticmethod
    def held(plan: StepPlan, slots: int) -> int:
        """A forecast for every step ahead, in two buffers in turn."""
        del slots
        return int(plan.ahead()[0].shape[1]) * 2


class Residual(Stepper):
    """A full step's own gated outputs, summed up, are what later steps add to their stream."""

    def full(self, step: int) -> Array:
        """The step, and the residual of all blocks."""
        ones = self.request.array(np.ones((1, self.request.slots)))
        found = self.request.run("full", ahead=self.request.features([step]), weights=ones)
        self.residual = found["forecast"][0]
        return found["output"]

    def reuse(self, step: int) -> Array:
        """The stream takes the residual."""
        return self.request.run("reuse", forecast=self.residual)["output"]


class Output(Stepper):
    """A reuse step is a weighted sum of the outputs of the last full steps."""

    def __init__(self, plan: StepPlan, request: Request) -> None:
        """Nothing is kept yet."""
        super().__init__(plan, request)
        self.outputs: list[Array] = []  # the newest first

    def run(self, step: int, x: Array) -> tuple[Array, bool]:
        """As others do, but a reuse step, which runs no graph, is given no sample and features."""
        return super().run(step, x) if self.plan.full[step] else (self.reuse(step), False)

    def full(self, step: int) -> Array:
        """The step; nothing of it serves later ones but its output."""
        nothing = self.request.array(np.zeros((0, self.request.slots)))
        found = self.request.run("full", ahead=self.request.features([]), weights=nothing)
        self.outputs = [self.request.keep(found["output"]), *self.outputs][: self.plan.history]
        return found["output"]

    def reuse(self, step: int) -> Array:
        """No graph runs."""
        weights = self.request.array(self.plan.weights[step, :, 0])
        found = weights[0] * self.outputs[0]
        for weight, output in zip(weights[1:], self.outputs[1:], strict=False):
            found = found + weight * output
        return found

    @staticmethod
    def held(plan: StepPlan, slots: int) -> int:
        """Outputs of the network are at most as large as a slot's."""
        del slots
        return plan.history


class FirstBlock(Stepper):
    """The first block has run when the gate decides; its stream goes on from there."""

    def full(self, step: int) -> Array:
        """The other blocks, and their residual."""
        found = self.request.run("rest", stream=self._stream())
        self.residual = found["residual"]
        return found["output"]

    def reuse(self, step: int) -> Array:
        """The stream takes the residual of the other blocks."""
        return self.request.run("finish", stream=self._stream(), residual=self.residual)["output"]

    def _stream(self) -> Array:
        assert self.meter is not None
        return self.meter.found["stream"]


class Extrapolated(Stepper):
    """Slots are predicted one by one, by TaylorSeer's ladder over the full steps there were."""

    def __init__(self, plan: StepPlan, request: Request) -> None:
        """Room for the outputs of the last full steps, and the inputs of the last."""
        super().__init__(plan, request)
        self.ladder = Ladder(plan.history - 1)
        self.y = request.rows(plan.history, request.slots)
        self.a = request.rows(1, request.slots)[0]

    def full(self, step: int) -> Array:
        """The step; outputs and inputs of all slots are kept."""
        found = self.request.run("observe", y=self.y, a=self.a)
        self.y, self.a, self.slope = found["y_now"], found["a_now"], found["slope"]
        self.ladder.climb(step)
        return found["output"]

    def reuse(self, step: int) -> Array:
        """Every slot is extrapolated."""
        factors = self.request.array(self.ladder.weights(step))
        return self.request.run("extrapolate", factors=factors, y=self.y)["output"]

    @staticmethod
    def held(plan: StepPlan, slots: int) -> int:
        """Outputs and inputs of all slots, in two buffers in turn."""
        return 2 * slots * (plan.history + 1) + 2 * plan.history


class Relational(Extrapolated):
    """Extrapolation gives each slot's direction, its input the length (RFE)."""

    def reuse(self, step: int) -> Array:
        """Every slot is estimated from its input."""
        factors = self.request.array(self.ladder.weights(step))
        kept = {"y": self.y, "a": self.a, "slope": self.slope}
        return self.request.run("relate", factors=factors, **kept)["output"]


class Partial(Stepper):
    """Each slot is computed or not; what it gives is kept until it is computed again."""

    def __init__(self, plan: StepPlan, request: Request) -> None:
        """Nothing is kept yet: the first step computes all."""
        super().__init__(plan, request)
        nothing = request.rows(request.slots)
        self.kept = {f"cache.{k}": nothing[k] for k in range(request.slots)}

    def full(self, step: int) -> Array:
        """The slots of the step's mask."""
        assert self.plan.mask is not None
        mask = self.request.array(self.plan.mask[step])
        found = self.request.run("partial", mask=mask, **self.kept)
        self.kept = {name: found[name.replace("cache", "kept")] for name in self.kept}
        return found["output"]

    reuse = full

    @staticmethod
    def held(plan: StepPlan, slots: int) -> int:
        """The last outputs of all slots, in two buffers in turn."""
        del plan
        return 2 * slots


# form -> (its steps, the graphs that they run beside the gate's)
FORMS: dict[str, tuple[type[Stepper], tuple[str, ...]]] = {
    "forecast": (Forecasting, ("full", "reuse")),
    "residual": (Residual, ("full", "reuse")),
    "output": (Output, ("full",)),
    "first-block": (FirstBlock, ("rest", "finish")),
    "extrapolate": (Extrapolated, ("observe", "extrapolate")),
    "relate": (Relational, ("observe", "relate")),
    "partial": (Partial, ("partial",)),
}


def _form(plan: StepPlan) -> tuple[type[Stepper], tuple[str, ...]]:
    if plan.form not in FORMS:
        raise ConfigError(
            f"cache: got a plan of form {plan.form!r}, expected one of {', '.join(FORMS)}"
        )
    return FORMS[plan.form]


def stepper(plan: StepPlan, request: Request) -> Stepper:
    """The steps of a trajectory under a plan.

    Raises:
        ConfigError: a form that is not in `FORMS`, or a gate without a threshold.
    """
    return _form(plan)[0](plan, request)


def graphs(plan: StepPlan) -> tuple[str, ...]:
    """The step graphs that a plan runs, in the order of a full step.

    Raises:
        ConfigError: a form that is not in `FORMS`.
    """
    gauge = () if plan.gate is None else (plan.gate.graph,)
    return (*gauge, *_form(plan)[1])


def held(plan: StepPlan, slots: int) -> int:
    """How many tensors of a slot's output, per row of the batch, a trajectory keeps.

    Raises:
        ConfigError: a form that is not in `FORMS`.
    """
    return _form(plan)[0].held(plan, slots)
