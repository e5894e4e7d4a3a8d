"""Graphs for TensorRT: the same integers, every precision in the graph, nothing it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.calibrate.qparams import LayerScales, QParams
from ditcast.errors import BundleError
from ditcast.export import to_onnx
from ditcast.export.quantize import insert_qdq
from ditcast.export.targets import TARGETS, encodings
from ditcast.export.tensorrt import block_scales
from ditcast.export.trace import trace
from ditcast.models import LoadedModel
from ditcast.recipe import Bits
from ditcast.runtime import Pipeline

REFUSED = {
    "Attention",
    "ConvInteger",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "Unique",
}


def load(bundle: Bundle, name: str, target: str = "tensorrt") -> onnx.ModelProto:
    """A graph with its weights."""
    return onnx.load(bundle.graph(target, name))


def held(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """The initializers of a graph."""
    return {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}


def test_the_encoding(typed_bundle: Bundle) -> None:
    """s8 with zero point 0, float biases, one scale per output channel, q, k and v apart."""
    model = load(typed_bundle, "full")
    values = held(model)
    zeros = {(x.dtype.name, int(x)) for n, x in values.items() if n.endswith("/zero_point")}
    assert zeros == {("int8", 0)}
    assert not [n for n in values if "bias" in n and values[n].dtype.kind == "i"]
    nodes = {node.name: node for node in model.graph.node}
    whole = held(load(typed_bundle, "full", "onnxruntime"))
    for block in (0, 1):
        layer = f"blocks.{block}.attn.qkv"
        assert f"{layer}/MatMul" not in nodes
        for part in ("codes", "scale"):
            found = [values[f"{layer}/weight/{part}/{i}"] for i in range(3)]
            wanted = whole[f"{layer}/weight/{part}"]
            np.testing.assert_array_equal(np.concatenate(found, axis=-1), wanted)
        for i in range(3):
            assert nodes[f"{layer}/MatMul/{i}"].input[1] == f"{layer}/weight/{i}"


@pytest.mark.parametrize("name", ["temporal", "full", "reuse", "add", "update", "sampler"])
def test_the_operators(typed_bundle: Bundle, name: str) -> None:
    """Only what its parser takes, at every depth."""
    found, todo = set(), [load(typed_bundle, name).graph]
    while todo:
        for node in todo.pop().node:
            found.add(node.op_type)
            todo += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    assert not found & REFUSED
    assert ("Cast" in found) == (name in ("full", "reuse", "sampler"))


def test_a_target_that_an_older_version_wrote(
    typed_bundle: Bundle, tiny: LoadedModel, tmp_path: Path
) -> None:
    """Without the graphs between steps; it is written again, and the others stay."""
    shutil.copytree(typed_bundle.path, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    names, graphs = ("add", "update"), bundle.manifest.graphs
    kept = tuple(graph for graph in graphs if graph.name not in names)
    bundle.commit({"graphs": kept}, tuple(f"graphs/tensorrt/{name}.onnx" for name in names))
    message = "no graph 'update' for target 'tensorrt'; .*ditcast export .* --target tensorrt"
    with pytest.raises(BundleError, match=message):
        bundle.graph("tensorrt", "update")
    others = bundle.file("graphs/onnxruntime/full.onnx").stat().st_mtime_ns
    to_onnx(bundle, tiny, ["tensorrt"])
    assert {(g.target, g.name) for g in bundle.manifest.graphs} == {
        (g.target, g.name) for g in graphs
    }
    assert bundle.file("graphs/onnxruntime/full.onnx").stat().st_mtime_ns == others
    bundle.verify()


def test_what_lies_between_steps_is_exact(typed_bundle: Bundle) -> None:
    """Sums and the sampler's update are those of torch, to the last bit."""
    parity = {g.name: g.parity for g in typed_bundle.manifest.graphs if g.target == "tensorrt"}
    for name in ("add", "update"):
        assert parity[name]["max_abs_of_range"] == 0


