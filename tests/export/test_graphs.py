"""What stands in the exported files: the contract that other runtimes rely on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from ditcast.bundle import Bundle
from ditcast.calibrate import qparams
from ditcast.calibrate.codes import weight_codes
from ditcast.errors import UnsupportedError
from ditcast.export import targets
from ditcast.export.quantize import insert_qdq
from ditcast.models import LoadedModel
from ditcast.models.base import Layer
from ditcast.recipe import Bits
from ditcast.runtime.backends import graph_file, make_backend

TARGETS = ("reference", "onnxruntime")
GRAPHS = ("temporal", "full", "reuse", "sampler")
EVERY = [(target, name) for target in TARGETS for name in GRAPHS]
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
LARGE = 1024  # bytes; beyond it a tensor lies in the weights file


def read(bundle: Bundle, target: str, name: str) -> onnx.ModelProto:
    """A graph without its weights."""
    return onnx.load(bundle.graph(target, name), load_external_data=False)


def bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies of its loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from bodies(attribute.g)


def constants(bundle: Bundle, target: str, name: str) -> dict[str, NDArray[Any]]:
    """All initializers of a graph, those of loop bodies included."""
    folder = bundle.graph(target, name).parent
    found = {}
    for body in bodies(read(bundle, target, name).graph):
        for tensor in body.initializer:
            found[tensor.name] = numpy_helper.to_array(tensor, str(folder))
    return found


@pytest.mark.parametrize(("target", "name"), EVERY)
def test_only_standard_operators(shared_bundle: Bundle, target: str, name: str) -> None:
    """The default domain at opset 23, in loop bodies too, and nothing else is imported."""
    model = read(shared_bundle, target, name)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    nodes = [node for body in bodies(model.graph) for node in body.node]
    assert {node.domain for node in nodes} == {""}
    assert not model.functions
    assert all(onnx.defs.has(node.op_type) for node in nodes)
    onnx.checker.check_model(str(shared_bundle.graph(target, name)), full_check=True)


SLOTS, TOKENS, WIDTH, FEATURES = 4, 16, 64, (6 * 2 + 2) * 64
SAMPLE = ("N", 3, 16, 16)
STEP = {"sample": (FLOAT, SAMPLE), "features": (FLOAT, ("N", FEATURES))}
CONTRACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temporal": (
        {"timesteps": (FLOAT, ("T",)), "class_labels": (INT64, ("U",))},
        {"features": (FLOAT, ("T", "U", FEATURES))},
    ),
    "full": (
        STEP | {"ahead": (FLOAT, ("R", "N", FEATURES)), "weights": (FLOAT, ("R", SLOTS))},
        {"output": (FLOAT, SAMPLE), "forecast": (FLOAT, ("R", "N", TOKENS, WIDTH))},
    ),
    "reuse": (
        STEP | {"forecast": (FLOAT, ("N", TOKENS, WIDTH))},
        {"output": (FLOAT, SAMPLE)},
    ),
    "sampler": (
        {
            "noise": (FLOAT, ("n", 3, 16, 16)),
            "class_labels": (INT64, ("n",)),
            "guidance_scale": (FLOAT, ()),
            "timesteps": (FLOAT, (6,)),  # has a default: callers leave it out
        },
        {"latents": (FLOAT, ("n", 3, 16, 16))},
    ),
}


def signature(values: Any) -> dict[str, Any]:
    """Type and shape of inputs or outputs."""
    found = {}
    for value in values:
        kind = value.type.tensor_type
        dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
        found[value.name] = (kind.elem_type, dims)
    return found


@pytest.mark.parametrize(("target", "name"), EVERY)
def test_inputs_and_outputs(shared_bundle: Bundle, target: str, name: str) -> None:
    """Names, types and shapes, in this order; counts of rows and steps are symbolic only."""
    graph = read(shared_bundle, target, name).graph
    inputs, outputs = CONTRACT[name]
    assert list(signature(graph.input).items()) == list(inputs.items())
    assert list(signature(graph.output).items()) == list(outputs.items())


def test_a_stochastic_sampler_takes_its_noise(other_bundle: Bundle) -> None:
    """DDPM: unit noise of every step beside the initial noise."""
    inputs = signature(read(other_bundle, "reference", "sampler").graph.input)
    assert inputs["step_noise"] == (FLOAT, (6, "n", 4, 8, 8))
    assert inputs["noise"] == (FLOAT, ("n", 4, 8, 8))


def test_only_the_default_of_timesteps_may_be_left_out(shared_bundle: Bundle) -> None:
    """An input that is also an initializer is optional."""
    graph = read(shared_bundle, "onnxruntime", "sampler").graph
    held = {tensor.name for tensor in graph.initializer}
    assert [value.name for value in graph.input if value.name in held] == ["timesteps"]


@pytest.mark.parametrize(("target", "name"), EVERY)
def test_weights_lie_in_one_file(shared_bundle: Bundle, target: str, name: str) -> None:
    """Every large tensor is a page-aligned reference into `weights.data` beside the graph."""
    path = shared_bundle.graph(target, name)
    size = (path.parent / "weights.data").stat().st_size
    for body in bodies(read(shared_bundle, target, name).graph):
        for tensor in body.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert len(tensor.raw_data) <= LARGE
                continue
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert where["location"] == "weights.data"
            assert int(where["offset"]) % 4096 == 0
            assert int(where["offset"]) + int(where["length"]) <= size


def references(model: onnx.ModelProto) -> set[tuple[str, ...]]:
    """Offset and length of all tensors in the weights file."""
    held = (tensor for body in bodies(model.graph) for tensor in body.initializer)
    return {tuple(entry.value for entry in tensor.external_data) for tensor in held} - {()}


@pytest.mark.parametrize("target", TARGETS)
def test_the_graph_loop_shares_the_weights_of_the_step_graphs(
    shared_bundle: Bundle, target: str
) -> None:
    """It brings no tensor of its own, and the file holds none twice."""
    steps = set().union(*(references(read(shared_bundle, target, n)) for n in GRAPHS[:3]))
    assert references(read(shared_bundle, target, "sampler")) == steps
    weights = (shared_bundle.graph(target, "full").parent / "weights.data").read_bytes()
    ranges = sorted((int(offset), int(length)) for _, offset, length in steps)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ranges))
    assert len({weights[a : a + n] for a, n in ranges}) == len(ranges)


def test_int8_weights_take_a_quarter(shared_bundle: Bundle, tiny: LoadedModel) -> None:
    """The file shrinks by three bytes for every quantized weight, but for scales and padding."""
    sizes = {t: shared_bundle.graph(t, "full").parent / "weights.data" for t in TARGETS}
    saved = sizes["reference"].stat().st_size - sizes["onnxruntime"].stat().st_size
    linears = tiny.adapter.layers()
    quantized = sum(m.weight.numel() for n, m in linears.items() if n.startswith("blocks."))
    padding = 4096 * 3 * len(linears)
    assert 3 * quantized - padding <= saved <= 3 * quantized


def layers(bundle: Bundle) -> list[str]:
    """The names of the quantized layers."""
    assert bundle.manifest.quantization is not None
    return [layer.name for layer in bundle.manifest.quantization.layers]


@pytest.mark.parametrize("name", ["full", "sampler"])
def test_quantized_layers(shared_bundle: Bundle, tiny: LoadedModel, name: str) -> None:
    """Input u8 with zero point 128 per tensor, weight s8 per output channel, float bias."""
    nodes = {
        node.name: node
        for body in bodies(read(shared_bundle, "onnxruntime", name).graph)
        for node in body.node
    }
    held = constants(shared_bundle, "onnxruntime", name)
    prefix = "" if name == "full" else "segments/full/"
    quantization = shared_bundle.manifest.quantization
    assert quantization is not None
    scales = qparams.load(shared_bundle.file(quantization.file)).layers
    for layer in layers(shared_bundle):
        at = f"{prefix}{layer}"
        quantize, restore = (nodes[f"{at}/{op}Linear"] for op in ("Quantize", "Dequantize"))
        weight, product = nodes[f"{at}/weight/DequantizeLinear"], nodes[f"{at}/MatMul"]
        assert list(quantize.input[1:]) == list(restore.input[1:])
        activation = scales[layer].activation
        assert activation is not None
        assert held[quantize.input[1]] == activation.numpy()
        zero_point = held[quantize.input[2]]
        assert zero_point.dtype == np.uint8
        assert zero_point.shape == ()
        assert zero_point == 128
        assert restore.input[0] == quantize.output[0]
        assert list(product.input) == [restore.output[0], weight.output[0]]
        assert len(weight.input) == 2  # no zero point: symmetric
        assert {a.name: a.i for a in weight.attribute} == {"axis": 1}
        parameter = tiny.adapter.layers()[layer].weight.data
        codes = held[weight.input[0]]
        assert codes.dtype == np.int8
        wanted = weight_codes(parameter, scales[layer].weight, 8)
        assert scales[layer].bits == Bits(8, 8)
        np.testing.assert_array_equal(codes.T, wanted)
        np.testing.assert_array_equal(held[weight.input[1]], scales[layer].weight)
        bias = [held[i] for i in nodes[f"{at}/Add"].input if i in held]
        assert [b.shape for b in bias] == [(1, 1, len(parameter))]


@pytest.mark.parametrize(
    ("target", "name", "pairs"),
    # One Q and two DQ for each of 8 layers: the final layer, reuse and temporal stay in float.
    [
        ("onnxruntime", "full", 8),
        ("onnxruntime", "sampler", 8),
        ("onnxruntime", "reuse", 0),
        ("onnxruntime", "temporal", 0),
        *(("reference", name, 0) for name in GRAPHS),
    ],
)
def test_nothing_else_is_quantized(
    shared_bundle: Bundle, target: str, name: str, pairs: int
) -> None:
    """The reference target is plain fp32."""
    graph = read(shared_bundle, target, name).graph
    kinds = [node.op_type for body in bodies(graph) for node in body.node]
    assert kinds.count("QuantizeLinear") == pairs
    assert kinds.count("DequantizeLinear") == 2 * pairs


def nodes_of(graph: onnx.GraphProto, kind: str) -> list[onnx.NodeProto]:
    """The nodes of one kind, those of loop bodies included."""
    return [node for body in bodies(graph) for node in body.node if node.op_type == kind]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "blocks"), [("full", 2), ("sampler", 2), ("reuse", 0)])
def test_attention_is_one_operator_per_block(
    shared_bundle: Bundle, target: str, name: str, blocks: int
) -> None:
    """Of query, key and value as they lie in the product, without a mask or a key-value cache."""
    graph = read(shared_bundle, target, name).graph
    found = nodes_of(graph, "Attention")
    assert len(found) == blocks
    made_by = {out: node for body in bodies(graph) for node in body.node for out in node.output}
    for node in found:
        assert len(node.output) == 1
        split = made_by[node.input[0]]
        assert split.op_type == "Split"
        assert list(node.input) == list(split.output)  # these three, in order
        set_ = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (set_.pop("q_num_heads"), set_.pop("kv_num_heads")) == (2, 2)
        assert not any(set_.values())  # not causal, no cap
    assert not nodes_of(graph, "Softmax")


def permutations(graph: onnx.GraphProto) -> list[list[int]]:
    """What the transposes of a graph do, in order; not those of forecasts."""
    nodes = (node for node in nodes_of(graph, "Transpose") if "forecast/" not in node.name)
    return [list(node.attribute[0].ints) for node in nodes]


@pytest.mark.parametrize("target", TARGETS)
def test_blocks_need_no_transposes(shared_bundle: Bundle, target: str) -> None:
    """A full step has those of a reuse step, which are of the patches: three in, one out."""
    patches = permutations(read(shared_bundle, target, "reuse").graph)
    assert len(patches) == 4
    assert sorted(map(len, patches)) == [3, 3, 6, 6]
    assert permutations(read(shared_bundle, target, "full").graph) == patches
    assert permutations(read(shared_bundle, target, "sampler").graph) == patches * 2
    assert not permutations(read(shared_bundle, target, "temporal").graph)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_full_step_looks_ahead_as_far_as_asked(
    shared_bundle: Bundle, tiny: LoadedModel, count: int, rows: int
) -> None:
    """Any number of reuse steps and any batch in one graph, each value as torch computes it."""
    rng = np.random.default_rng(count)
    shapes = {
        "sample": (rows, 3, 16, 16),
        "features": (rows, FEATURES),
        "ahead": (count, rows, FEATURES),
        "weights": (count, SLOTS),
    }
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    session = make_backend("onnxruntime").session(graph_file(shared_bundle, "reference", "full"))
    found = session.run(feeds, ["output", "forecast"])
    with torch.no_grad():
        wanted = tiny.adapter.denoiser(*(torch.from_numpy(value) for value in feeds.values()))
    assert found["forecast"].shape == (count, rows, TOKENS, WIDTH)
    for value, tensor in zip(found.values(), wanted, strict=True):
        np.testing.assert_allclose(value, tensor.numpy(), rtol=0, atol=2e-5)


def test_a_loop_runs_over_segments(shared_bundle: Bundle) -> None:
    """An outer Loop, and within it a Loop of reuse steps; each step graph is there once."""
    graph = read(shared_bundle, "reference", "sampler").graph
    top, outer, *forecasts, inner = bodies(graph)
    assert len(forecasts) == 2  # as a product, and as a sum
    loops = [[n.op_type for n in body.node].count("Loop") for body in (top, outer, inner)]
    assert loops == [1, 1, 0]
    assert any(n.name == "segments/full/blocks.1.mlp.fc2/MatMul" for n in outer.node)
    assert any(n.name == "reuse_steps/reuse/final.proj/MatMul" for n in inner.node)
    held = constants(shared_bundle, "reference", "sampler")
    assert held["segment_starts"].tolist() == [0, 1, 3, 5]  # T=6, N=2: j = 5, 4, 2, 0
    assert held["segment_lengths"].tolist() == [1, 2, 2, 1]
    assert held["ahead_steps"].tolist() == [[0], [2], [4], [5]]  # reuse steps are 2 and 4
    assert held["ahead_weights"].tolist() == [[[0] * 4], [[1] * 4], [[1] * 4], [[0] * 4]]


@pytest.mark.parametrize(
    ("layer", "kind"), [(torch.nn.Linear(1, 1), "MatMul"), (torch.nn.Conv2d(1, 1, 1), "Conv")]
)
def test_a_layer_that_is_no_product_cannot_be_quantized(layer: Layer, kind: str) -> None:
    """The error says which rule keeps it in float."""
    scales = {"odd": qparams.LayerScales(bits=Bits(8, 8), weight=torch.ones(1))}
    with pytest.raises(
        UnsupportedError,
        match=rf"layer odd is no single {kind} .*{{pattern: odd, precision: float}}",
    ):
        insert_qdq(gs.Graph(), scales, targets.TARGETS["onnxruntime"], {"odd": layer})


def test_no_path_of_this_machine_is_in_a_file(shared_bundle: Bundle, tiny_dir: Path) -> None:
    """Graphs can be handed on: no folder names, no stack traces of the exporter."""
    for target, name in EVERY:
        content = shared_bundle.graph(target, name).read_bytes()
        for text in (b"site-packages", b".py", str(tiny_dir.parent).encode()):
            assert text not in content


@pytest.mark.parametrize("target", TARGETS)
def test_many_forecasts_are_one_product(shared_bundle: Bundle, target: str) -> None:
    """All rows at once give what each gives alone, summed up slot by slot; none gives none."""
    rng = np.random.default_rng(0)
    session = make_backend("onnxruntime").session(graph_file(shared_bundle, target, "full"))
    feeds: dict[str, NDArray[Any]] = {
        "sample": rng.standard_normal((2, *SAMPLE[1:]), np.float32),
        "features": rng.standard_normal((2, FEATURES), np.float32) / 4,
        "ahead": rng.standard_normal((5, 2, FEATURES), np.float32),
        "weights": rng.standard_normal((5, SLOTS), np.float32),
    }

    def forecast(rows: slice) -> NDArray[Any]:
        cut = {name: feeds[name][rows] for name in ("ahead", "weights")}
        return session.run(feeds | cut, ["forecast"])["forecast"]

    together = forecast(slice(None))
    alone = np.concatenate([forecast(slice(r, r + 1)) for r in range(5)])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    assert forecast(slice(0)).shape == (0, 2, TOKENS, WIDTH)
    graph = read(shared_bundle, target, "full").graph
    (branching,) = (node for node in graph.node if node.op_type == "If")
    branches = {a.name: [node.op_type for node in a.g.node] for a in branching.attribute}
    assert branches["then_branch"].count("MatMul") == 1
    assert branches["else_branch"].count("Mul") == SLOTS
