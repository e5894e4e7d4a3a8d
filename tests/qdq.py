"""Graphs of one layer: what TensorRT runs in integers, loses, or refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

K, N = 128, 64
rng = np.random.default_rng(0)
CODES: NDArray[Any] = rng.integers(-100, 100, (K, N))
SCALES: NDArray[Any] = rng.uniform(0.005, 0.02, N)
NARROW: NDArray[Any] = rng.integers(-8, 8, (K, N))
ONE = np.float32(0.02)


def tensor(name: str, values: Any, dtype: Any = np.float32) -> TensorProto:
    """An initializer."""
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def packed(kind: int, values: NDArray[Any]) -> TensorProto:
    """An initializer of the weight in a type that NumPy lacks."""
    return helper.make_tensor("w", kind, values.shape, values.ravel().tolist())


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    """A node named after its operator, `layer/weight/...` where it makes the weight."""
    part = "weight/" if outputs == ["wd"] else "bias/" if outputs == ["bd"] else ""
    return helper.make_node(kind, inputs, outputs, name=f"layer/{part}{kind}", **attributes)


def model(
    nodes: list[onnx.NodeProto],
    initializers: list[TensorProto],
    shape: tuple[str | int, ...] = ("n", K),
    output: tuple[str | int, ...] = ("n", N),
) -> onnx.ModelProto:
    """A model of `x` and `y`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    graph = helper.make_graph(nodes, "one", [x], [y], initializers)
    sets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=11)


def linear(
    *,
    zero: int = 0,
    kind: Any = np.int8,
    scale: Any = ONE,
    scale_axis: int | None = None,
    weight: TensorProto | None = None,
    weight_scale: Any = SCALES,
    weight_zero: int = 0,
    axis: int = 1,
    block: int = 0,
    bias: bool = False,
) -> onnx.ModelProto:
    """One quantized MatMul, as the arguments have it."""
    ends = [tensor("s", scale), tensor("z", np.full(np.shape(scale), zero), kind)]
    weights = [weight or tensor("w", CODES, np.int8), tensor("ws", weight_scale)]
    names = ["w", "ws"]
    if weight_zero:
        weights.append(tensor("wz", np.full(np.shape(weight_scale), weight_zero), np.int8))
        names.append("wz")
    along = {} if scale_axis is None else {"axis": scale_axis}
    blocks = {"block_size": block} if block else {}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], **along),
        node("DequantizeLinear", ["q", "s", "z"], ["xd"], **along),
        node("DequantizeLinear", names, ["wd"], axis=axis, **blocks),
        node("MatMul", ["xd", "wd"], ["p" if bias else "y"]),
    ]
    if bias:
        weights += [tensor("b", np.arange(N), np.int32), tensor("bs", np.full(N, 1e-4))]
        nodes += [node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0)]
        nodes += [node("Add", ["p", "bd"], ["y"])]
    return model(nodes, [*ends, *weights])


def weight_only(
    weight: TensorProto, scale: NDArray[Any], axis: int, block: int = 0
) -> onnx.ModelProto:
    """One MatMul with a float input."""
    blocks = {"block_size": block} if block else {}
    nodes = [
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=axis, **blocks),
        node("MatMul", ["x", "wd"], ["y"]),
    ]
    return model(nodes, [weight, tensor("ws", scale)])


