"""Insert Q/DQ nodes around the quantized layers of a graph, in the form a target runs fastest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import DTypeLike, NDArray

from ditcast.calibrate.qparams import LayerScales
from ditcast.errors import UnsupportedError
from ditcast.export.convolution import Unfolding, window_matrix
from ditcast.export.store import E4M3, as_int4
from ditcast.export.targets import Target
from ditcast.export.tensorrt import INT4, block_scales
from ditcast.models.base import Layer

Codes = NDArray[Any]  # int8, or float8 e4m3


def insert_qdq(
    graph: gs.Graph,
    layers: Mapping[str, LayerScales],
    target: Target,
    originals: Mapping[str, Layer],
    group: int = 0,
) -> None:
    """Quantize every layer of `layers` in place: its weight and, unless it stays float, its input.

    `originals` are the torch layers, balanced as they were traced. A layer with one input scale
    per step has been traced with its division and its row factor, and takes the scale 1. The bias
    of a Linear becomes an Add of a [1,1,O] constant: with a one-dimensional bias ONNX Runtime
    fuses MatMul and Add into a float Gemm before it sees the Q/DQ nodes.

    Raises:
        UnsupportedError: a layer that is not one MatMul or Conv in the graph.
    """
    named = {node.name: node for node in graph.nodes}
    for layer, scales in layers.items():
        pairs = _Pairs(graph, layer, scales, target, group)
        weight = originals[layer].weight.data
        dtype = E4M3 if scales.bits.e4m3 else np.int8
        codes = scales.weight_codes(weight).numpy().astype(dtype)
        kind = "Conv" if weight.dim() == 4 else "MatMul"
        product = named.get(f"{layer}/{kind}") or _split_gemm(graph, named.get(f"{layer}/Gemm"))
        if product is None:
            raise UnsupportedError(
                f"export: layer {layer} is no single {kind} in the graph and cannot be quantized; "
                f"add the rule {{pattern: {layer}, precision: float}} first"
            )
        if kind == "Conv":
            pairs.convolution(product, codes.reshape(weight.shape))
        else:
            pairs.input_of(product)
            product.inputs[1] = pairs.matrix(codes.T)
            _widen_bias(named.get(f"{layer}/Add"))
    graph.cleanup().toposort()


class _Pairs(NamedTuple):
    """The Q/DQ nodes of one layer."""

    graph: gs.Graph
    layer: str
    scales: LayerScales
    target: Target
    group: int

    def input_of(self, product: gs.Node) -> None:
        """QuantizeLinear and DequantizeLinear of the layer's input, unless it stays in float."""
        if self.scales.activation is not None:
            codes, ends = self.codes(product.inputs[0])
            product.inputs[0] = self.node("DequantizeLinear", "input", [codes, *ends])

    def convolution(self, conv: gs.Node, kernel: Codes) -> None:
        """The same for a convolution with a kernel (O, C, kh, kw), in the form of the target."""
        if self.scales.activation is None or not self.target.unfolds:
            self.input_of(conv)
            conv.inputs[1] = self.kernel(kernel)
            return
        unfolding = Unfolding(self.graph, conv, self.layer)
        codes, ends = self.codes(conv.inputs[0])
        windows = self.node("DequantizeLinear", "input", [unfolding.windows(codes, ends[1]), *ends])
        product = self.node("MatMul", "product", [windows, self.matrix(window_matrix(kernel))])
        (output,) = conv.outputs
        conv.inputs.clear()
        conv.outputs.clear()
        unfolding.image(product, output)

    def codes(self, x: gs.Variable) -> tuple[gs.Variable, list[gs.Constant]]:
        """The codes of the layer's input, and the scale and zero point that restore it."""
        dtype = E4M3 if self.scales.bits.e4m3 else self.target.dtype
        held = self.scales.activation
        assert dtype is not None
        assert held is not None
        value = np.array(1.0 if self.scales.stepwise else float(held), np.float32)
        ends = [
            gs.Constant(f"{self.layer}/scale", value),
            gs.Constant(f"{self.layer}/zero_point", np.array(self.target.zero_point, dtype)),
        ]
        return self.node("QuantizeLinear", "codes", [x, *ends], dtype), ends

    def matrix(self, codes: Codes) -> gs.Variable:
        """A weight that is stored as (I, O), restored."""
        scale = self.scales.weight.numpy().T
        return self.weight(codes, scale, axis=1 if scale.ndim == 1 else 0)

    def kernel(self, codes: Codes) -> gs.Variable:
        """A weight that is stored as (O, C, kh, kw), restored; its groups are those of (O, I)."""
        scale = self.scales.weight.numpy()
        if scale.ndim == 1:
            return self.weight(codes, scale, axis=0)
        flat = self.weight(codes.reshape(len(codes), -1), scale, axis=1)
        shape = gs.Constant(f"{self.layer}/weight/shape", np.array(codes.shape, np.int64))
        return self.node("Reshape", "weight/kernel", [flat, shape])

    def weight(self, values: Codes, scale: NDArray[np.floating], axis: int) -> gs.Variable:
        """DequantizeLinear of the layer's weight, per channel or in groups along an axis.

        4-bit codes of a layer with an integer input are cast to 8 bits first: ONNX Runtime then
        runs the kernel of 8-bit weights, and the file is half the size. A typed target has them
        as 8 bits (convolutions), or in blocks of half precision beside float inputs.
        """
        codes: gs.Tensor = gs.Constant(f"{self.layer}/weight/codes", values)
        blocks = {"block_size": self.group} if scale.ndim > 1 else {}
        narrow, floats = self.scales.bits.weight <= INT4, self.scales.activation is None
        if narrow and self.target.typed:
            if floats:
                codes, axis = as_int4(codes), 0
                scale, blocks["block_size"] = block_scales(scale, len(values))
        elif narrow:
            codes = as_int4(codes)
            if not floats:
                wide = onnx.TensorProto.INT8
                codes = self.node("weight/Cast", "weight/wide", [codes], np.int8, to=wide)
        factor = gs.Constant(f"{self.layer}/weight/scale", scale.copy())
        return self.node(
            "weight/DequantizeLinear",
            "weight",
            [codes, factor],
            scale.dtype.type,
            axis=axis,
            **blocks,
        )

    def node(
        self,
        name: str,
        output: str,
        inputs: list[gs.Tensor],
        dtype: DTypeLike = np.float32,
        **attributes: int,
    ) -> gs.Variable:
        """Append a node that is named after its operator; returns its output."""
        found = gs.Variable(f"{self.layer}/{output}", dtype=dtype)
        op = name.rpartition("/")[2]
        self.graph.nodes.append(gs.Node(op, f"{self.layer}/{name}", attributes, inputs, [found]))
        return found


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


def _widen_bias(add: gs.Node | None) -> None:
    """Give the bias of an Add the shape [1,1,O]; a matrix would get a dimension more by that."""
    if add is None or len(add.outputs[0].shape) < 3:
        return
    for i, tensor in enumerate(add.inputs):
        if isinstance(tensor, gs.Constant):
            widened = tensor.values.reshape(1, 1, -1)
            add.inputs[i] = gs.Constant(f"{tensor.name}/wide", widened)
