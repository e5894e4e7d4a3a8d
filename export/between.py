"""Graphs of what lies between steps, for targets whose samples and forecasts stay on a device.

On the others the host loop does it in numpy, and the graph loop inside its one graph.
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from ditcast.export.body import Builder, LoopSpec, Scope
from ditcast.export.trace import IR_VERSION, OPSET
from ditcast.sampling import Coefficients

BETWEEN = ("add", "update")
Inputs = dict[str, list[str | int]]  # shapes by name


def add_graph(spec: LoopSpec) -> ModelProto:
    """Forecasts of two full steps for one later step: part and older [N, ...] -> sum."""
    shape: list[str | int] = ["N", *spec.slot_shape]
    node = helper.make_node("Add", ["part", "older"], ["sum"], name="sum/Add")
    scope = Scope("add")
    scope.nodes.append(node)
    return _model(scope, {"part": shape, "older": shape}, {"sum": shape})


def update_graph(spec: LoopSpec, channels: int) -> ModelProto:
    """What `sampling.Advance` does at `step` []: x [n,C,H,W], output [N,C',H,W] -> after.

    `channels` is C'. Schedule and correction are inputs, of T steps, and so is the noise of
    stochastic samplers: a request may have other steps than the bundle.
    """
    build, top = Builder(spec), Scope("update")
    shape: list[str | int] = ["n", *spec.sample_shape]
    build.n = top.op("Shape", "x", end=1)
    build.halves(top)
    moved = build.moved(top, "x", "step", "output")
    top.name_it(build.corrected(top, moved, "step"), "after")
    top.initializers += build.initializers.values()
    inputs: Inputs = {"x": shape, "output": ["N", channels, *spec.sample_shape[1:]], "step": []}
    inputs |= {"guidance_scale": [], **{name: ["T"] for name in Coefficients._fields[:-1]}}
    if spec.step_noise:
        inputs |= {"k_z": ["T"], "step_noise": ["T", *shape]}
    inputs |= {name: ["T", spec.sample_shape[0], 1, 1] for name in ("gain", "offset")}
    return _model(top, inputs, {"after": shape})


def _model(scope: Scope, inputs: Inputs, outputs: Inputs) -> ModelProto:
    def info(name: str, shape: list[str | int]) -> ValueInfoProto:
        kind = TensorProto.INT64 if name == "step" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        scope.nodes,
        scope.name,
        [info(name, shape) for name, shape in inputs.items()],
        [info(name, shape) for name, shape in outputs.items()],
        scope.initializers,
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
