"""Insert Q/DQ nodes around the quantized layers of a graph, in the form a target runs fastest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from torch import Tensor

from ditcast.calibrate.qparams import LayerScales, QParams
from ditcast.calibrate.ranges import weight_codes
from ditcast.errors import UnsupportedError
from ditcast.export.targets import Target


def insert_qdq(
    graph: gs.Graph, qparams: QParams, target: Target, weights: Mapping[str, Tensor]
) -> None:
    """Quantize every layer of `qparams` in place: input per tensor, weight per output channel.

    `weights` maps layer names to torch weights (O, I). The bias becomes an Add of a [1,1,O]
    constant: with a one-dimensional bias ONNX Runtime fuses MatMul and Add into a float Gemm
    before it sees the Q/DQ nodes.

    Raises:
        UnsupportedError: a layer that is not one MatMul in the graph.
    """
    named = {node.name: node for node in graph.nodes}
    for layer, scales in qparams.items():
        matmul = named.get(f"{layer}/MatMul")
        if matmul is None:
            raise UnsupportedError(
                f"export: layer {layer} is no single MatMul in the graph and cannot be quantized; "
                f"add the rule {{pattern: {layer}, precision: float}} first"
            )
        matmul.inputs = [
            _activation(graph, matmul.inputs[0], layer, scales, target),
            _weight(graph, layer, scales, weights[layer]),
        ]
        _widen_bias(named.get(f"{layer}/Add"))
    graph.cleanup().toposort()


def _activation(
    graph: gs.Graph, x: gs.Variable, layer: str, scales: LayerScales, target: Target
) -> gs.Variable:
    """QuantizeLinear, DequantizeLinear of the layer's input."""
    scale = gs.Constant(f"{layer}/scale", np.array(scales.activation, np.float32))
    zero = gs.Constant(f"{layer}/zero_point", np.array(target.zero_point, target.dtype))
    codes = gs.Variable(f"{layer}/codes", dtype=target.dtype)
    restored = gs.Variable(f"{layer}/input", dtype=np.float32)
    for op, source, result in (("Quantize", x, codes), ("Dequantize", codes, restored)):
        graph.nodes.append(
            gs.Node(
                op=f"{op}Linear",
                name=f"{layer}/{op}Linear",
                inputs=[source, scale, zero],
                outputs=[result],
            )
        )
    return restored


def _weight(graph: gs.Graph, layer: str, scales: LayerScales, weight: Tensor) -> gs.Variable:
    """DequantizeLinear of the layer's integer weight, stored as (I, O)."""
    codes = weight_codes(weight, scales.weight, scales.bits).numpy().astype(np.int8)
    restored = gs.Variable(f"{layer}/weight", dtype=np.float32)
    graph.nodes.append(
        gs.Node(
            op="DequantizeLinear",
            name=f"{layer}/weight/DequantizeLinear",
            attrs={"axis": 1},
            inputs=[
                gs.Constant(f"{layer}/weight/codes", codes.T),
                gs.Constant(f"{layer}/weight/scale", scales.weight.numpy()),
            ],
            outputs=[restored],
        )
    )
    return restored


def _widen_bias(add: gs.Node | None) -> None:
    """Give the bias of an Add the shape [1,1,O]."""
    if add is None:
        return
    for i, tensor in enumerate(add.inputs):
        if isinstance(tensor, gs.Constant):
            widened = tensor.values.reshape(1, 1, -1)
            add.inputs[i] = gs.Constant(f"{tensor.name}/wide", widened)