def test_the_codes_are_those_of_onnx_runtime(typed_bundle: Bundle, tmp_path: Path) -> None:
    """One step on equal inputs: codes of the first layer, u8 and s8, 128 apart."""
    codes, outputs = [], []
    for target in ("onnxruntime", "tensorrt"):
        golden, _ = tensors.load(typed_bundle.file(typed_bundle.manifest.golden[0]))
        prefix = f"{target}.input."
        feeds = {k.removeprefix(prefix): x for k, x in golden.items() if k.startswith(prefix)}
        model = load(typed_bundle, "full", target)
        name = "blocks.0.attn.qkv/codes"
        kind = TensorProto.UINT8 if target == "onnxruntime" else TensorProto.INT8
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
        path = tmp_path / f"{target}.onnx"
        onnx.save(model, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found, output = session.run([name, "output"], feeds)
        codes.append(found.astype(int))
        outputs.append(output)
    assert (codes[0] - 128 != codes[1]).mean() <= 1e-3  # ties
    assert np.abs(codes[0] - 128 - codes[1]).max() <= 1
    assert np.abs(outputs[0] - outputs[1]).max() <= 0.02 * np.ptp(outputs[0])


def test_both_loops_and_both_encodings_sample_the_same(typed_bundle: Bundle) -> None:
    """In ONNX Runtime, as far as a quantized trajectory allows."""
    wanted = Pipeline(typed_bundle).sample([3, 1, 3], seed=4)
    pipeline = Pipeline(typed_bundle, target="tensorrt")
    for loop in ("host", "graph"):
        for guidance in (None, 0.5):  # without guidance its null rows are there, but do nothing
            exact = (
                wanted
                if guidance is None
                else Pipeline(typed_bundle).sample([3, 1, 3], seed=4, guidance=guidance)
            )
            found = pipeline.sample([3, 1, 3], seed=4, loop=loop, guidance=guidance)
            error = np.square(found - exact).mean() / np.ptp(exact) ** 2
            assert -10 * np.log10(error) >= 40


def test_4_bit_weights_come_in_blocks(blocks_bundle: Bundle) -> None:
    """With float inputs in half precision, although the bundle is W4A8."""
    model = load(blocks_bundle, "full")
    kinds = {x.name: (x.data_type, list(x.dims)) for x in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    assert not [node for node in nodes.values() if node.op_type == "QuantizeLinear"]
    fc2 = "blocks.0.mlp.fc2"
    assert kinds[f"{fc2}/weight/codes/int4"] == (TensorProto.INT4, [256, 64])
    assert kinds[f"{fc2}/weight/scale"] == (TensorProto.FLOAT16, [2, 64])
    restored = {a.name: a.i for a in nodes[f"{fc2}/weight/DequantizeLinear"].attribute}
    assert restored == {"axis": 0, "block_size": 128}
    assert nodes[nodes[f"{fc2}/MatMul"].input[0].replace("input_0", "Cast_0")].op_type == "Cast"
    scale = held(model)[f"{fc2}/weight/scale"]
    np.testing.assert_array_equal(scale[0], scale[1])  # one per output channel, repeated


def test_blocks_are_as_long_as_they_can_be() -> None:
    """At least two of them, so that each engine has a kernel of 4-bit weights."""
    flat: NDArray[np.float32] = np.ones(8, np.float32)
    assert block_scales(flat, 128)[1] == 64
    assert block_scales(np.ones((8, 4), np.float32), 128)[1] == 16


def test_targets_that_encode_the_same_numbers(
    tiny: LoadedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorRT has 8-bit weights as the others do, 4-bit ones beside float inputs: said once."""
    scale = torch.ones(4)
    held = {
        name: LayerScales(bits=Bits(bits, 8), weight=scale, activation=torch.tensor(0.1))
        for name, bits in (("blocks.0.mlp.fc1", 4), ("blocks.0.mlp.fc2", 8))
    }
    targets = ["reference", "onnxruntime", "tensorrt"]
    both = QParams(layers={"blocks.0.mlp.fc2": held["blocks.0.mlp.fc2"]})
    assert [names for names, _ in encodings(tiny.adapter, targets, both)] == [
        ["reference"],
        ["onnxruntime", "tensorrt"],
    ]
    assert capfd.readouterr().err == ""
    *_, (names, own) = encodings(tiny.adapter, targets, QParams(layers=held))
    assert names == ["tensorrt"]
    assert own.layers["blocks.0.mlp.fc1"].activation is None
    assert own.layers["blocks.0.mlp.fc2"] is held["blocks.0.mlp.fc2"]
    assert "TensorRT multiplies no 4-bit weights by 8-bit inputs" in capfd.readouterr().err
    groups = encodings(tiny.adapter, targets, QParams())
    assert [names for names, _ in groups] == [targets]


def convolution(bits: Bits, activation: Tensor) -> gs.Graph:
    """A traced convolution with its Q/DQ nodes."""
    torch.manual_seed(0)
    original = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    names: dict[str, Any] = {"inputs": ["x"], "outputs": ["y"], "dynamic": [{}]}
    model = torch.nn.Sequential(original).eval()
    graph = trace(model, [torch.randn(2, 4, 8, 8)], **names, layers=["0"])
    scales = LayerScales(bits=bits, weight=torch.ones(4), activation=activation)
    insert_qdq(graph, {"0": scales}, TARGETS["tensorrt"], {"0": original})
    return graph


def test_4_bit_convolutions() -> None:
    """As 8 bits with integer inputs; with float ones they are refused before: `test_targets`."""
    graph = convolution(Bits(4, 8), torch.tensor(0.1))
    codes = graph.tensors()["0/weight/codes"]
    assert codes.values.dtype == np.int8
    assert not [node for node in graph.nodes if node.op == "Cast"]
