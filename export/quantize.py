"""Insert Q/DQ nodes around the quantized layers of a graph, in the form a target runs fastest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from torch import nn

from ditcast.calibrate.qparams import LayerScales
from ditcast.errors import UnsupportedError
from ditcast.export.store import as_int4
from ditcast.export.targets import Target

INT4 = 4  # bits from which on weights are stored two to a byte


def insert_qdq(
    graph: gs.Graph,
    layers: Mapping[str, LayerScales],
    target: Target,
    linears: Mapping[str, nn.Linear],
    group: int = 0,
) -> None:
    """Quantize every layer of `layers` in place: its weight and, unless it stays float, its input.

    `linears` are the torch layers, balanced as they were traced. A layer with one input scale per
    step has been traced with its division and its row factor, and takes the scale 1. The bias
    becomes an Add of a [1,1,O] constant: with a one-dimensional bias ONNX Runtime fuses MatMul
    and Add into a float Gemm before it sees the Q/DQ nodes.

    Raises:
        UnsupportedError: a layer that is not one MatMul in the graph.
    """
    named = {node.name: node for node in graph.nodes}
    for layer, scales in layers.items():
        matmul = named.get(f"{layer}/MatMul") or _split_gemm(graph, named.get(f"{layer}/Gemm"))
        if matmul is None:
            raise UnsupportedError(
                f"export: layer {layer} is no single MatMul in the graph and cannot be quantized; "
                f"add the rule {{pattern: {layer}, precision: float}} first"
            )
        if scales.activation is not None:
            scale = 1.0 if scales.stepwise else float(scales.activation)
            matmul.inputs[0] = _activation(graph, matmul.inputs[0], layer, scale, target)
        matmul.inputs[1] = _weight(graph, layer, scales, linears[layer], group)
        _widen_bias(named.get(f"{layer}/Add"))
    graph.cleanup().toposort()


def _split_gemm(graph: gs.Graph, gemm: gs.Node | None) -> gs.Node | None:
    """The product of a Gemm as a MatMul, its bias as an Add: the exporter joins those of matrices.

    The weight stays as it is, it is about to be replaced.
    """
    if gemm is None:
        return None
    layer = gemm.name.removesuffix("/Gemm")
    (x, weight, *bias), (output,) = gemm.inputs, gemm.outputs
    gemm.inputs.clear()
    gemm.outputs.clear()
    product = gs.Variable(f"{gemm.name}/product", dtype=np.float32) if bias else output
    if bias:
        name = f"{layer}/MatMul/bias"
        graph.nodes.append(gs.Node("Add", name, inputs=[product, *bias], outputs=[output]))
    matmul = gs.Node("MatMul", f"{layer}/MatMul", inputs=[x, weight], outputs=[product])
    graph.nodes.append(matmul)
    return matmul


def _activation(
    graph: gs.Graph, x: gs.Variable, layer: str, value: float, target: Target
) -> gs.Variable:
    """QuantizeLinear, DequantizeLinear of the layer's input."""
    scale = gs.Constant(f"{layer}/scale", np.array(value, np.float32))
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


def _weight(
    graph: gs.Graph, layer: str, scales: LayerScales, linear: nn.Linear, group: int
) -> gs.Variable:
    """DequantizeLinear of the layer's integer weight, stored as (I, O).

    4-bit codes of a layer with an integer input are cast to 8 bits first: ONNX Runtime then runs
    the kernel of 8-bit weights, and the file is half the size.
    """
    found = scales.weight_codes(linear.weight.data)
    codes: gs.Tensor = gs.Constant(f"{layer}/weight/codes", found.numpy().astype(np.int8).T)
    if scales.bits.weight <= INT4:
        codes = as_int4(codes)
        if scales.activation is not None:
            wide = gs.Variable(f"{layer}/weight/wide", dtype=np.int8)
            graph.nodes.append(
                gs.Node(
                    op="Cast",
                    name=f"{layer}/weight/Cast",
                    attrs={"to": onnx.TensorProto.INT8},
                    inputs=[codes],
                    outputs=[wide],
                )
            )
            codes = wide
    restored = gs.Variable(f"{layer}/weight", dtype=np.float32)
    blocks = {"axis": 0, "block_size": group} if scales.weight.dim() > 1 else {"axis": 1}
    graph.nodes.append(
        gs.Node(
            op="DequantizeLinear",
            name=f"{layer}/weight/DequantizeLinear",
            attrs=blocks,
            inputs=[codes, gs.Constant(f"{layer}/weight/scale", scales.weight.numpy().T.copy())],
            outputs=[restored],
        )
    )
    return restored


def _widen_bias(add: gs.Node | None) -> None:
    """Give the bias of an Add the shape [1,1,O]; a matrix would get a dimension more by that."""
    if add is None or len(add.outputs[0].shape) < 3:
        return
    for i, tensor in enumerate(add.inputs):
        if isinstance(tensor, gs.Constant):
            widened = tensor.values.reshape(1, 1, -1)
            add.inputs[i] = gs.Constant(f"{tensor.name}/wide", widened)
