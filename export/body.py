"""What graph loops are built of: bodies, the step graphs in them, and the sampler's arithmetic."""

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

    graphs: dict[str, ModelProto]  # `temporal` and the step graphs that the plan runs
    plan: StepPlan
    timesteps: NDArray[np.int64]  # (T,)
    table: NDArray[np.float32]  # (T, 6), columns as in `Coefficients`
    clip: float | None
    null_label: int | None
    sample_shape: tuple[int, int, int]
    slot_shape: tuple[int, ...]
    output_channels: int
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
    kind: int = TensorProto.FLOAT

    def info(self, name: str) -> onnx.ValueInfoProto:
        """Its type, under a name."""
        return helper.make_tensor_value_info(name, self.kind, self.shape)


class Scope:
    """Nodes of one graph body under construction."""

    def __init__(self, name: str) -> None:
        """An empty body."""
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []

    def name_it(self, tensor: str, name: str) -> None:
        """Give a tensor a second name, as outputs of a body need one of their own."""
        node = helper.make_node("Identity", [tensor], [name], name=f"{name}/Identity")
        self.nodes.append(node)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or a list of names."""
        number = len(self.nodes)
        names = [f"{self.name}/{kind}_{number}_{i}" for i in range(outputs)]
        node = helper.make_node(
            kind, list(inputs), names, name=f"{self.name}/{kind}_{number}", **attributes
        )
        self.nodes.append(node)
        return names[0] if outputs == 1 else names


def _renamed(node: onnx.NodeProto, names: dict[str, str], prefix: str) -> onnx.NodeProto:
    """A copy with a prefix before all names; those of its outputs are added to `names`."""
    found = onnx.NodeProto()
    found.CopyFrom(node)
    found.name = f"{prefix}/{node.name}"
    for attribute in found.attribute:
        if not attribute.HasField("g"):
            continue
        body, inner = attribute.g, dict(names)
        for tensor in body.initializer:
            inner[tensor.name] = tensor.name = f"{prefix}/{tensor.name}"
        nodes = [_renamed(child, inner, prefix) for child in body.node]
        del body.node[:]
        body.node.extend(nodes)
        for output in body.output:
            output.name = inner[output.name]
    for name in node.output:
        names[name] = f"{prefix}/{name}" if name else ""
    found.input[:] = [names[name] if name else "" for name in node.input]
    found.output[:] = [names[name] for name in node.output]
    return found


class Builder:
    """Constants of the whole model, and the pieces of its bodies."""

    def __init__(self, spec: LoopSpec) -> None:
        """Without any constants yet."""
        self.spec = spec
        self.initializers: dict[str, TensorProto] = {}
        self.scale = "guidance_scale"

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        """An initializer of the outermost graph; bodies capture it by name."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def inline(
        self, scope: Scope, model: ModelProto, prefix: str, inputs: dict[str, str]
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
        scope.nodes += [_renamed(node, names, prefix) for node in model.graph.node]
        return {output.name: names[output.name] for output in model.graph.output}

    def rows(self, scope: Scope) -> None:
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
        temporal = self.spec.graphs["temporal"]
        self.features = self.inline(scope, temporal, "temporal", names)["features"]
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
        self.halves(scope)
        self.tables()

    def halves(self, scope: Scope) -> None:
        """Where the conditional and the null rows of an output of `self.n` samples are."""
        zero, end = self.constant("zero", [0]), self.constant("end", [END])
        minus_n = scope.op("Neg", self.n)
        channels = self.constant("channels", [self.spec.sample_shape[0]])
        self.zeros = self.constant("zeros", [0, 0])
        self.axes = self.constant("axes", [0, 1])
        self.conditional_end = scope.op("Concat", self.n, channels, axis=0)
        self.null_start = scope.op("Concat", minus_n, zero, axis=0)
        self.null_end = scope.op("Concat", end, channels, axis=0)

    def tables(self) -> None:
        """Numbers of every step: the sampler's, and those of a correction."""
        spec = self.spec
        for name, column in zip(Coefficients._fields, spec.table.T, strict=True):
            self.constant(name, column, np.float32)
        for name, table in (("gain", spec.gain), ("offset", spec.offset)):
            if table is not None:
                self.constant(name, table[..., None, None], np.float32)

    def counted(self, scope: Scope, labels: str) -> str:
        """0, 1, 2 and so on, one per label."""
        first, step = self.constant("first", 0), self.constant("every", 1)
        found: str = scope.op("Range", first, scope.op("Size", labels), step)
        return found

    def features_of(self, scope: Scope, steps: str, axis: int) -> str:
        """Features of one step (N, F), or along `axis` 1 of several (R, N, F)."""
        all_rows = scope.op("Gather", self.features, steps, axis=0)
        found: str = scope.op("Gather", all_rows, self.row_index, axis=axis)
        return found

    def network(
        self, scope: Scope, kind: str, x: str, t: str, more: dict[str, str]
    ) -> dict[str, str]:
        """Run a step graph on the current sample and step."""
        features = self.features_of(scope, t, axis=0)
        names = {"features": features, **more}
        if "stream" not in names:
            names["sample"] = scope.op("Tile", x, self.repeats)
        return self.inline(scope, self.spec.graphs[kind], f"{scope.name}/{kind}", names)

    def step(self, scope: Scope, x: str, t: str, output: str, after: str) -> None:
        """Guidance, sampler update and correction, as in `ditcast.sampling`."""
        moved = self.moved(scope, x, t, output)
        if self.spec.gain is not None:
            moved = self.corrected(scope, moved, t)
        scope.name_it(moved, after)

    def moved(self, scope: Scope, x: str, t: str, output: str) -> str:
        """Guidance and sampler update, operation for operation as in `ditcast.sampling`."""
        op = scope.op
        conditional = op("Slice", output, self.zeros, self.conditional_end, self.axes)
        null = op("Slice", output, self.null_start, self.null_end, self.axes)
        scaled = op("Mul", self.scale, op("Sub", conditional, null))
        guided = op("Add", null, scaled)
        names = Coefficients._fields if self.spec.step_noise else Coefficients._fields[:-1]
        row = {name: op("Gather", name, t, axis=0) for name in names}
        x0 = op("Add", op("Mul", row["c_x"], x), op("Mul", row["c_o"], guided))
        if self.spec.clip is not None:
            low = self.constant("clip_low", -self.spec.clip, np.float32)
            x0 = op("Clip", x0, low, self.constant("clip_high", self.spec.clip, np.float32))
        moved: str = op("Add", op("Mul", row["k_0"], x0), op("Mul", row["k_x"], x))
        moved = op("Add", moved, op("Mul", row["k_o"], guided))
        if self.spec.step_noise:
            noise = op("Gather", "step_noise", t, axis=0)
            moved = op("Add", moved, op("Mul", row["k_z"], noise))
        return moved

    def corrected(self, scope: Scope, moved: str, t: str) -> str:
        """The correction, `sampling.correct`."""
        for kind, name in (("Mul", "gain"), ("Add", "offset")):
            moved = scope.op(kind, moved, scope.op("Gather", name, t, axis=0))
        return moved

    def loop(
        self,
        scope: Scope,
        body: Scope,
        trips: str,
        carried: Sequence[Carried],
        *,
        going: tuple[str, str] | None = None,
    ) -> list[str]:
        """A `Loop` node of `trips` iterations; returns what is carried as it is at the end.

        `going` are the conditions, bools [], of the first iteration and, in the body, of the next.
        """
        keep = f"{body.name}/continue"
        body.name_it(going[1] if going else f"{body.name}/condition", keep)
        iteration, condition = f"{body.name}/iteration", f"{body.name}/condition"
        graph = helper.make_graph(
            body.nodes,
            body.name,
            [
                helper.make_tensor_value_info(iteration, TensorProto.INT64, []),
                helper.make_tensor_value_info(condition, TensorProto.BOOL, []),
                *(c.info(c.name) for c in carried),
            ],
            [
                helper.make_tensor_value_info(keep, TensorProto.BOOL, []),
                *(c.info(c.after) for c in carried),
            ],
            body.initializers,
        )
        starts = [c.start for c in carried]
        always = self.constant("always", True, np.bool_) if self.spec.fixed_rows else ""
        first = going[0] if going else always
        found = scope.op("Loop", trips, first, *starts, outputs=len(carried), body=graph)
        return [found] if len(carried) == 1 else list(found)

    def sample(self, body: str, start: str, after: str) -> Carried:
        """The sample, as a loop carries it."""
        return Carried(f"{body}/x", start, after, ["n", *self.spec.sample_shape])

    def model(self, top: Scope) -> ModelProto:
        """The finished model with its inputs and outputs."""
        shape = self.spec.sample_shape
        inputs = [
            helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["n", *shape]),
            helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("guidance_scale", TensorProto.FLOAT, []),
        ]
        steps = len(self.spec.timesteps)
        if self.spec.step_noise:
            inputs.append(
                helper.make_tensor_value_info("step_noise", TensorProto.FLOAT, [steps, "n", *shape])
            )
        # An input with a default value: as a plain constant, the runtime would fold a part of the
        # temporal features at load time, with other kernels and so with other last bits.
        inputs.append(helper.make_tensor_value_info("timesteps", TensorProto.FLOAT, [steps]))
        outputs = [helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["n", *shape])]
        if self.spec.plan.gate is not None:
            outputs.append(helper.make_tensor_value_info("full_steps", TensorProto.INT64, []))
        graph = helper.make_graph(
            top.nodes,
            "sampler",
            inputs,
            outputs,
            [*self.initializers.values(), *top.initializers],
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
