"""Every way to quantize, exported and run: the graphs compute what the simulation computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from ditcast.bundle import Bundle
from ditcast.calibrate import qparams
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import sample
from ditcast.errors import ConfigError, DitcastError
from ditcast.models import LoadedModel
from ditcast.runtime import Pipeline
from ditcast.runtime.audit import audit
from ditcast.runtime.backends import GraphFile, graph_file, make_backend
from ditcast.runtime.bench import bench
from ditcast.schedule import from_config
from tests.conftest import make_bundle

LABELS = [3, 1]
SEED = 5
QUICK: dict[str, Any] = {"steps": 4, "iterations": 20, "rows": 24}
MIXED = [  # weights of 4 or 8 bits in the TIB beside codes of 6: neither is always better
    {"pattern": "temporal.time.*.linear_1", "precision": "float"},
    {"pattern": "temporal.modulation.*", "precision": "w4a8"},
    {"pattern": "temporal.*", "precision": "w8a8"},
    {"pattern": "blocks.*", "precision": "w8a8"},
    {"pattern": "final.*", "precision": "float"},
]
SCHEMES: dict[str, dict[str, Any]] = {
    "w4a8": {"scheme": "w4a8", "method": "tfmq"},
    "w4a16": {"scheme": "w4a16", "method": "mse"},
    "w4a16 in groups": {"scheme": "w4a16", "method": "mse", "group": 16},
    "w6a6": {"scheme": "w6a6", "method": "brecq"},
    "a range per step": {"fsc": "all"},
    "tib": {"scheme": "w4a8", "temporal": "tib", "method": "tfmq"},
    "cache": {"temporal": "cache", "labels": [1, 3]},
    "select": {
        "temporal": "select",
        "labels": [1, 3],
        "scheme": "w6a6",
        "rules": MIXED,
        "fsc": "all",
        "tib_outputs": "rounded",
    },
    "balanced": {"balance": "ptq4dit", "fsc": "all", "temporal": "tib", "scheme": "w6a6"},
}
VECTORS = 6 + 2  # modulations of a block and of the final layer
TARGETS = ("reference", "onnxruntime")
Made = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def made(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The bundle of a scheme, made once; never write to it."""
    held: dict[str, Bundle] = {}

    def find(name: str) -> Bundle:
        if name not in held:
            path = tmp_path_factory.mktemp("schemes") / "scheme.bundle"
            held[name] = make_bundle(model, path, **(QUICK | SCHEMES[name]))
        return held[name]

    return find


def scales(bundle: Bundle) -> QParams:
    """What calibration found."""
    assert bundle.manifest.quantization is not None
    return qparams.load(bundle.file(bundle.manifest.quantization.file))


def simulated(model: LoadedModel, bundle: Bundle, steps: int = 4) -> NDArray[np.float32]:
    """The quantized model in torch, without a cache."""
    with quantized(model.adapter, scales(bundle)):
        found: NDArray[np.float32] = sample(
            model.adapter,
            from_config(model.scheduler),
            sampler="ddim",
            steps=steps,
            guidance=2.0,
            seed=SEED,
            indices=range(len(LABELS)),
            labels=LABELS,
        ).numpy()
    return found


def psnr_db(a: NDArray[Any], b: NDArray[Any]) -> float:
    """PSNR over all samples, of the range of `b`."""
    error = np.sqrt(np.mean((a.astype(np.float64) - b) ** 2))
    return float(20 * np.log10(np.ptp(b) / max(error, 1e-12)))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_runtime_samples_as_the_simulation(model: LoadedModel, made: Made, name: str) -> None:
    """At least 40 dB, since a flipped code is amplified, and closer than to full precision."""
    bundle = made(name)
    found = Pipeline(bundle).sample(LABELS, seed=SEED, cache="none")
    exact = Pipeline(bundle, target="reference").sample(LABELS, seed=SEED, cache="none")
    wanted = simulated(model, bundle)
    assert psnr_db(found, wanted) >= 40
    assert psnr_db(found, wanted) > psnr_db(found, exact) + 6


@pytest.mark.parametrize("name", SCHEMES)
def test_both_loops_are_the_same(made: Made, name: str) -> None:
    """With FORA at interval 2, to the last bit; and they sample something."""
    pipeline = Pipeline(made(name))
    host, graph = (pipeline.sample(LABELS, seed=SEED, loop=loop) for loop in ("host", "graph"))
    np.testing.assert_array_equal(host, graph)
    assert host.std() > 0.05


