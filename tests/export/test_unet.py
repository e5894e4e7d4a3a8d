"""Bundles of U-Nets: integer convolutions, DeepCache, and the same bits in both loops."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from ditcast.bundle import Bundle
from ditcast.calibrate import qparams
from ditcast.calibrate.codes import weight_scale
from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.qparams import LayerScales, QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import follow
from ditcast.errors import ConfigError
from ditcast.export.quantize import insert_qdq
from ditcast.export.store import WeightStore
from ditcast.export.targets import TARGETS
from ditcast.export.trace import trace
from ditcast.models import LoadedModel
from ditcast.recipe import Bits
from ditcast.runtime import Pipeline
from ditcast.runtime.audit import audit
from ditcast.runtime.backends import GraphFile, make_backend
from tests.conftest import make_bundle
from tests.runtime.test_trajectories import psnr_db
from tests.unets import CLASSES, CONDITIONAL, OTHER, TINY, loaded

# Everything at once: 4-bit weights with learned codes, scales per step, a quantized TIB, DDPM.
W4A8: dict[str, Any] = {
    "scheme": "w4a8",
    "method": "tfmq",
    "iterations": 10,
    "rows": 16,
    "fsc": "all",
    "temporal": "tib",
    "cache": "taylor",
    "sampler": "ddpm",
    "guidance": 1.0,
}


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A class-conditional U-Net with a null label."""
    return loaded(tmp_path_factory.mktemp("unet"), CLASSES, **CONDITIONAL)