def operator(kind: str) -> onnx.ModelProto:
    """An operator that only ONNX Runtime has, on quantized inputs where it takes them."""
    ends = [tensor("s", ONE), tensor("z", 0, np.int8)]
    quantize = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q")
    dequantize = helper.make_node("DequantizeLinear", ["qy", "s", "z"], ["y"], name="d")
    cast = helper.make_node("Cast", ["qy"], ["y"], name="c", to=TensorProto.FLOAT)
    if kind == "DynamicQuantizeLinear":
        dynamic = helper.make_node(kind, ["x"], ["qy", "s", "z"], name=f"layer/{kind}")
        return model([dynamic, dequantize], [], output=("n", K))
    if kind in ("SkipLayerNormalization", "FusedMatMul"):
        inputs = ["x", "x", "g"] if kind.startswith("Skip") else ["x", "g"]
        gain = np.ones(K) if kind.startswith("Skip") else np.ones((K, N))
        alone = helper.make_node(kind, inputs, ["y"], name=f"layer/{kind}", domain="com.microsoft")
        return model([alone], [tensor("g", gain)], output=("n", K if kind[0] == "S" else N))
    images = kind in ("QLinearConv", "ConvInteger")
    codes = rng.integers(-9, 9, (8, 8, 1, 1)) if images else CODES
    weight = tensor("w", codes, np.int8)
    sizes: Any = {"shape": ("n", 8, 8, 8), "output": ("n", 8, 8, 8)} if images else {}
    if kind.endswith("Integer"):
        return model([quantize, node(kind, ["q", "w"], ["qy"]), cast], [*ends, weight], **sizes)
    inputs = ["q", "s", "z", "w", "s", "z", "s", "z"]
    return model([quantize, node(kind, inputs, ["qy"]), dequantize], [*ends, weight], **sizes)


def convolution() -> onnx.ModelProto:
    """One quantized 3x3 convolution of 32 channels."""
    codes = rng.integers(-100, 100, (32, 32, 3, 3))
    held = [tensor("s", ONE), tensor("z", 0, np.int8), tensor("w", codes, np.int8)]
    held.append(tensor("ws", rng.uniform(0.005, 0.02, 32)))
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0),
        node("Conv", ["xd", "wd"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    ]
    return model(nodes, held, shape=("n", 32, 8, 8), output=("n", 32, 8, 8))


def fp4() -> onnx.ModelProto:
    """A MatMul of a weight in e2m1."""
    weight = packed(TensorProto.FLOAT4E2M1, NARROW % 4)
    return weight_only(weight, rng.uniform(0.005, 0.02, (K // 16, N)), 0, 16)


def nvfp4() -> onnx.ModelProto:
    """A MatMul in e2m1, of which 16 inputs share a scale in e4m3, and all of these one in float."""
    scales = helper.make_tensor("ws", TensorProto.FLOAT8E4M3FN, (K // 16, N), [1.0] * (K // 16 * N))
    weight = packed(TensorProto.FLOAT4E2M1, NARROW % 4)
    rows: dict[str, Any] = {"axis": -1, "block_size": 16}
    kind = "TRT_FP4DynamicQuantize"
    codes = node(kind, ["x", "s"], ["q", "qs"], domain="trt", scale_type=17, **rows)
    nodes = [
        codes,
        helper.make_node("DequantizeLinear", ["qs", "s"], ["xs"], name="layer/scale/Dequantize"),
        node("DequantizeLinear", ["q", "xs"], ["xd"], **rows),
        helper.make_node("DequantizeLinear", ["ws", "s"], ["wsd"], name="layer/weight/scale"),
        node("DequantizeLinear", ["w", "wsd"], ["wd"], axis=0, block_size=16),
        node("MatMul", ["xd", "wd"], ["y"]),
    ]
    found = model(nodes, [weight, scales, tensor("s", ONE)])
    found.opset_import.append(helper.make_opsetid("trt", 1))
    return found


def fp8(found: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """A MatMul, or all of a model, with e4m3 where int8 was."""
    found = found or linear()
    for held in found.graph.initializer:
        if held.data_type == TensorProto.INT8:
            codes = numpy_helper.to_array(held).astype(np.float32)
            kind = TensorProto.FLOAT8E4M3FN
            held.CopyFrom(helper.make_tensor(held.name, kind, codes.shape, codes.ravel().tolist()))
    return found


def save(found: onnx.ModelProto, folder: Path) -> Path:
    """Write a model."""
    path = folder / "one.onnx"
    onnx.save(found, path)
    return path
