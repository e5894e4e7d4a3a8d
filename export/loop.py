"""The graph loop: one ONNX model that turns noise and labels into samples.

An outer `Loop` runs over segments. Each is one full step, then an inner `Loop` of reuse steps
that captures the forecasts from the outer body: a flat `Loop` with them as loop-carried state
would copy all of them at every step. What a full step sums up for the reuse steps behind later
ones is carried from segment to segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ditcast.cache import StepPlan
from ditcast.export.trace import IR_VERSION, OPSET
from ditcast.sampling import Coefficients

END = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """What the loop is built of: the step graphs and the tables of one schedule."""

    temporal: ModelProto
    full: ModelProto
    reuse: ModelProto
    plan: StepPlan
    timesteps: NDArray[np.int64]  # (T,)
    table: NDArray[np.float32]  # (T, 6), columns as in `Coefficients`
    clip: float | None
    null_label: int | None
    sample_shape: tuple[int, int, int]
    slot_shape: tuple[int, ...]
    step_noise: bool
    gain: NDArray[np.float32] | None  # (T, C), and `offset`: of the variance correction
    offset: NDArray[np.float32] | None
    # Rows that no value decides: labels are not made distinct, and null rows are always there.
    fixed_rows: bool = False


class Carried(NamedTuple):
    """What a `Loop` carries: its name in the body, at the start, and after an iteration."""

    name: str
    start: str
    after: str
    shape: list[str | int]


class _Scope:
    """Nodes of one graph body under construction."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or a list of names."""
        number = len(self.nodes)
        names = [f"{self.name}/{kind}_{number}_{i}" for i in range(outputs)]
        node = helper.make_node(
            kind, list(inputs), names, name=f"{self.name}/{kind}_{number}", **attributes
        )
        self.nodes.append(node)
        return names[0] if outputs == 1 else names