@pytest.fixture(scope="module")
def w8a8(conditional: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle in W8A8 with FORA, over DeepCache's branch here; guided."""
    return make_bundle(conditional, tmp_path_factory.mktemp("w8a8") / "b")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """An unconditional U-Net of the other kind, with attention in its middle only."""
    levels = {key: TINY[key] for key in ("down_block_types", "up_block_types")}
    return loaded(tmp_path_factory.mktemp("plain"), **(OTHER | levels))


@pytest.fixture(scope="module")
def w4a8(plain: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle in W4A8 with TaylorSeer, for both CPU targets."""
    path = tmp_path_factory.mktemp("w4a8") / "b"
    return make_bundle(plain, path, ("onnxruntime", "openvino"), **W4A8)


@pytest.fixture(params=["w8a8", "w4a8"])
def each(request: pytest.FixtureRequest) -> Bundle:
    """Both bundles."""
    found: Bundle = request.getfixturevalue(request.param)
    return found


def test_parity_is_recorded(each: Bundle) -> None:
    """Every graph against torch: float ones closely, integer ones within the drift limit."""
    assert {graph.name for graph in each.manifest.graphs} == {
        "temporal",
        "full",
        "reuse",
        "sampler",
    }
    for graph in each.manifest.graphs:
        quantized_ = graph.target != "reference" and graph.name != "temporal"
        if not quantized_:
            assert graph.parity["max_abs_of_range"] <= 1e-4
        assert graph.parity["psnr_db"] >= 40


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_both_loops_make_the_same_bits(each: Bundle, target: str) -> None:
    """With a cache, guided where there is a null label, one image and several."""
    pipeline = Pipeline(each, target=target)
    for labels in ([0], [pipeline.model.num_classes - 1, 0, 0]):
        host = pipeline.sample(labels, seed=1)
        np.testing.assert_array_equal(host, pipeline.sample(labels, seed=1, loop="graph"))
        assert host.std() > 0.05


@pytest.mark.parametrize(("target", "limit"), [("reference", 60), ("onnxruntime", 40)])
def test_trajectories_are_those_of_torch(
    each: Bundle, request: pytest.FixtureRequest, target: str, limit: float
) -> None:
    """Whole trajectories under the cache's plan, against the model and against its simulation."""
    name = "conditional" if each.manifest.model.classes else "plain"
    model: LoadedModel = request.getfixturevalue(name)
    pipeline, recipe = Pipeline(each, target=target), each.manifest.recipe
    scales = qparams.of_bundle(each) if target != "reference" else QParams()
    indices = range(2)
    with quantized(model.adapter, scales), torch.no_grad():
        wanted = follow(
            model, recipe.model_copy(update={"seed": 3}), indices, [0, 0], plan=pipeline.plan()
        )
    assert psnr_db(pipeline.sample([0, 0], seed=3), wanted.numpy()) >= limit


def test_a_reuse_step_costs_and_changes_something(w8a8: Bundle) -> None:
    """The cache is used, and its forecasts are no full steps."""
    pipeline = Pipeline(w8a8)
    assert pipeline.plan().full_steps == 4
    assert not np.array_equal(pipeline.sample([1]), pipeline.sample([1], cache="none"))
    assert pipeline.sample([1], cache="taylor").shape == (1, 3, 8, 8)


def nodes(bundle: Bundle, target: str, name: str) -> dict[str, onnx.NodeProto]:
    """The nodes of a step graph by name."""
    model = onnx.load(bundle.graph(target, name), load_external_data=False)
    return {node.name: node for node in model.graph.node}


@pytest.mark.parametrize("name", ["full", "reuse"])
def test_convolutions_in_the_file(w8a8: Bundle, name: str) -> None:
    """u8 inputs with zero point 128, s8 weights per output channel, one MatMul over windows."""
    model = onnx.load(w8a8.graph("onnxruntime", name))
    found = {node.name: node for node in model.graph.node}
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    deep = {"blocks.1.conv", "blocks.2.conv1", "blocks.2.shortcut"}
    for layer in ("blocks.0.conv1", *(deep if name == "full" else ())):
        zero = held[found[f"{layer}/QuantizeLinear"].input[2]]
        assert (zero.dtype.name, int(zero)) == ("uint8", 128)
        codes, scale = held[f"{layer}/weight/codes"], held[f"{layer}/weight/scale"]
        window = 1 if layer.endswith("shortcut") else 9
        assert (codes.dtype.name, codes.shape) == ("int8", (window * 16, len(scale)))
        assert found[f"{layer}/MatMul"].input[1] == f"{layer}/weight"
        assert f"{layer}/Conv" not in found
    assert {layer for layer in deep if f"{layer}/MatMul" in found} == (
        deep if name == "full" else set()
    )
    assert [node.op_type for node in found.values()].count("Conv") == 2  # the first and the last


def test_other_targets_keep_the_convolution(w4a8: Bundle) -> None:
    """s8 codes before a Conv, 4-bit weights of the shape of the kernel behind a Cast."""
    found = nodes(w4a8, "openvino", "full")
    conv = found["blocks.0.conv1/Conv"]
    assert found["blocks.0.conv1/DequantizeLinear"].output[0] == conv.input[0]
    assert found["blocks.0.conv1/weight/DequantizeLinear"].output[0] == conv.input[1]
    assert "blocks.0.conv1/weight/Cast" in found
    model = onnx.load(w4a8.graph("openvino", "full"), load_external_data=False)
    kinds = {
        t.name.removesuffix("/int4"): (t.data_type, list(t.dims)) for t in model.graph.initializer
    }
    assert kinds["blocks.0.conv1/weight/codes"] == (TensorProto.INT4, [16, 16, 3, 3])


@pytest.mark.parametrize("loop", ["host", "graph"])
def test_every_layer_runs_in_integers(each: Bundle, loop: str) -> None:
    found = audit(each, make_backend("onnxruntime"), loop)
    assert found.passed
    assert each.manifest.quantization is not None
    assert len(found.layers) == len(each.manifest.quantization.layers) > 20
    names = {layer.layer: layer for layer in found.layers}
    assert names["blocks.0.conv1"].giga_ops > 0


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_convolution_in_float_fails_the_audit(w4a8: Bundle, tmp_path: Path, target: str) -> None:
    """Whatever its form, it is named."""
    if target == "openvino":
        pytest.importorskip("openvino")
    bundle = Bundle.open(_copy(w4a8, tmp_path / "b"))
    model = onnx.load(bundle.graph(target, "full"))
    victim = "blocks.0.conv1"
    for node in model.graph.node:  # the product reads its input before it was rounded
        if node.name in (f"{victim}/MatMul", f"{victim}/Conv"):
            (source,) = (n for n in model.graph.node if n.output[0] == node.input[0])
            source.op_type, source.input[1:] = "Cast", []
            source.attribute.append(onnx.helper.make_attribute("to", TensorProto.FLOAT))
    bundle.staged(f"graphs/{target}/full.onnx").write_bytes(model.SerializeToString())
    bundle.commit({})
    found = audit(Bundle.open(bundle.path), make_backend(target))
    assert [layer.layer for layer in found.lost] == [victim]
    assert not found.passed


def _copy(bundle: Bundle, path: Path) -> Path:
    shutil.copytree(bundle.path, path)
    return path


def test_guidance_needs_a_null_label(w4a8: Bundle) -> None:
    """The host loop refuses it; the graph, which cannot, is not moved by its scale."""
    pipeline = Pipeline(w4a8)
    with pytest.raises(ConfigError, match="guidance: got 1.5, but the model has no null label"):
        pipeline.sample([0], guidance=1.5)
    noise = np.random.default_rng(0).standard_normal((7, 1, 3, 8, 8), np.float32)
    feeds = {"noise": noise[0], "class_labels": np.zeros(1, np.int64), "step_noise": noise[1:]}
    found = [
        pipeline.session("sampler").run(
            feeds | {"guidance_scale": np.array(scale, np.float32)}, ["latents"]
        )["latents"]
        for scale in (1.0, 9.0)
    ]
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("label", [1, -1])
def test_without_classes_the_label_is_0(w4a8: Bundle, label: int) -> None:
    with pytest.raises(ConfigError, match=f"labels: got {label}, expected 0 to 0"):
        Pipeline(w4a8).sample([0, label])


class _Alone(nn.Module):
    """One layer under a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


GEOMETRIES: dict[str, Callable[[], nn.Conv2d]] = {
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "stride": lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1),
    "1x1": lambda: nn.Conv2d(5, 7, 1),
    "oblong, no bias": lambda: nn.Conv2d(5, 7, (1, 3), padding=(0, 1), bias=False),
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_one_convolution_is_its_simulation(tmp_path: Path, geometry: str, target: str) -> None:
    """To the last rounding: the same codes in every form, whatever the geometry."""
    torch.manual_seed(0)
    original = GEOMETRIES[geometry]().requires_grad_(False)
    x = torch.randn(2, 5, 8, 6)
    weight = weight_scale(original.weight.data, search=False, bits=8)
    scales = LayerScales(bits=Bits(8, 8), weight=weight, activation=torch.tensor(0.02))
    layer = QuantizedLayer(original, scales)
    wanted = layer(x)
    layer.exact = True
    rows = Dim("N")
    names: dict[str, Any] = {"inputs": ["x"], "outputs": ["y"], "dynamic": [{0: rows}]}
    graph = trace(_Alone(layer).eval(), [x], **names, layers=["layer"])
    insert_qdq(graph, {"layer": scales}, TARGETS[target], {"layer": original})
    with WeightStore(tmp_path) as store:
        store.save(graph, tmp_path / "y.onnx")
    session = make_backend("onnxruntime").session(GraphFile(path=tmp_path / "y.onnx"))
    found = session.run({"x": x.numpy()}, ["y"])["y"]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=2e-6)
    assert np.abs(found - original(x).numpy()).max() > 1e-3  # it is rounded