@pytest.mark.parametrize("loop", ["host", "graph"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_audit_passes(
    made: Made, monkeypatch: pytest.MonkeyPatch, name: str, loop: str
) -> None:
    """Integer kernels where inputs are integers; every layer of the manifest is there."""
    monkeypatch.setattr("ditcast.runtime.audit.rates", lambda backend: {})  # takes a second
    bundle = made(name)
    found = audit(bundle, make_backend("onnxruntime"), loop)
    assert bundle.manifest.quantization is not None
    listed = [layer.name for layer in bundle.manifest.quantization.layers]
    assert sorted(layer.layer for layer in found.layers) == sorted(listed)
    assert found.lost == ()
    assert found.passed
    weights_only = SCHEMES[name].get("scheme") == "w4a16"
    assert {layer.integer for layer in found.layers} == {not weights_only}
    assert {layer.wanted for layer in found.layers} == {not weights_only}


def tensors(bundle: Bundle, graph: str) -> dict[str, TensorProto]:
    """The initializers of a graph of the integer target, without their bytes."""
    model = onnx.load(bundle.graph("onnxruntime", graph), load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}


def nodes(bundle: Bundle, graph: str) -> dict[str, onnx.NodeProto]:
    """The nodes of a graph of the integer target by name."""
    model = onnx.load(bundle.graph("onnxruntime", graph), load_external_data=False)
    return {node.name: node for node in model.graph.node}


@pytest.mark.parametrize("name", ["w4a8", "w4a16", "w4a16 in groups", "tib"])
def test_4_bit_weights_take_half_a_byte(model: LoadedModel, made: Made, name: str) -> None:
    """INT4 in the graph and on disk, widened to INT8 only where an integer kernel takes them."""
    bundle = made(name)
    linears = model.adapter.layers() | model.adapter.temporal_linears()
    assert bundle.manifest.quantization is not None
    for layer in bundle.manifest.quantization.layers:
        graph = "temporal" if layer.name.startswith("temporal.") else "full"
        codes = tensors(bundle, graph)[f"{layer.name}/weight/codes/int4"]
        assert codes.data_type == TensorProto.INT4
        assert tuple(codes.dims) == tuple(linears[layer.name].weight.T.shape)
        where = {entry.key: entry.value for entry in codes.external_data}
        assert int(where["length"]) == linears[layer.name].weight.numel() // 2
        cast = nodes(bundle, graph).get(f"{layer.name}/weight/Cast")
        assert (cast is None) == (layer.precision == "w4a16")
        restore = nodes(bundle, graph)[f"{layer.name}/weight/DequantizeLinear"]
        set_ = {a.name: a.i for a in restore.attribute}
        grouped = name == "w4a16 in groups"
        assert set_ == ({"axis": 0, "block_size": 16} if grouped else {"axis": 1})


def test_the_file_is_smaller_by_an_eighth_of_every_weight(made: Made) -> None:
    """Four bits instead of 32 for each quantized weight of the block, but for scales and pages."""
    bundle = made("w4a8")
    sizes = [bundle.file(f"graphs/{t}/weights.data").stat().st_size for t in TARGETS]
    assert bundle.manifest.quantization is not None
    layers = bundle.manifest.quantization.layers
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    saved = sizes[0] - sizes[1]
    assert 3.5 * weights - 3 * 4096 * len(layers) <= saved <= 3.5 * weights


def kinds(bundle: Bundle, graph: str) -> list[str]:
    """The operators of a graph of the integer target."""
    return [node.op_type for node in nodes(bundle, graph).values()]


def test_a_cache_takes_the_place_of_the_tib(model: LoadedModel, made: Made) -> None:
    """No product is left in the graph, and no tensor of the TIB in the file.

    What there is: codes, two indices per feature, a scale and a zero point per modulation.
    """
    bundle = made("cache")
    assert not {"MatMul", "Gemm", "Sigmoid", "Cos"} & {*kinds(bundle, "temporal")}
    features = bundle.manifest.model.features
    held = [x for x in tensors(bundle, "temporal").values() if np.prod(x.dims) >= 64]
    codes = [tuple(x.dims) for x in held if x.data_type == TensorProto.INT8]
    assert codes == [(4, 3, features)]  # steps, labels with null
    assert sum(int(np.prod(x.dims)) for x in held) <= (4 * 3 + 2) * features + 2 * 4 * 3 * VECTORS
    weights = bundle.file("graphs/onnxruntime/weights.data").read_bytes()
    for linear in model.adapter.temporal_linears().values():
        assert linear.weight.numpy().tobytes() not in weights
        assert linear.weight.T.contiguous().numpy().tobytes() not in weights
    assert len(weights) < bundle.file("graphs/reference/weights.data").stat().st_size / 2


def test_a_selection_has_both(made: Made) -> None:
    """Codes, and the TIB with its Q/DQ nodes, of which one is taken per step and part."""
    bundle = made("select")
    stored = scales(bundle).stored
    assert stored is not None
    assert stored.module is not None
    assert 0 < int(stored.module.sum()) < stored.module.numel()
    found = kinds(bundle, "temporal")
    assert found.count("QuantizeLinear") >= 3  # linear_2, modulation, final
    assert "Where" in found


@torch.no_grad()
@pytest.mark.parametrize("name", ["tib", "cache", "select", "balanced", "a range per step"])
def test_temporal_features_are_those_of_the_simulation(
    model: LoadedModel, made: Made, name: str
) -> None:
    """Of all steps and stored labels; scales of stepwise layers stand behind them."""
    bundle = made(name)
    steps = from_config(model.scheduler).timesteps(4).astype(np.float32)
    labels = np.array([1, 3, 5])
    session = make_backend("onnxruntime").session(graph_file(bundle, "onnxruntime", "temporal"))
    feeds = {"timesteps": steps, "class_labels": labels}
    found = session.run(feeds, ["features"])["features"]
    held = scales(bundle)
    with quantized(model.adapter, held):
        wanted = model.adapter.temporal(torch.from_numpy(steps), torch.from_numpy(labels)).numpy()
    exact = model.adapter.temporal(torch.from_numpy(steps), torch.from_numpy(labels)).numpy()
    columns = exact.shape[-1]
    assert found.shape == wanted.shape
    stepwise = [n for n, s in held.layers.items() if s.stepwise and n.startswith("blocks.")]
    assert found.shape[-1] == columns + len(stepwise)
    np.testing.assert_array_equal(found[..., columns:], wanted[..., columns:])
    close = psnr_db(found[..., :columns], wanted[..., :columns])
    assert close >= 50
    assert close > psnr_db(found[..., :columns], exact) + 6  # and not those of full precision


def test_another_number_of_steps_finds_its_scales(model: LoadedModel, made: Made) -> None:
    """Where features are computed, ranges per step serve timesteps in between, too."""
    bundle = made("a range per step")
    found = Pipeline(bundle).sample(LABELS, seed=SEED, cache="none", steps=5)
    assert psnr_db(found, simulated(model, bundle, steps=5)) >= 40


@pytest.mark.parametrize("name", ["cache", "select"])
@pytest.mark.parametrize("loop", ["host", "graph"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"labels": [1, 2]},
            "labels: got 2, but the bundle stores the temporal features of 1, 3 only; "
            "compile one with --labels 2, or with --temporal tib",
        ),
        (
            {"steps": 3},
            "steps: got 3, but the bundle stores the temporal features of its 4 steps; "
            "compile one with --steps 3, or with --temporal tib",
        ),
        (
            {"spacing": "trailing"},
            "steps: got 4 with trailing spacing, but the bundle stores the temporal features of "
            "its 4 steps; compile one with --steps 4, or with --temporal tib",
        ),
    ],
)
def test_what_is_not_stored_is_refused(
    made: Made, name: str, loop: Any, asked: dict[str, Any], message: str
) -> None:
    """Before any session is opened; full precision computes its features and gives anything."""
    pipeline = Pipeline(made(name))
    with pytest.raises(ConfigError) as caught:
        pipeline.sample(**({"labels": LABELS, "loop": loop} | asked))
    assert str(caught.value) == message
    if loop == "host":
        reference = Pipeline(made(name), target="reference")
        assert np.isfinite(reference.sample(**({"labels": LABELS} | asked))).all()


