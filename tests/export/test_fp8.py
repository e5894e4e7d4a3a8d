"""8-bit floats, exported: the codes of the simulation in one byte each, and no target in vain."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from ditcast.bundle import Bundle
from ditcast.calibrate import qparams
from ditcast.errors import ConfigError
from ditcast.export import to_onnx
from ditcast.models import LoadedModel
from ditcast.runtime import Pipeline
from ditcast.runtime.backends import graph_file
from tests.conftest import Cli, make_bundle
from tests.export.test_schemes import LABELS, SEED, psnr_db, simulated

E4M3 = TensorProto.FLOAT8E4M3FN
SCHEMES: dict[str, dict[str, Any]] = {
    "one range": {"scheme": "fp8"},
    "a range per step, stored features": {
        "scheme": "fp8",
        "fsc": "all",
        "balance": "smooth",
        "temporal": "cache",
        "labels": [1, 3],
    },
    "integers in the TIB and beside them": {
        "temporal": "tib",
        "rules": [
            {"pattern": "temporal.time.*linear_1", "precision": "float"},
            {"pattern": "temporal.*", "precision": "w8a8"},
            {"pattern": "*.attn.*", "precision": "fp8"},
            {"pattern": "*.mlp.*", "precision": "w8a8"},
            {"pattern": "final.*", "precision": "float"},
        ],
    },
}


def test_codes_are_stored_in_one_byte(fp8_bundle: Bundle, tiny: LoadedModel) -> None:
    """Those of the simulation, query, key and value apart; zero points and all codes are e4m3."""
    held = qparams.of_bundle(fp8_bundle).layers
    model = onnx.load(fp8_bundle.graph("tensorrt", "full"))
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    assert len(held) == 8
    for name, scales in held.items():
        wanted = scales.weight_codes(tiny.adapter.layers()[name].weight.data).T
        parts = [f"/{i}" for i in range(3)] if name.endswith("qkv") else [""]
        codes = [found[f"{name}/weight/codes{part}"] for part in parts]
        assert {tensor.data_type for tensor in codes} == {E4M3}
        assert [len(tensor.raw_data) for tensor in codes] == [wanted.numel() // len(parts)] * len(
            parts
        )
        arrays = [numpy_helper.to_array(tensor).astype("float32") for tensor in codes]
        assert torch.equal(torch.cat([torch.from_numpy(a) for a in arrays], dim=1), wanted)
        quantize = nodes[f"{name}/QuantizeLinear"]
        assert found[quantize.input[2]].data_type == E4M3
        assert not numpy_helper.to_array(found[quantize.input[2]]).astype("float32").any()
        assert not quantize.attribute  # it saturates by default
        scale = numpy_helper.to_array(found[quantize.input[1]])
        assert float(scale) == float(torch.as_tensor(scales.activation))
    assert {a.domain for a in model.opset_import} == {""}


def test_parity_is_measured_on_the_graphs(fp8_bundle: Bundle) -> None:
    """ONNX Runtime computes them, so that export knows they are those of the simulation."""
    parity = {g.name: g.parity for g in fp8_bundle.manifest.graphs if g.target == "tensorrt"}
    assert parity["full"]["psnr_db"] >= 60
    assert 0 < parity["full"]["share_of_quantization_error"] < 0.5
    assert parity["sampler"]["psnr_db"] >= 60
    file = graph_file(fp8_bundle, "tensorrt", "full")
    assert (file.e4m3, file.weight_bits) == (True, 0)
    assert not graph_file(fp8_bundle, "tensorrt", "reuse").e4m3


@pytest.mark.parametrize("name", SCHEMES)
def test_the_graphs_sample_as_the_simulation(model: LoadedModel, tmp_path: Path, name: str) -> None:
    """In both loops, at least 40 dB and closer than to full precision; a second start too."""
    bundle = make_bundle(model, tmp_path / "b", ("tensorrt",), steps=4, **SCHEMES[name])
    wanted = simulated(model, bundle)
    exact = Pipeline(bundle, target="reference").sample(LABELS, seed=SEED, cache="none")
    for _ in range(2):
        found = Pipeline(bundle, target="tensorrt").sample(LABELS, seed=SEED, cache="none")
        assert psnr_db(found, wanted) >= 40
        assert psnr_db(found, wanted) > psnr_db(exact, wanted) + 6
    pipeline = Pipeline(bundle, target="tensorrt")
    host, graph = (pipeline.sample(LABELS, seed=SEED, loop=loop) for loop in ("host", "graph"))
    assert psnr_db(graph, host) >= 40


def test_convolutions(fp8_unet: Bundle) -> None:
    """A U-Net's kernels are codes of one byte as well, one scale per output channel."""
    graph = onnx.load(fp8_unet.graph("tensorrt", "full")).graph
    kernels = [t for t in graph.initializer if t.data_type == E4M3 and len(t.dims) == 4]
    assert len(kernels) > 5
    found = Pipeline(fp8_unet, target="tensorrt").sample([1], seed=SEED, cache="none")
    exact = Pipeline(fp8_unet, target="reference").sample([1], seed=SEED, cache="none")
    assert 10 < psnr_db(found, exact) < 100


UNABLE = (
    "target: got {} with fp8, whose products it cannot run; expected tensorrt: give --target "
    "tensorrt, or compile with --scheme w8a8"
)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_targets_without_such_products(
    fp8_bundle: Bundle, tiny: LoadedModel, tmp_path: Path, target: str
) -> None:
    path = tmp_path / "b"
    shutil.copytree(fp8_bundle.path, path)
    bundle = Bundle.open(path)
    with pytest.raises(ConfigError, match=f"^{UNABLE.format(target)}$"):
        to_onnx(bundle, tiny, ["tensorrt", target])
    assert Bundle.open(path).manifest == fp8_bundle.manifest


def test_compile_asks_for_a_target_before_it_begins(
    cli: Cli, tiny_dir: Path, tmp_path: Path
) -> None:
    """No bundle is left behind."""
    done = cli("compile", tiny_dir, "-o", tmp_path / "b", "--scheme", "fp8")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"ditcast: error: {UNABLE.format('onnxruntime')}\n"
    assert not (tmp_path / "b").exists()


def test_compile_for_engines_ends_where_they_are_built(
    cli: Cli, fp8_bundle: Bundle, tiny_dir: Path, tmp_path: Path
) -> None:
    """There is nothing to audit or to measure yet."""
    path = tmp_path / "b"
    shutil.copytree(fp8_bundle.path, path)  # all is there, so that nothing is traced again
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(fp8_bundle.manifest.recipe.model_dump_json())
    done = cli("compile", tiny_dir, "-o", path, "--recipe", recipe, "--target", "tensorrt")
    assert done.code == 0, done.err
    assert done.out == f"{path}: exported; next: ditcast build {path} --backend tensorrt\n"
