"""From a torch module to a graph in memory, weights shared with torch, layers by name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_graphsurgeon as gs
import onnx_ir
import torch
from onnxscript import opset23 as op
from torch import Tensor, nn

OPSET = 23
IR_VERSION = 11  # the oldest that may hold this opset
INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape inference reads them


def _attention(query: Any, key: Any, value: Any, heads: int, bias: Any = None) -> Any:
    """One fused operator: it needs no transposes, and no scores in memory."""
    mask = None
    if bias is not None:  # as long as the query: ONNX Runtime does not broadcast that axis
        mask = op.Expand(op.Unsqueeze(bias, _ints(1, 2)), _ints(1, 1, int(query.shape[1]), 1))
    return op.Attention(query, key, value, mask, q_num_heads=heads, kv_num_heads=heads)[0]


def _ints(*values: int) -> Any:
    """A constant of int64."""
    return op.Constant(value_ints=list(values))


def _convolution(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    *,
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Any:
    """A Conv; a patch embedding, which a vision transformer starts with, as the MatMul it is."""
    kernel = [int(size) for size in weight.shape[2:]]
    if [*stride, *padding, *dilation, groups] == [*kernel, 0, 0, 1, 1, 1] and kernel != [1, 1]:
        return _patch_embedding(x, weight, bias)
    return op.Conv(
        x,
        weight,
        bias,
        kernel_shape=kernel,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )


def _patch_embedding(x: Any, weight: Any, bias: Any) -> Any:
    """A convolution over patches that do not overlap."""
    channels, height, width = (int(size) for size in x.shape[1:])
    outer, _, p, q = (int(size) for size in weight.shape)
    rows, columns = height // p, width // q

    patches = op.Reshape(x, _ints(-1, channels, rows, p, columns, q))
    patches = op.Transpose(patches, perm=[0, 2, 4, 1, 3, 5])
    patches = op.Reshape(patches, _ints(-1, rows * columns, channels * p * q))
    flat = op.Transpose(op.Reshape(weight, _ints(outer, channels * p * q)), perm=[1, 0])
    embedded = op.MatMul(patches, flat)
    if bias is not None:
        embedded = op.Add(embedded, bias)
    return op.Reshape(op.Transpose(embedded, perm=[0, 2, 1]), _ints(-1, outer, rows, columns))


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.ditcast.attention.default: _attention,
    torch.ops.aten.conv2d.default: _convolution,
}


def trace(
    module: nn.Module,
    arguments: Sequence[Tensor],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: Sequence[dict[int, Any]],
    layers: Iterable[str] = (),
) -> gs.Graph:
    """Export `module` at opset 23; `dynamic` maps axes of each input to `torch.export.Dim`.

    The product of each layer in `layers` is named `LAYER/MatMul` or `LAYER/Conv`, its bias Add
    `LAYER/Add`.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of LeafSpec
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "# The axis name")  # several inputs share N on purpose
        program = torch.onnx.export(
            module,
            tuple(arguments),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(dynamic),
            custom_translation_table=_TRANSLATIONS,
        )
    assert program is not None
    model = program.model
    _name_layers(model, set(layers))
    graph = _to_graphsurgeon(model)
    _fold(graph)
    return graph.cleanup(remove_unused_graph_inputs=False).toposort()


def _name_layers(model: onnx_ir.Model, layers: set[str]) -> None:
    """Name the product and the bias Add of each layer after it, by the exporter's scopes."""
    constants = model.graph.initializers
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        found = [layer for layer in layers if f"'{layer}'" in scopes]
        bias = node.op_type == "Add" and any(x and x.name in constants for x in node.inputs)
        if found and (bias or node.op_type in ("MatMul", "Gemm", "Conv")):
            node.name = f"{found[0]}/{node.op_type}"


def _to_graphsurgeon(model: onnx_ir.Model) -> gs.Graph:
    """Import without ever serializing the big weights (a protobuf holds no more than 2 GB)."""
    arrays = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes > INLINE_BYTES:
            array = arrays[name] = tensor.numpy()
            value.const_value = onnx_ir.ExternalTensor(
                "-", 0, tensor.nbytes, tensor.dtype, shape=onnx_ir.Shape(array.shape), name=name
            )
    graph = gs.import_onnx(onnx_ir.to_proto(model))
    tensors = graph.tensors()
    for name, array in arrays.items():
        if name in tensors:
            tensors[name].values = array
    return graph


def _fold(graph: gs.Graph) -> None:
    """Compute what the exporter leaves of large constants, which would be held in float for it.

    That is the transposed weights, and the sums of the TIB's, by which zero points leave products.
    """
    for node in graph.nodes:
        if not all(isinstance(x, gs.Constant) for x in node.inputs):
            continue
        if node.op == "Transpose":
            (source,) = node.inputs
            values = source.values.transpose(node.attrs["perm"])
            replace(node.outputs[0], gs.Constant(f"{source.name}/T", values))
        elif node.op == "ReduceSum" and not node.attrs.get("keepdims", 1):
            source, axes = node.inputs
            values = source.values.sum(axis=tuple(axes.values.tolist()))
            replace(node.outputs[0], gs.Constant(f"{source.name}/sum", values))


def replace(tensor: gs.Tensor, by: gs.Tensor) -> None:
    """Let every consumer of `tensor` read `by` instead."""
    for consumer in list(tensor.outputs):
        consumer.inputs = [by if found is tensor else found for found in consumer.inputs]
