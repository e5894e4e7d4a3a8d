"""The audit: what the profiler saw, not what the graph promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.runtime.audit import audit
from ditcast.runtime.backends import Backend, make_backend

VICTIM = "blocks.1.mlp.fc1"
Edit = Callable[[onnx.ModelProto], None]
WEIGHT = f"{VICTIM}/weight"


@pytest.fixture(scope="module")
def backend() -> Backend:
    """ONNX Runtime with its default threads."""
    return make_backend("onnxruntime")


def edit_full(bundle: Bundle, edit: Edit) -> None:
    """Change the integer full step and seal the bundle again."""
    model = onnx.load(bundle.graph("onnxruntime", "full"))
    edit(model)
    path = bundle.staged("graphs/onnxruntime/full.onnx")
    path.write_bytes(model.SerializeToString())
    bundle.commit({})


def restore_weight(model: onnx.ModelProto) -> None:
    """Give one layer its weight as floats, as an exporter that missed it would."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    codes, scale = (numpy_helper.to_array(held[f"{WEIGHT}/{x}"]) for x in ("codes", "scale"))
    model.graph.initializer.append(numpy_helper.from_array(codes * scale, WEIGHT))
    (node,) = (n for n in model.graph.node if n.name == f"{WEIGHT}/DequantizeLinear")
    model.graph.node.remove(node)


def rename(model: onnx.ModelProto) -> None:
    """Let one layer vanish from the graph, as far as its name tells."""
    for node in model.graph.node:
        if node.name == f"{VICTIM}/MatMul":
            node.name = "someone/else"


def all_float(bundle: Bundle) -> None:
    """Put the float graphs in the place of the integer ones."""
    for name in ("full.onnx", "weights.data"):
        content = bundle.file(f"graphs/reference/{name}").read_bytes()
        bundle.staged(f"graphs/onnxruntime/{name}").write_bytes(content)
    bundle.commit({})


@pytest.mark.parametrize(("loop", "graph"), [("host", "full"), ("graph", "sampler")])
def test_every_layer_runs_in_integers(
    shared_bundle: Bundle, backend: Backend, loop: str, graph: str
) -> None:
    """All eight, in both loops, each with the kernel and its time."""
    found = audit(shared_bundle, backend, loop)
    assert found.graph == graph
    assert shared_bundle.manifest.quantization is not None
    assert [layer.layer for layer in found.layers] == [
        layer.name for layer in shared_bundle.manifest.quantization.layers
    ]
    assert found.lost == ()
    assert all(backend.is_integer(layer.kernel) for layer in found.layers)
    assert all(layer.giga_ops > 0 for layer in found.layers)
    total = sum(found.other.values()) + sum(layer.latency_ms for layer in found.layers)
    for layer in found.layers:
        assert layer.share == pytest.approx(layer.latency_ms / total)
    assert set(found.rates) == {0, 7, 8}
    values = found.as_json()
    assert values["passed"] is True
    assert values["onnxruntime"] == backend.facts()["onnxruntime"]
    assert values["layers"][0]["block"] == "blocks.0.attn"


def test_the_golden_step_has_to_come_out(bundle: Bundle, backend: Backend) -> None:
    """Integers that compute something else, as saturating kernels do, do not pass."""
    assert audit(bundle, backend).golden_db > 60  # this very machine wrote it
    name = bundle.manifest.golden[0]
    golden, _ = tensors.load(bundle.file(name))
    golden["onnxruntime.output"] = golden["onnxruntime.output"] * np.float32(0.9)
    tensors.save(golden, bundle.staged(name))
    bundle.commit({})
    found = audit(Bundle.open(bundle.path), backend)
    assert found.lost == ()
    assert found.golden_db < 40
    assert not found.passed
    assert found.as_json()["passed"] is False


def test_the_graph_loop_of_a_stochastic_sampler(other_bundle: Bundle, backend: Backend) -> None:
    """The audit feeds the step noise too."""
    found = audit(other_bundle, backend, "graph")
    assert len(found.layers) == 4
    assert found.lost == ()


def test_one_layer_in_float_is_named(bundle: Bundle, backend: Backend) -> None:
    """Its weight is no longer integer, so no integer kernel can take it."""
    edit_full(bundle, restore_weight)
    found = audit(Bundle.open(bundle.path), backend)
    (lost,) = found.lost
    assert lost.layer == VICTIM
    assert lost.block == "blocks.1.mlp"
    assert not lost.integer
    assert found.as_json()["passed"] is False


def test_a_layer_that_vanished_is_a_failure(bundle: Bundle, backend: Backend) -> None:
    """The manifest says that it has to be there."""
    edit_full(bundle, rename)
    (lost,) = audit(Bundle.open(bundle.path), backend).lost
    assert (lost.layer, lost.kernel) == (VICTIM, "missing")


def test_float_graphs_in_the_place_of_integer_ones(bundle: Bundle, backend: Backend) -> None:
    """Everything is lost."""
    all_float(bundle)
    found = audit(Bundle.open(bundle.path), backend)
    assert len(found.lost) == len(found.layers) == 8