@pytest.mark.parametrize("wrong", [{"timesteps": [1.0]}, {"class_labels": [0]}])
def test_the_graph_of_stored_features_gives_no_others(made: Made, wrong: dict[str, Any]) -> None:
    """Also a caller without the pipeline gets an error, never another label's features."""
    path = made("cache").graph("onnxruntime", "temporal")
    session = make_backend("onnxruntime").session(GraphFile(path=path))
    steps = scales(made("cache")).stored
    assert steps is not None
    right = {"timesteps": steps.timesteps.numpy()[:1], "class_labels": np.array([1])}
    assert session.run(right, ["features"])["features"].shape[:2] == (1, 1)
    key, values = next(iter(wrong.items()))
    feeds = right | {key: np.array(values, right[key].dtype)}
    with pytest.raises((DitcastError, Exception), match="out of"):
        session.run(feeds, ["features"])


def first_codes(bundle: Bundle, tmp_path: Path, layers: list[str]) -> Any:
    """A session of the integer full step that gives the codes of some layers' inputs as well."""
    graph = onnx.load(bundle.graph("onnxruntime", "full"))
    for layer in layers:
        graph.graph.output.append(
            onnx.helper.make_tensor_value_info(f"{layer}/codes", TensorProto.UINT8, None)
        )
    onnx.save(graph, tmp_path / "codes.onnx")
    return make_backend("onnxruntime").session(GraphFile(path=tmp_path / "codes.onnx"))


