"""Bundles of a PixArt transformer: captions in the graphs, and the same bits in both loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from ditcast.bundle import Bundle
from ditcast.calibrate import qparams
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import follow
from ditcast.errors import ConfigError
from ditcast.export.store import WeightStore
from ditcast.export.trace import trace
from ditcast.models import LoadedModel
from ditcast.runtime import Pipeline
from ditcast.runtime.audit import audit
from ditcast.runtime.backends import GraphFile, make_backend
from tests.conftest import make_bundle
from tests.pixarts import CHANNELS, OTHER, PROMPTS, TOKENS, captions, loaded
from tests.runtime.test_trajectories import psnr_db

# Codes in the place of the TIB, learned 4-bit weights, factors folded into what is stored.
W4A8: dict[str, Any] = {
    "scheme": "w4a8",
    "method": "tfmq",
    "iterations": 10,
    "rows": 16,
    "balance": "ptq4dit",
    "fsc": "all",
    "temporal": "cache",
    "cache": "fora",
    "guidance": 2.0,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Two blocks, four captions."""
    return loaded(tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="module")
def w8a8(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle in W8A8 with TaylorSeer and a quantized TIB, for all targets; guided."""
    path = tmp_path_factory.mktemp("w8a8") / "b"
    targets, keys = ("onnxruntime", "openvino", "tensorrt"), {"temporal": "tib", "fsc": "tib"}
    return make_bundle(tiny, path, targets, cache="taylor", guidance=2.0, **keys)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """One block that is told the size of the sample."""
    return loaded(tmp_path_factory.mktemp("other"), **OTHER)


@pytest.fixture(scope="module")
def w4a8(other: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle in W4A8 with FORA and stored features."""
    return make_bundle(other, tmp_path_factory.mktemp("w4a8") / "b", **W4A8)


@pytest.fixture(params=["w8a8", "w4a8"])
def each(request: pytest.FixtureRequest) -> Bundle:
    """Both bundles."""
    found: Bundle = request.getfixturevalue(request.param)
    return found


def test_parity_is_recorded(each: Bundle) -> None:
    """Every graph against torch: float ones closely, integer ones within the drift limit."""
    names = {graph.name for graph in each.manifest.graphs}
    assert names - {"add", "update"} == {"temporal", "full", "reuse", "sampler"}  # for a device
    for graph in each.manifest.graphs:
        if graph.target == "reference":
            assert graph.parity["max_abs_of_range"] <= 1e-4
        assert graph.parity["psnr_db"] >= 40


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_both_loops_make_the_same_bits(each: Bundle, target: str) -> None:
    """With a cache and guidance, one prompt and several; each prompt makes its own picture."""
    pipeline = Pipeline(each, target=target)
    for labels in ([1], [3, 0, 0]):
        host = pipeline.sample(labels, seed=1)
        np.testing.assert_array_equal(host, pipeline.sample(labels, seed=1, loop="graph"))
        assert host.std() > 0.05
    assert pipeline.plan().full_steps == 4
    assert np.abs(pipeline.sample([1], seed=1) - pipeline.sample([2], seed=1)).max() > 1e-3


@pytest.mark.parametrize(("target", "limit"), [("reference", 60), ("onnxruntime", 40)])
def test_trajectories_are_those_of_torch(
    each: Bundle, request: pytest.FixtureRequest, target: str, limit: float
) -> None:
    """Whole trajectories under the cache's plan, against the model and against its simulation."""
    slots = len(each.manifest.model.slots)
    model: LoadedModel = request.getfixturevalue({6: "tiny", 3: "other"}[slots])
    pipeline, recipe = Pipeline(each, target=target), each.manifest.recipe
    scales = qparams.of_bundle(each) if target != "reference" else QParams()
    with quantized(model.adapter, scales), torch.no_grad():
        moved = recipe.model_copy(update={"seed": 3})
        wanted = follow(model, moved, range(3), [0, 3, 2], plan=pipeline.plan())
    assert psnr_db(pipeline.sample([0, 3, 2], seed=3), wanted.numpy()) >= limit


@pytest.mark.parametrize("loop", ["host", "graph"])
def test_every_layer_runs_in_integers(each: Bundle, loop: str) -> None:
    """Seven per block, and of the TIB what is there of it; a caption's rows are counted."""
    found = audit(each, make_backend("onnxruntime"), loop)
    assert found.passed
    blocks = len(each.manifest.model.slots) // 3
    names = {layer.layer: layer for layer in found.layers}
    inside = {name for name in names if name.startswith("temporal.")}
    wanted = {"temporal.time.linear_2", "temporal.modulation"} if blocks == 2 else set()
    assert inside == wanted
    assert len(names) - len(inside) == 7 * blocks
    kv, q = names["blocks.0.cross.kv"].giga_ops, names["blocks.0.cross.q"].giga_ops
    assert 0 < kv < q  # twice as wide, for 6 tokens where the sample has 16


def test_the_graphs_hold_captions_once(w8a8: Bundle) -> None:
    """Embeddings in `temporal` and in float; the step graphs know no label."""
    table = captions()
    for name in ("temporal", "full"):
        model = onnx.load(w8a8.graph("onnxruntime", name))
        shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]
        assert shapes.count((PROMPTS + 1, TOKENS, CHANNELS)) == (1 if name == "temporal" else 0)
        for tensor in model.graph.initializer:
            if tuple(tensor.dims) == (PROMPTS + 1, TOKENS, CHANNELS):
                np.testing.assert_array_equal(numpy_helper.to_array(tensor), table.embeds.numpy())
        fused = [node for node in model.graph.node if node.op_type == "Attention"]
        masked = [len(node.input) == 4 for node in fused]
        assert masked == ([] if name == "temporal" else [False, True, False, True])


