"""Forecasts of many later steps as one product over the slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FORECAST = "forecast"
FEW = 3  # rows up to which a sum slot by slot is faster


def multiply(model: ModelProto, slot_shape: Sequence[int]) -> ModelProto:
    """The full step with `forecast[r] = sum_k gate[r, k] * y[k]` as a product, if r are many.

    Slot by slot the sum reads and writes all R forecasts (N, S, D) at every slot, which costs more
    than half as much as an 8-bit step that it is a part of. Here the slots' outputs are stacked
    once, and every pair of sample and channel multiplies its gates (R, slots) by them
    (slots, S). That writes the stack, so that few forecasts, and none, are summed up as before. A
    forecast that is not such a sum is left as it is.
    """
    nodes = list(model.graph.node)
    makers = {name: node for node in nodes for name in node.output}
    summed, outputs = _sum(makers)
    if len(outputs) < 2:
        return model
    gates = makers[summed[-1].input[0]]  # splits (R, N, slots, D)
    inside = {node.name for node in (*summed, gates)}
    few, rows, many = (f"{FORECAST}/{name}" for name in ("few", "rows", "many"))
    product = _product(outputs, gates.input[0], slot_shape)
    found = ModelProto()
    found.CopyFrom(model)
    found.graph.initializer.append(numpy_helper.from_array(np.array([FEW]), few))
    del found.graph.node[:]
    found.graph.node.extend(node for node in nodes if node.name not in inside)
    found.graph.node.extend(
        [
            helper.make_node("Shape", [gates.input[0]], [rows], name=f"{rows}/Shape", end=1),
            helper.make_node("Greater", [rows, few], [many], name=f"{many}/Greater"),
            _if(many, [node for node in nodes if node.name in inside], product),
        ]
    )
    return found


def _sum(makers: dict[str, NodeProto]) -> tuple[list[NodeProto], list[str]]:
    """The Adds and Muls that sum the forecast up, the last one first, and the slots' outputs."""
    found, outputs, node = list[NodeProto](), list[str](), makers[FORECAST]
    while node.op_type == "Add":
        product = makers[node.input[1]]
        found += [node, product]
        outputs.insert(0, product.input[1])
        node = makers[node.input[0]]
    return [*found, node], [node.input[1], *outputs]


def _product(
    outputs: Sequence[str], gates: str, slot_shape: Sequence[int]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and constants that make forecasts (R, N, S, D) of K outputs (N, S, D) and the gates.

    Transpositions come apart by a Reshape: ONNX Runtime would join them to one that it has no
    fast way for.
    """
    tokens, width = slot_shape
    nodes: list[NodeProto] = []
    shapes: list[TensorProto] = []

    def op(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{FORECAST}/{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def reshape(tensor: str, *shape: int) -> str:
        name = f"{FORECAST}/shape_{len(shapes)}"
        shapes.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        return op("Reshape", tensor, name)

    stack = op("Transpose", op("Concat", *outputs, axis=1), perm=[0, 2, 1])
    stack = reshape(stack, 0, width, len(outputs), tokens)  # (N, D, K, S)
    factors = reshape(op("Transpose", gates, perm=[1, 0, 2, 3]), 0, -1, width)
    factors = op("Transpose", factors, perm=[0, 2, 1])
    factors = reshape(factors, 0, width, -1, len(outputs))  # (N, D, R, K)
    made = op("Transpose", op("MatMul", factors, stack), perm=[0, 2, 3, 1])
    made = op("Transpose", reshape(made, 0, -1, tokens * width), perm=[1, 0, 2])
    reshape(made, 0, 0, tokens, width)  # (R, N, S, D)
    return nodes, shapes


def _if(
    condition: str, chain: list[NodeProto], product: tuple[list[NodeProto], list[TensorProto]]
) -> NodeProto:
    """The choice between the product and the sum."""
    bodies = []
    for name, nodes, constants in (("product", *product), ("sum", chain, [])):
        last = f"{FORECAST}/{name}"
        given = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
        body = helper.make_graph(nodes, last, [], [given], constants)
        body.node[-1].output[:] = [last]
        bodies.append(body)
    return helper.make_node(
        "If",
        [condition],
        [FORECAST],
        name=f"{FORECAST}/If",
        then_branch=bodies[0],
        else_branch=bodies[1],
    )