class _Builder:
    """Constants of the whole model, and the pieces of its bodies."""

    def __init__(self, spec: LoopSpec) -> None:
        self.spec = spec
        self.initializers: dict[str, TensorProto] = {}
        self.scale = "guidance_scale"

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        """An initializer of the outermost graph; bodies capture it by name."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def inline(
        self, scope: _Scope, model: ModelProto, prefix: str, inputs: dict[str, str]
    ) -> dict[str, str]:
        """Append a step graph to a body; returns its outputs by their names in the step graph.

        Its weights become initializers of that body: captured from the outermost graph, ONNX
        Runtime would leave them out of its rewrite for CPUs whose u8 x s8 products saturate.
        """
        names = dict(inputs)
        for tensor in model.graph.initializer:
            copy = TensorProto()
            copy.CopyFrom(tensor)
            copy.name = names[tensor.name] = f"{prefix}/{tensor.name}"
            scope.initializers.append(copy)
        for node in model.graph.node:
            copy_node = onnx.NodeProto()
            copy_node.CopyFrom(node)
            copy_node.name = f"{prefix}/{node.name}"
            for name in node.output:
                names[name] = f"{prefix}/{name}" if name else ""
            copy_node.input[:] = [names[name] if name else "" for name in node.input]
            copy_node.output[:] = [names[name] for name in node.output]
            scope.nodes.append(copy_node)
        return {output.name: names[output.name] for output in model.graph.output}

    def rows(self, scope: _Scope) -> None:
        """Features of all timesteps, and which row of them each sample takes.

        Labels are made distinct and sorted, so that `temporal` sees the very batch that the
        host loop gives it. Without guidance there are no null rows; without a null label there
        is no guidance, whatever its scale.
        """
        null, labels, over = self.spec.null_label, "class_labels", np.inf
        if null is not None:
            held, over = self.constant("null_label", [null]), 1.0
            labels = scope.op("Concat", labels, held, axis=0)
        if self.spec.fixed_rows:
            unique, inverse = labels, self.counted(scope, labels)
        else:
            unique, _, inverse, _ = scope.op("Unique", labels, outputs=4, sorted=1)
        timesteps = self.constant("timesteps", self.spec.timesteps, np.float32)
        names = {"timesteps": timesteps, "class_labels": unique}
        self.features = self.inline(scope, self.spec.temporal, "temporal", names)["features"]
        zero, one, end = (self.constant(n, [v]) for n, v in (("zero", 0), ("one", 1), ("end", END)))
        self.last = self.constant("last", [-1])
        self.n = scope.op("Shape", "class_labels")
        unguided = self.constant("unguided", over, np.float32)
        if self.spec.fixed_rows:
            guided = self.constant("guided", [int(null is not None)])
            if null is not None:
                self.scale = scope.op("Max", "guidance_scale", unguided)
        else:
            guided = scope.op("Greater", "guidance_scale", unguided)
            guided = scope.op("Cast", guided, to=TensorProto.INT64)
        conditional = scope.op("Slice", inverse, zero, self.n, zero)
        null_row = scope.op("Slice", inverse, self.last, end, zero)
        count = scope.op("Mul", self.n, guided)
        null_rows = scope.op("Expand", null_row, count)
        self.row_index = scope.op("Concat", conditional, null_rows, axis=0)
        ones = self.constant("ones", [1, 1, 1])
        repeats = scope.op("Add", one, guided)
        self.repeats = scope.op("Concat", repeats, ones, axis=0)
        minus_n = scope.op("Neg", self.n)
        channels = self.constant("channels", [self.spec.sample_shape[0]])
        self.zeros = self.constant("zeros", [0, 0])
        self.axes = self.constant("axes", [0, 1])
        self.conditional_end = scope.op("Concat", self.n, channels, axis=0)
        self.null_start = scope.op("Concat", minus_n, zero, axis=0)
        self.null_end = scope.op("Concat", end, channels, axis=0)
        for name, column in zip(Coefficients._fields, self.spec.table.T, strict=True):
            self.constant(name, column, np.float32)

    def counted(self, scope: _Scope, labels: str) -> str:
        """0, 1, 2 and so on, one per label."""
        first, step = self.constant("first", 0), self.constant("every", 1)
        found: str = scope.op("Range", first, scope.op("Size", labels), step)
        return found

    def features_of(self, scope: _Scope, steps: str, axis: int) -> str:
        """Features of one step (N, F), or along `axis` 1 of several (R, N, F)."""
        all_rows = scope.op("Gather", self.features, steps, axis=0)
        found: str = scope.op("Gather", all_rows, self.row_index, axis=axis)
        return found

    def network(
        self, scope: _Scope, kind: str, x: str, t: str, more: dict[str, str]
    ) -> dict[str, str]:
        """Run the full or the reuse graph on the current sample and step."""
        features = self.features_of(scope, t, axis=0)
        sample = scope.op("Tile", x, self.repeats)
        model = {"full": self.spec.full, "reuse": self.spec.reuse}[kind]
        return self.inline(scope, model, kind, {"sample": sample, "features": features, **more})

    def step(self, scope: _Scope, x: str, t: str, output: str, after: str) -> None:
        """Guidance and sampler update, operation for operation as in `ditcast.sampling`."""
        op = scope.op
        conditional = op("Slice", output, self.zeros, self.conditional_end, self.axes)
        null = op("Slice", output, self.null_start, self.null_end, self.axes)
        scaled = op("Mul", self.scale, op("Sub", conditional, null))
        guided = op("Add", null, scaled)
        row = Coefficients(*(op("Gather", name, t, axis=0) for name in Coefficients._fields))
        x0 = op("Add", op("Mul", row.c_x, x), op("Mul", row.c_o, guided))
        if self.spec.clip is not None:
            low = self.constant("clip_low", -self.spec.clip, np.float32)
            x0 = op("Clip", x0, low, self.constant("clip_high", self.spec.clip, np.float32))
        moved = op("Add", op("Mul", row.k_0, x0), op("Mul", row.k_x, x))
        moved = op("Add", moved, op("Mul", row.k_o, guided))
        if self.spec.step_noise:
            noise = op("Gather", "step_noise", t, axis=0)
            moved = op("Add", moved, op("Mul", row.k_z, noise))
        if self.spec.gain is not None and self.spec.offset is not None:
            for kind, table in (("Mul", self.spec.gain), ("Add", self.spec.offset)):
                name = self.constant(f"correction_{kind}", table[..., None, None], np.float32)
                moved = op(kind, moved, op("Gather", name, t, axis=0))
        scope.nodes.append(helper.make_node("Identity", [moved], [after], name=f"{after}/Identity"))

    def loop(
        self, scope: _Scope, body: _Scope, trips: str, carried: Sequence[Carried]
    ) -> list[str]:
        """A `Loop` node of `trips` iterations; returns what is carried as it is at the end."""
        keep = f"{body.name}/continue"
        body.nodes.append(
            helper.make_node(
                "Identity", [f"{body.name}/condition"], [keep], name=f"{keep}/Identity"
            )
        )
        graph = helper.make_graph(
            body.nodes,
            body.name,
            [
                helper.make_tensor_value_info(f"{body.name}/iteration", TensorProto.INT64, []),
                helper.make_tensor_value_info(f"{body.name}/condition", TensorProto.BOOL, []),
                *(
                    helper.make_tensor_value_info(c.name, TensorProto.FLOAT, c.shape)
                    for c in carried
                ),
            ],
            [
                helper.make_tensor_value_info(keep, TensorProto.BOOL, []),
                *(
                    helper.make_tensor_value_info(c.after, TensorProto.FLOAT, c.shape)
                    for c in carried
                ),
            ],
            body.initializers,
        )
        starts = [c.start for c in carried]
        always = self.constant("always", True, np.bool_) if self.spec.fixed_rows else ""
        found = scope.op("Loop", trips, always, *starts, outputs=len(carried), body=graph)
        return [found] if len(carried) == 1 else list(found)

    def sample(self, body: str, start: str, after: str) -> Carried:
        """The sample, as a loop carries it."""
        return Carried(f"{body}/x", start, after, ["n", *self.spec.sample_shape])

    def pending(self, scope: _Scope, rows: int) -> Carried:
        """Nothing, summed up for `rows` reuse steps behind later full steps."""
        shape = [
            self.constant(f"pending_{i}", [size])
            for i, size in enumerate((rows, *self.spec.slot_shape))
        ]
        batch = scope.op("Shape", self.row_index)
        zero = self.constant("no_forecast", 0.0, np.float32)
        start = scope.op("Expand", zero, scope.op("Concat", shape[0], batch, *shape[1:], axis=0))
        return Carried(
            "segments/pending", start, "segments/pending_after", [rows, "N", *self.spec.slot_shape]
        )

    def carry(self, scope: _Scope, forecast: str, rows: int) -> str:
        """The forecasts of this segment's reuse steps; what is for later ones is carried on.

        Both are summed up from the oldest full step to the newest, as in the host loop.
        """
        zero, end = "zero", "end"
        longest = self.constant("longest_run", [rows // (self.spec.plan.history - 1)])
        summed = scope.op("Slice", forecast, zero, self.constant("pending_rows", [rows]), zero)
        summed = scope.op("Add", "segments/pending", summed)
        newest = scope.op("Slice", forecast, self.constant("pending_rows", [rows]), end, zero)
        now = scope.op("Slice", summed, zero, longest, zero)
        later = scope.op("Slice", summed, longest, end, zero)
        scope.nodes.append(
            helper.make_node(
                "Concat",
                [later, newest],
                ["segments/pending_after"],
                name="segments/pending_after/Concat",
                axis=0,
            )
        )
        return str(now)


def sampler_graph(spec: LoopSpec) -> ModelProto:
    """Compose `sampler.onnx`: noise [n,C,H,W], class_labels [n], guidance_scale [] -> latents.

    Stochastic samplers also take step_noise [T,n,C,H,W].
    """
    build, top, outer = _Builder(spec), _Scope("loop"), _Scope("segments")
    build.rows(top)
    starts, lengths = spec.plan.segments()
    index = "segments/iteration"
    start = outer.op("Gather", build.constant("segment_starts", starts), index, axis=0)
    later, weights = spec.plan.ahead()
    later, weights = later[starts], weights[starts]
    carried = [build.sample("segments", "noise", "segments/after")]
    carried_rows = later.shape[1] - later.shape[1] // spec.plan.history
    wanted = outer.op("Gather", build.constant("ahead_steps", later), index, axis=0)
    ahead = {
        "ahead": build.features_of(outer, wanted, axis=1),
        "weights": outer.op(
            "Gather", build.constant("ahead_weights", weights, np.float32), index, axis=0
        ),
    }
    results = build.network(outer, "full", "segments/x", start, ahead)
    if spec.plan.full.all():
        build.step(outer, "segments/x", start, results["output"], "segments/after")
    else:
        forecasts = results["forecast"]
        if carried_rows:
            carried.append(build.pending(top, carried_rows))
            forecasts = build.carry(outer, forecasts, carried_rows)
        build.step(outer, "segments/x", start, results["output"], "segments/x_full")
        inner = _Scope("reuse_steps")
        one = build.constant("scalar_one", 1)
        offset = inner.op("Add", "reuse_steps/iteration", one)
        t = inner.op("Add", start, offset)
        forecast = inner.op("Gather", forecasts, "reuse_steps/iteration", axis=0)
        reused = build.network(inner, "reuse", "reuse_steps/x", t, {"forecast": forecast})
        build.step(inner, "reuse_steps/x", t, reused["output"], "reuse_steps/after")
        length = outer.op("Gather", build.constant("segment_lengths", lengths), index, axis=0)
        trips = outer.op("Sub", length, one)
        inside = [build.sample("reuse_steps", "segments/x_full", "reuse_steps/after")]
        last = build.loop(outer, inner, trips, inside)[0]
        outer.nodes.append(
            helper.make_node("Identity", [last], ["segments/after"], name="segments/after/Identity")
        )
    trips = build.constant("segments_count", len(starts))
    latents = build.loop(top, outer, trips, carried)[0]
    top.nodes.append(helper.make_node("Identity", [latents], ["latents"], name="latents/Identity"))
    return _model(build, top)


def _model(build: _Builder, top: _Scope) -> ModelProto:
    """The finished model with its inputs and output."""
    shape = build.spec.sample_shape
    inputs = [
        helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["n", *shape]),
        helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("guidance_scale", TensorProto.FLOAT, []),
    ]
    steps = len(build.spec.timesteps)
    if build.spec.step_noise:
        inputs.append(
            helper.make_tensor_value_info("step_noise", TensorProto.FLOAT, [steps, "n", *shape])
        )
    # An input with a default value: as a plain constant, the runtime would fold a part of the
    # temporal features at load time, with other kernels and so with other last bits.
    inputs.append(helper.make_tensor_value_info("timesteps", TensorProto.FLOAT, [steps]))
    outputs = [helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["n", *shape])]
    graph = helper.make_graph(
        top.nodes,
        "sampler",
        inputs,
        outputs,
        [*build.initializers.values(), *top.initializers],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
