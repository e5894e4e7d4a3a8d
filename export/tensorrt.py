"""What a graph with Q/DQ needs for TensorRT to keep its integers, as its builder was seen to work.

TensorRT is strongly typed: precision is in the graph. Products and attention of floats are in
half precision, between casts. The embedding of the sample, the stream, the norms and everything
around an integer product stay in float32: an integer product leaves its kernel before the factor
of its channel is applied, and could overflow in half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace as with_fields
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from torch import nn

from ditcast.calibrate.qparams import QParams
from ditcast.export.store import PACKED
from ditcast.export.trace import replace
from ditcast.models.base import Layer
from ditcast.recipe import Bits

HALF = onnx.TensorProto.FLOAT16
FLOAT = onnx.TensorProto.FLOAT
PRODUCTS = ("MatMul", "Gemm", "Conv")
BLOCKS = (128, 64, 32, 16)  # inputs that may share the scale of a 4-bit weight
INT4 = 4
OFFSET = 128  # of a byte that is held as int8
KEPT = "temporal"  # the graph that runs once per request, and that all steps hang on


def weight_only(qparams: QParams, originals: Mapping[str, Layer]) -> QParams:
    """The same, but 4-bit Linears keep float inputs: TensorRT multiplies no 4 by 8 bits.

    `qparams` itself where there are none with others.
    """
    narrow = {
        name: with_fields(held, activation=None, zero_point=None)
        for name, held in qparams.layers.items()
        if held.bits.weight <= INT4
        and held.activation is not None
        and isinstance(originals[name], nn.Linear)
    }
    return with_fields(qparams, layers=qparams.layers | narrow) if narrow else qparams


def cannot_hold(layer: Layer, bits: Bits, group: int) -> str:
    """What keeps a layer of 4-bit weights, with this `group` of its recipe, out of an engine.

    Nothing, if its weights are 8 bits there or come in blocks.
    """
    if isinstance(layer, nn.Conv2d):
        floats = bits.activation == 16
        return "is a convolution with 4-bit weights and float inputs" if floats else ""
    inputs = layer.in_features
    if block_size(inputs, group):
        return ""
    sizes = f"at least two blocks of {', '.join(map(str, sorted(BLOCKS)))}"
    got = f"{inputs} inputs" + (f" in groups of {group}" if group else "")
    return f"has {got}, which are not {sizes}, as its 4-bit weights come in there"


def block_size(inputs: int, group: int) -> int:
    """How many inputs share a scale of a 4-bit weight, 0 where they cannot be cut into blocks.

    A group of 0 leaves the choice. One block would be one scale per output channel: TensorRT
    would dequantize such a weight when it builds.
    """
    sizes = [size for size in BLOCKS if inputs % size == 0 and size < inputs]
    return next((size for size in sizes if group in (0, size)), 0)


def block_scales(scale: NDArray[np.float32], inputs: int) -> tuple[NDArray[np.float16], int]:
    """Scales (G, O) of the blocks of a 4-bit weight (I, O), and how long these are.

    One scale per output channel, (O,), is repeated.
    """
    size = block_size(inputs, inputs // len(scale) if scale.ndim > 1 else 0)
    if scale.ndim == 1:
        scale = np.tile(scale, (inputs // size, 1))
    return scale.astype(np.float16), size


def lower(graph: gs.Graph, name: str) -> None:
    """Rewrite a step graph with Q/DQ in place."""
    for node in list(graph.nodes):
        if node.op == "Cast":
            _restore(graph, node)
        elif node.op == "MatMul" and _producer(node.inputs[1]) == "DequantizeLinear":
            _split(graph, node)
    for node in list(graph.nodes):
        if node.op == "Attention":
            _decompose(graph, node)
        elif node.op in PRODUCTS:
            kinds = [_producer(tensor) == "DequantizeLinear" for tensor in node.inputs[:2]]
            floats = not any(kinds) and name != KEPT and not _is_stem(node)
            if floats or kinds == [False, True]:
                _halve(graph, node)
    graph.cleanup().toposort()


def _restore(graph: gs.Graph, cast: gs.Node) -> None:
    """Dequantize stored codes before rows of them are gathered, and not where they are cast.

    TensorRT takes a constant of int8 in front of DequantizeLinear only, and holds no int16, whose
    high and low bytes become constants of their own. Its kernel gathers the codes nevertheless.
    """
    tensor, gathers = cast.inputs[0], list[gs.Node]()
    while _producer(tensor) == "Gather":
        gathers.append(tensor.inputs[0])
        tensor = gathers[-1].inputs[0]
    if not gathers or not isinstance(tensor, gs.Constant) or tensor.values.dtype.kind != "i":
        return
    name, codes = tensor.name, tensor.values

    def op(kind: str, part: str, *inputs: gs.Tensor) -> gs.Variable:
        found = gs.Variable(f"{name}/{part}/y", np.float32)
        graph.nodes.append(gs.Node(kind, f"{name}/{part}", inputs=list(inputs), outputs=[found]))
        return found

    def part(values: NDArray[np.int8], kind: str, scale: float) -> gs.Variable:
        held = gs.Constant(f"{name}/{kind}", values)
        factor = gs.Constant(f"{name}/{kind}/scale", np.array(scale, np.float32))
        return op("DequantizeLinear", f"{kind}/DequantizeLinear", held, factor)

    if codes.dtype == np.int8:
        floats = part(codes, "codes", 1)
    else:
        high, low = codes >> 8, (codes & 255) - OFFSET
        pair = (part(high.astype(np.int8), "high", 256), part(low.astype(np.int8), "low", 1))
        offset = gs.Constant(f"{name}/offset", np.array(OFFSET, np.float32))
        floats = op("Add", "codes/Add", op("Add", "bytes/Add", *pair), offset)
    gathers[-1].inputs[0] = floats
    for node in gathers:
        node.outputs[0].dtype = np.dtype(np.float32)
    (output,) = cast.outputs
    cast.outputs.clear()
    replace(output, gathers[0].outputs[0])


def _is_stem(product: gs.Node) -> bool:
    """Whether a product reads the sample itself: what it rounds, no later layer can mend."""
    tensor = product.inputs[0]
    while tensor.inputs and tensor.inputs[0].op not in PRODUCTS:
        sources = [x for x in tensor.inputs[0].inputs if not isinstance(x, gs.Constant)]
        if len(sources) != 1:
            return False
        tensor = sources[0]
    return not tensor.inputs


def _producer(tensor: gs.Tensor) -> str:
    """The operator that makes a tensor, if one does."""
    return str(tensor.inputs[0].op) if tensor.inputs else ""


def _split(graph: gs.Graph, product: gs.Node) -> None:
    """One product for each part that its output is split into, such as query, key and value.

    Where heads are cut out of one integer product of few inputs (64, not 128), TensorRT moves the
    cuts into its weight, which it dequantizes for that. Products of one input it joins again, in
    integers.
    """
    chain, tensor = [], product.outputs[0]
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in ("Add", "Mul"):
        chain.append((tensor.outputs[0], tensor))
        tensor = tensor.outputs[0].outputs[0]
    others = [x for node, before in chain for x in node.inputs if x is not before]
    if len(tensor.outputs) != 1 or tensor.outputs[0].op != "Split":
        return
    parts = list(tensor.outputs[0].outputs)
    if tensor.outputs[0].attrs["axis"] not in (-1, len(parts[0].shape) - 1):
        return
    if not all(isinstance(x, gs.Constant) or (x.shape or [0])[-1] == 1 for x in others):
        return  # an operand that would have to be split as well
    widths = [int(part.shape[-1]) for part in parts]
    tensor.outputs[0].outputs.clear()
    start = 0
    for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
        columns = slice(start, start + width)
        start += width
        nodes = [product, *(node for node, _ in chain)]
        made: gs.Tensor = _weight(graph, product, columns, i)
        inputs = [product.inputs[0], made]
        for k, node in enumerate(nodes):
            if k:
                before = chain[k - 1][1]
                inputs = [made if x is before else _columns(x, columns, i) for x in node.inputs]
            made = part if k == len(chain) else gs.Variable(f"{node.name}/{i}/y", np.float32)
            name = f"{node.name}/{i}"
            graph.nodes.append(gs.Node(node.op, name, dict(node.attrs), inputs, [made]))


def _weight(graph: gs.Graph, product: gs.Node, columns: slice, index: int) -> gs.Variable:
    """Some columns of a quantized weight (I, O)."""
    node = product.inputs[1].inputs[0]
    codes, scale = (_columns(tensor, columns, index) for tensor in node.inputs)
    restored = gs.Variable(f"{product.inputs[1].name}/{index}", product.inputs[1].dtype)
    name = f"{node.name}/{index}"
    graph.nodes.append(gs.Node(node.op, name, dict(node.attrs), [codes, scale], [restored]))
    return restored


def _columns(tensor: gs.Tensor, columns: slice, index: int) -> gs.Tensor:
    """Some columns of a constant; what has but one, or is of each row, is left as it is."""
    if not isinstance(tensor, gs.Constant) or tensor.values.shape[-1:] in ((), (1,)):
        return tensor
    base, mark, _ = tensor.name.partition(PACKED)
    values = np.ascontiguousarray(tensor.values[..., columns])
    return gs.Constant(f"{base}/{index}{mark}", values)


def _decompose(graph: gs.Graph, attention: gs.Node) -> None:
    """Attention in half as products, softmax and transposes, which TensorRT joins again.

    With the operator itself it has no kernel for float32, rounds to 8 bits in a kernel of its
    own, and fails inside a `Loop`.
    """
    name, heads = attention.name, int(attention.attrs["q_num_heads"])
    width = int(attention.inputs[0].shape[-1])
    output = attention.outputs[0]
    shape = gs.Constant(f"{name}/heads", np.array([0, 0, heads, -1], np.int64))
    scale = gs.Constant(f"{name}/scale", np.array((width // heads) ** -0.25, np.float16))

    def op(kind: str, part: str, inputs: Sequence[gs.Tensor], **attributes: Any) -> gs.Variable:
        found = gs.Variable(f"{name}/{part}/y", np.float16)
        node = gs.Node(kind, f"{name}/{part}", attributes, list(inputs), [found])
        graph.nodes.append(node)
        return found

    parts, masks = [], attention.inputs[3:]
    for part, tensor in zip(("query", "key", "value"), attention.inputs, strict=False):
        half = op("Cast", f"{part}/Cast", [tensor], to=HALF)
        perm = [0, 2, 3, 1] if part == "key" else [0, 2, 1, 3]
        cut = op("Reshape", f"{part}/Reshape", [half, shape])
        parts.append(op("Transpose", f"{part}/Transpose", [cut], perm=perm))
    attention.inputs.clear()
    attention.outputs.clear()
    # The root of the usual factor on both sides: their product cannot overflow before it.
    query, key = (op("Mul", f"{i}/Mul", [tensor, scale]) for i, tensor in enumerate(parts[:2]))
    scores = op("MatMul", "scores/MatMul", [query, key])
    for mask in masks:  # 0 and -10000, which half precision has
        scores = op("Add", "scores/Add", [scores, op("Cast", "mask/Cast", [mask], to=HALF)])
    shares = op("Softmax", "Softmax", [scores], axis=-1)
    mixed = op("MatMul", "mixed/MatMul", [shares, parts[2]])
    rows = op("Transpose", "Transpose", [mixed], perm=[0, 2, 1, 3])
    joined = gs.Constant(f"{name}/joined", np.array([0, 0, width], np.int64))
    found = op("Reshape", "Reshape", [rows, joined])
    graph.nodes.append(gs.Node("Cast", f"{name}/Cast", {"to": FLOAT}, [found], [output]))


def _halve(graph: gs.Graph, product: gs.Node) -> None:
    """A product in half precision, between casts; what is dequantized is in half already."""
    for i, tensor in enumerate(product.inputs):
        if isinstance(tensor, gs.Constant):
            halved = gs.Constant(f"{tensor.name}/half", tensor.values.astype(np.float16))
            product.inputs[i] = halved
        elif _producer(tensor) != "DequantizeLinear":
            half = gs.Variable(f"{product.name}/input_{i}", np.float16)
            name = f"{product.name}/Cast_{i}"
            graph.nodes.append(gs.Node("Cast", name, {"to": HALF}, [tensor], [half]))
            product.inputs[i] = half
    output = product.outputs[0]
    product.outputs[0] = gs.Variable(f"{product.name}/half", np.float16)
    name = f"{product.name}/Cast"
    graph.nodes.append(gs.Node("Cast", name, {"to": FLOAT}, [product.outputs[0]], [output]))
