"""Graph loops of plans that find their full steps, or the weights of a forecast, on the way.

A segment is one full step, then an inner `Loop` of reuse steps that goes on for as long as the
plan, and its gate, let it. What decides on a step is measured at the end of the step before.
With a gate the full steps are counted: `full_steps` is a second output of the model.
All numbers are computed in float32, operation for operation as in `ditcast.cache`.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ditcast.cache.plan import Gate
from ditcast.export.body import Builder, Carried, Scope

OUTER, INNER = "segments", "reuse_steps"
State = dict[str, str]  # what is carried -> the tensor that holds it


def deciding(build: Builder, top: Scope) -> str:
    """Build the loop; returns the samples."""
    return _Deciding(build).samples(top)


class _Deciding:
    """The pieces of one loop; `history` is how many full steps back it looks."""

    def __init__(self, build: Builder) -> None:
        self.build, self.plan, self.gate = build, build.spec.plan, build.spec.plan.gate
        self.steps, self.history = len(self.plan.full), self.plan.history
        self.slots = self.plan.weights.shape[2]
        self.keeps = self.plan.form in ("extrapolate", "relate")
        self.climbs = self.history > 1
        build.constant("told_full", self.plan.full, np.bool_)
        build.constant("steps", self.steps)
        build.constant("last_step", self.steps - 1)
        build.constant("scalar_zero", 0)
        build.constant("scalar_one", 1)
        build.constant("nothing", 0.0, np.float32)

    def samples(self, top: Scope) -> str:
        """The loop over segments."""
        start = self._start(top)
        outer, inner = Scope(OUTER), Scope(INNER)
        held = {name: f"{OUTER}/{name}" for name in start}
        kept = self._full(outer, held)
        self.build.step(outer, held["x"], held["t"], kept.pop("output"), f"{OUTER}/x_full")
        after = held | kept | self._observed(outer, held)
        after["t"] = outer.op("Add", held["t"], "scalar_one")
        seen, going = self._look(outer, after | {"x": f"{OUTER}/x_full", "spent": "nothing"})
        entering = {"x": f"{OUTER}/x_full", "t": after["t"], **seen}
        if self.gate is not None and self.gate.every_step:
            entering["before"] = after["before"]
        left = self._reuse_steps(outer, inner, after, entering, going)
        after |= {name: left[name] for name in left if name in start}
        more = outer.op("Less", after["t"], "steps")
        carried = [self._carried(OUTER, outer, name, start[name], after[name]) for name in start]
        always = self.build.constant("always", True, np.bool_)
        last = self.build.loop(top, outer, "steps", carried, going=(always, more))
        left = dict(zip(start, last, strict=True))
        if self.gate is not None:
            top.name_it(left["known"], "full_steps")
        return left["x"]

    def _start(self, top: Scope) -> State:
        """What the first segment finds."""
        start = {"x": "noise", "t": "scalar_zero"}
        if self.climbs or self.gate is not None:
            start["known"] = "scalar_zero"
        if self.climbs:
            zeros = np.zeros((self.history, self.history))
            start["rungs"] = self.build.constant("no_rungs", zeros, np.float32)
            start["newest"] = "scalar_zero"
        if self.keeps:
            start["y"] = self._zeros(top, "y")
            start["a"] = self._zeros(top, "a")
        if self.gate is not None:
            start["before"] = self._zeros(top, "before")
            seen, _ = self._look(top, start | {"spent": "nothing"})
            start |= {name: seen[name] for name in seen if name != "spent"}
        return start

    def _full(self, scope: Scope, held: State) -> State:
        """A full step: its output, and what the reuse steps behind it read."""
        run, x, t = self.build.network, held["x"], held["t"]
        if self.plan.form == "residual":
            one_step = scope.op("Unsqueeze", t, "zero")
            ones = self.build.constant("ones_of_slots", np.ones((1, self.slots)), np.float32)
            ahead = self.build.features_of(scope, one_step, axis=1)
            found = run(scope, "full", x, t, {"ahead": ahead, "weights": ones})
            residual = scope.op("Gather", found["forecast"], "scalar_zero", axis=0)
            return {"output": found["output"], "residual": residual}
        if self.plan.form == "first-block":
            return run(scope, "rest", x, t, {"stream": held["stream"]})
        found = run(scope, "observe", x, t, {"y": held["y"], "a": held["a"]})
        return {name.removesuffix("_now"): tensor for name, tensor in found.items()}

    def _reuse(self, scope: Scope, held: State) -> str:
        """A reuse step's output."""
        run, x, t = self.build.network, held["x"], held["t"]
        if self.plan.form == "residual":
            return run(scope, "reuse", x, t, {"forecast": held["residual"]})["output"]
        if self.plan.form == "first-block":
            kept = {name: held[name] for name in ("stream", "residual")}
            return run(scope, "finish", x, t, kept)["output"]
        given = {"factors": self._factors(scope, held), "y": held["y"]}
        if self.plan.form == "relate":
            given |= {"a": held["a"], "slope": held["slope"]}
        return run(scope, self.plan.form, x, t, given)["output"]

    def _reuse_steps(
        self, outer: Scope, inner: Scope, after: State, entering: State, going: str
    ) -> State:
        """The inner loop; what it does not carry it captures from the outer body."""
        held = after | {name: f"{INNER}/{name}" for name in entering}
        self.build.step(inner, held["x"], held["t"], self._reuse(inner, held), f"{INNER}/x_reused")
        now = held | {"x": f"{INNER}/x_reused", "t": inner.op("Add", held["t"], "scalar_one")}
        if "before" in entering:
            now["before"] = self._join(inner, held)
        seen, again = self._look(inner, now)
        now |= seen
        carried = [
            self._carried(INNER, inner, name, entering[name], now[name]) for name in entering
        ]
        left = self.build.loop(outer, inner, "steps", carried, going=(going, again))
        return dict(zip(entering, left, strict=True))

    def _look(self, scope: Scope, held: State) -> tuple[State, str]:
        """What the gate sees before a step, and whether that is a reuse step."""
        step = scope.op("Min", held["t"], "last_step")
        told = scope.op("Gather", "told_full", step, axis=0)
        inside = scope.op("Less", held["t"], "steps")
        going = scope.op("And", inside, scope.op("Not", told))
        if self.gate is None:
            return {}, going
        given = {"before": held["before"], "factors": self._factors(scope, held)}
        found = self.build.network(scope, self.gate.graph, held["x"], step, given)
        drift = self._rescaled(scope, self.gate, found.pop("drift"))
        found["spent"] = scope.op("Add", held["spent"], drift) if self.gate.adds else drift
        threshold = self.build.constant("threshold", self.gate.threshold, np.float32)
        below = scope.op("Less", found["spent"], threshold)
        return found, scope.op("And", going, below)

    def _rescaled(self, scope: Scope, gate: Gate, drift: str) -> str:
        """The gate's polynomial by Horner's rule."""
        names = [
            self.build.constant(f"polynomial_{i}", value, np.float32)
            for i, value in enumerate(gate.polynomial)
        ]
        found = names[0]
        for name in names[1:]:
            found = scope.op("Add", scope.op("Mul", found, drift), name)
        return found

    def _observed(self, scope: Scope, held: State) -> State:
        """The gauges, the ladder and the count after one more full step."""
        found = {} if self.gate is None else {"before": self._join(scope, held)}
        if "known" in held:
            found["known"] = scope.op("Add", held["known"], "scalar_one")
        if not self.climbs:
            return found
        zero, last = "zero", self.build.constant("last_column", [self.history - 1])
        distance = scope.op("Sub", held["t"], held["newest"])
        distance = scope.op("Cast", distance, to=TensorProto.FLOAT)
        axis = self.build.constant("second_axis", [1])
        padding = self.build.constant("no_column", np.zeros((self.history, 1)), np.float32)
        older = scope.op("Slice", held["rungs"], zero, last, axis)
        aged = scope.op("Concat", padding, older, axis=1)
        rungs = [self.build.constant("newest_rung", np.eye(1, self.history), np.float32)]
        for i in range(self.history - 1):
            index = self.build.constant(f"row_{i}", [i])
            change = scope.op("Sub", rungs[-1], scope.op("Gather", aged, index, axis=0))
            rung = scope.op("Div", change, distance)
            known = scope.op("Less", self.build.constant(f"rung_{i}", i), held["known"])
            rungs.append(scope.op("Where", known, rung, "nothing"))
        return found | {"rungs": scope.op("Concat", *rungs, axis=0), "newest": held["t"]}

    def _factors(self, scope: Scope, held: State) -> str:
        """The ladder's weights at a step, (history,)."""
        if not self.climbs:
            return self.build.constant("hold", [1.0], np.float32)
        distance = scope.op("Sub", held["t"], held["newest"])
        distance = scope.op("Cast", distance, to=TensorProto.FLOAT)
        rungs = [
            scope.op("Gather", held["rungs"], self.build.constant(f"rung_{i}", i), axis=0)
            for i in range(self.history)
        ]
        found, power = rungs[0], self.build.constant("no_power", 1.0, np.float32)
        for i, rung in enumerate(rungs[1:], start=1):
            order = self.build.constant(f"order_{i}", float(i), np.float32)
            power = scope.op("Div", scope.op("Mul", power, distance), order)
            found = scope.op("Add", found, scope.op("Mul", power, rung))
        return str(found)

    def _join(self, scope: Scope, held: State) -> str:
        """The newest gauge in front of the older ones."""
        newest = scope.op("Unsqueeze", held["gauge"], "zero")
        if self.history == 1:
            return str(newest)
        last = self.build.constant("last_column", [self.history - 1])
        older = scope.op("Slice", held["before"], "zero", last, "zero")
        return str(scope.op("Concat", newest, older, axis=0))

    def _shape(self, name: str) -> tuple[int, list[str | int]]:
        """Type and shape of what is carried under a name."""
        slot: list[str | int] = ["N", *self.build.spec.slot_shape]
        if name in ("t", "known", "newest"):
            return TensorProto.INT64, []
        shapes: dict[str, list[str | int]] = {
            "x": ["n", *self.build.spec.sample_shape],
            "spent": [],
            "rungs": [self.history, self.history],
            "before": [self.history, *slot],
            "y": [self.history, self.slots, *slot],
            "a": [self.slots, *slot],
        }
        return TensorProto.FLOAT, shapes.get(name, slot)

    def _carried(self, body: str, scope: Scope, name: str, start: str, after: str) -> Carried:
        """One thing that a loop carries."""
        kind, shape = self._shape(name)
        scope.name_it(after, f"{body}/{name}_after")
        return Carried(f"{body}/{name}", start, f"{body}/{name}_after", shape, kind)

    def _zeros(self, scope: Scope, name: str) -> str:
        """Zeros in the shape of what is carried under a name."""
        rows = scope.op("Shape", self.build.row_index)
        sizes = [
            rows if size == "N" else self.build.constant(f"size_{size}", [size])
            for size in self._shape(name)[1]
        ]
        return str(scope.op("Expand", "nothing", scope.op("Concat", *sizes, axis=0)))