@torch.no_grad()
def test_codes_of_one_step_are_those_of_the_simulation(
    tiny: LoadedModel, shared_bundle: Bundle, tmp_path: Path
) -> None:
    """W8A8: at most 0.1 % of the integers that enter the layers of the first block differ."""
    held, seen = scales(shared_bundle), {}
    layers = [name for name in held.layers if name.startswith("blocks.0.")]
    assert len(layers) == 4
    rng, adapter = np.random.default_rng(0), tiny.adapter
    noise = torch.from_numpy(rng.standard_normal((16, *adapter.sample_shape), np.float32))
    with quantized(adapter, held) as simulation:
        features = adapter.temporal(torch.tensor([498.0]), torch.arange(6))[0]
        rows = features[torch.arange(16) % 6]
        feeds = {"sample": noise, "features": rows}
        feeds |= {"ahead": rows[None][:0], "weights": torch.zeros(0, len(adapter.slots))}

        def watch(name: str) -> Any:
            def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
                del module
                scale = held.layers[name].activation
                assert scale is not None
                steps = torch.round(args[0] / scale) + 128
                seen[name] = steps.clamp(0, 255).numpy()

            return simulation.layers[name].register_forward_pre_hook(hook)

        hooks = [watch(name) for name in layers]
        adapter.denoiser(*feeds.values())
        for hook in hooks:
            hook.remove()
    session = first_codes(shared_bundle, tmp_path, layers)
    given = {name: tensor.numpy() for name, tensor in feeds.items()}
    found = session.run(given, [f"{name}/codes" for name in layers])
    for name in layers:
        differ = found[f"{name}/codes"] != seen[name]
        assert differ.mean() <= 1e-3
        assert found[f"{name}/codes"].std() > 10  # they are spread over their range


def test_stored_features_are_measured_on_their_labels_and_steps(made: Made) -> None:
    """All variants make images of the same labels, and the full schedule even to warm up."""
    report = bench(made("cache"), count=3)
    rows = {row["name"]: row for row in report["variants"]}
    assert {row["samples"] for row in rows.values()} == {3}
    assert rows["w8a8"]["psnr_db"]["p50"] > 30
    assert all(row["peak_memory_mib"] for row in rows.values())


@pytest.mark.parametrize("name", ["w4a8", "tib", "a range per step", "balanced"])
def test_quantized_weights_are_held_as_codes_alone(
    model: LoadedModel, made: Made, name: str
) -> None:
    """No graph has one in float beside them, as for the sums that zero points need."""
    bundle = made(name)
    with quantized(model.adapter, scales(bundle)) as simulation:
        weights = [layer.weight().numpy() for layer in simulation.layers.values()]
    in_float = 0
    for graph in ("temporal", "full"):
        for tensor in onnx.load(bundle.graph("onnxruntime", graph)).graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2:
                values = onnx.numpy_helper.to_array(tensor)
                in_float += 1
                for weight in weights:
                    for kept in (values, values.T):
                        assert kept.shape != weight.shape or not np.allclose(kept, weight)
    assert in_float  # the first Linears of the embedders, for one