def test_other_targets(w8a8: Bundle) -> None:
    """They are near to torch too; TensorRT has attention as products, to the caption masked."""
    assert {graph.target for graph in w8a8.manifest.graphs} > {"openvino", "tensorrt"}
    for graph in w8a8.manifest.graphs:
        limit = 1e-2 if graph.target == "tensorrt" else 1e-4
        assert graph.parity["max_abs_of_range"] <= limit
    model = onnx.load(w8a8.graph("tensorrt", "full"), load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    masks = [node.name for node in model.graph.node if node.name.endswith("/scores/Add")]
    assert "Attention" not in kinds
    assert (kinds.count("Softmax"), len(masks)) == (4, 2)


def test_labels_are_captions(each: Bundle) -> None:
    """The null caption is none that can be asked for; stored features have all others."""
    pipeline = Pipeline(each)
    assert (pipeline.model.num_classes, pipeline.model.null_label) == (PROMPTS, PROMPTS)
    with pytest.raises(ConfigError, match=f"labels: got {PROMPTS}, expected 0 to {PROMPTS - 1}"):
        pipeline.sample([PROMPTS])


def test_stored_features_are_of_their_steps(w4a8: Bundle) -> None:
    with pytest.raises(ConfigError, match="steps: got 3, "):
        Pipeline(w4a8).sample([0], steps=3)


@torch.no_grad()
def test_a_slot_that_never_changes(tmp_path: Path, other: LoadedModel) -> None:
    """A caption of one token is attended to alike at every step: no increment, and no 0 / 0."""
    adapter = other.adapter
    features = adapter.temporal(torch.tensor([500.0]), torch.tensor([1]))[0]
    x = torch.randn(1, *adapter.sample_shape, generator=torch.Generator().manual_seed(0))
    shape = (len(adapter.slots), 1, *adapter.slot_shape)
    feeds = [x, features, torch.tensor([2.0, -1.0]), torch.ones(2, *shape), torch.zeros(shape)]
    feeds.append(torch.zeros(len(adapter.slots), 1))
    names = ["sample", "features", "factors", "y", "a", "slope"]
    relate = adapter.steps["relate"]
    graph = trace(relate, feeds, inputs=names, outputs=["output"], dynamic=[{}] * len(names))
    with WeightStore(tmp_path) as store:
        store.save(graph, tmp_path / "relate.onnx")
    session = make_backend("onnxruntime").session(GraphFile(path=tmp_path / "relate.onnx"))
    given = {name: feed.numpy() for name, feed in zip(names, feeds, strict=True)}
    found = session.run(given, ["output"])["output"]
    np.testing.assert_allclose(found, relate(*feeds).numpy(), rtol=0, atol=1e-5)
