"""The export stage: checked against torch, refused where it cannot be, safe to kill."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cache import StepPlan
from ditcast.calibrate import calibrate
from ditcast.errors import BundleError, ParityError
from ditcast.export import parity, stage, to_onnx
from ditcast.export.body import LoopSpec
from ditcast.export.loop import sampler_graph
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.runtime import Pipeline
from ditcast.runtime.backends import GraphFile, graph_file, make_backend
from tests.conftest import RECIPE, make_bundle

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def calibrated(bundle: Bundle) -> Bundle:
    """The shared bundle as it was before its export."""
    return without_graphs(bundle)


def without_graphs(bundle: Bundle) -> Bundle:
    """As it was before its export."""
    bundle.commit({"graphs": (), "golden": ()}, replaces="graphs/")
    bundle.commit({}, replaces="golden/")
    return bundle


@pytest.mark.parametrize("name", ["temporal", "full", "reuse", "sampler"])
@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_parity_is_recorded(shared_bundle: Bundle, target: str, name: str) -> None:
    """Float graphs: 1e-4 of the range. Integer ones: near the simulation, not the float model."""
    held = {(graph.target, graph.name): graph.parity for graph in shared_bundle.manifest.graphs}
    found = held[target, name]
    if target == "onnxruntime" and name in ("full", "sampler"):
        assert found["psnr_db"] >= 40
        if name == "full":
            assert 0 <= found["share_of_quantization_error"] <= 0.5
    else:
        assert 0 <= found["max_abs_of_range"] <= 1e-4
        assert found["psnr_db"] >= 80
        assert "share_of_quantization_error" not in found


def test_golden_values_are_what_the_graphs_give(shared_bundle: Bundle) -> None:
    """Inputs of a full step and its outputs, so that any other machine can check itself."""
    assert shared_bundle.manifest.golden == ("golden/step.safetensors",)
    held = load_file(shared_bundle.file("golden/step.safetensors"))
    names, targets = ("sample", "features", "ahead", "weights"), ("reference", "onnxruntime")
    inputs = {f"{target}.input.{name}" for target in targets for name in names}
    assert held.keys() == inputs | {f"{target}.output" for target in targets}
    for target in targets:
        feeds = {name: held[f"{target}.input.{name}"] for name in names}
        assert feeds["ahead"].shape == (4, *feeds["features"].shape)
        assert feeds["weights"].tolist() == [[1, 0, 0, 0], *[[1, 1, 1, 1]] * 3]
        session = make_backend("onnxruntime").session(graph_file(shared_bundle, target, "full"))
        found = session.run(feeds, ["output"])["output"]
        np.testing.assert_allclose(found, held[f"{target}.output"], rtol=0, atol=1e-5)
    assert not np.array_equal(held["reference.output"], held["onnxruntime.output"])


@pytest.mark.parametrize(
    ("limit", "value", "graph"),
    [("FLOAT_LIMIT", -1.0, "temporal.onnx"), ("QUANTIZED_LIMIT", -1.0, "full.onnx")],
)
def test_a_graph_that_differs_is_not_kept(
    calibrated: Bundle,
    tiny: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: float,
    graph: str,
) -> None:
    """With a limit that nothing can meet, the export fails and leaves the bundle as it was."""
    monkeypatch.setattr(parity, limit, value)
    with pytest.raises(
        ParityError, match=f"{graph} differs from torch: got .* nothing was written"
    ):
        to_onnx(calibrated, tiny)
    found = Bundle.open(calibrated.path)
    assert found.verify() == 1  # the scales
    with pytest.raises(BundleError, match="no graphs yet"):
        found.graph("reference", "full")


@pytest.mark.parametrize(
    "mistake",
    [{"null_label": 0}, {"clip": 0.5}, {"table": np.ones((6, 6), np.float32)}],
    ids=lambda mistake: next(iter(mistake)),
)
def test_a_graph_loop_that_differs_is_not_kept(
    calibrated: Bundle,
    tiny: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    mistake: dict[str, Any],
) -> None:
    """Its first steps, up to a reuse step, are compared with torch as well."""

    def wrong(spec: LoopSpec) -> onnx.ModelProto:
        return sampler_graph(dataclasses.replace(spec, **mistake))

    monkeypatch.setattr(stage, "sampler_graph", wrong)
    with pytest.raises(ParityError, match="short.onnx differs from torch"):
        to_onnx(calibrated, tiny)


def other_weights(plan: StepPlan) -> StepPlan:
    """Half of every slot."""
    return StepPlan(full=plan.full, weights=plan.weights * np.float32(0.5))


def other_slots(plan: StepPlan) -> StepPlan:
    """All slots but the last."""
    weights = plan.weights.copy()
    weights[:, :, -1] = 0
    return StepPlan(full=plan.full, weights=weights)


@pytest.mark.parametrize("mistake", [other_weights, other_slots])
def test_a_graph_loop_that_forecasts_something_else_is_not_kept(
    tiny: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[StepPlan], StepPlan],
) -> None:
    """Where the second step is a reuse step, as with T=5, N=2, its forecast is compared too."""

    def wrong(spec: LoopSpec) -> onnx.ModelProto:
        return sampler_graph(dataclasses.replace(spec, plan=mistake(spec.plan)))

    keys = {"scheme": "none", "steps": 5}
    bundle = Bundle.create(tmp_path / "wrong", describe(tiny, recipes.make(RECIPE | keys)))
    calibrate(bundle, tiny)
    monkeypatch.setattr(stage, "sampler_graph", wrong)
    with pytest.raises(ParityError, match="short.onnx differs from torch"):
        to_onnx(bundle, tiny)


def test_without_a_cache_the_loop_looks_ahead_to_nothing(tiny: LoadedModel, tmp_path: Path) -> None:
    """R is 0: the graph loop has full steps only, and samples as the host loop does."""
    keys = {"scheme": "none", "cache": "none"}
    bundle = Bundle.create(tmp_path / "plain", describe(tiny, recipes.make(RECIPE | keys)))
    calibrate(bundle, tiny)
    to_onnx(bundle, tiny)
    pipeline = Pipeline(bundle, target="reference")
    host, graph = pipeline.sample([1, 4]), pipeline.sample([1, 4], loop="graph")
    np.testing.assert_array_equal(host, graph)
    assert host.std() > 0.05


def test_only_what_belongs_to_a_bundle_is_in_it(shared_bundle: Bundle) -> None:
    """The short graph loop, on which parity is measured, is gone."""
    names = {Path(name).name for name in shared_bundle.manifest.files}
    graphs = {f"{name}.onnx" for name in ("temporal", "full", "reuse", "sampler")}
    assert names == graphs | {"weights.data", "scales.safetensors", "step.safetensors"}


KILLED = """
import os, signal, sys
from pathlib import Path
from ditcast.bundle import Bundle
from ditcast.export import parity, to_onnx
from ditcast.models import load

measure, calls = parity.measure, []

def kill_in_the_second_target(*arguments, **options):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*arguments, **options)

parity.measure = kill_in_the_second_target
to_onnx(Bundle.open(Path(sys.argv[1])), load(sys.argv[2]))
"""


def test_a_killed_export_is_repeated(model: LoadedModel, tmp_path: Path) -> None:
    """`kill -9` half way: the bundle is as before, and a second run gives the usual graphs."""
    calibrated = make_bundle(model, tmp_path / "b")
    files = calibrated.manifest.files
    without_graphs(calibrated)
    command = [sys.executable, "-c", KILLED, str(calibrated.path), model.source]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -9, done.stderr
    left = calibrated.path / ".staging" / "new" / "graphs" / "reference" / "sampler.onnx"
    assert left.is_file()
    found = Bundle.open(calibrated.path)
    assert found.verify() == 1
    to_onnx(found, model)
    assert Bundle.open(found.path).manifest.files == files
    found.verify()
    assert not (found.path / ".staging").exists()


def test_an_export_that_is_up_to_date_is_left_alone(
    bundle: Bundle, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call does no work."""
    monkeypatch.setattr(stage, "make_probes", None)
    before = bundle.manifest
    to_onnx(bundle, tiny)
    assert Bundle.open(bundle.path).manifest == before


def test_a_full_disk_is_found_before_the_work(
    calibrated: Bundle, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says how much there is and how much is needed."""
    monkeypatch.setattr(stage, "make_probes", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2**20))
    with pytest.raises(BundleError, match=r"has 1 MiB free, expected at least 2 MiB .* free some"):
        to_onnx(calibrated, tiny)


def test_export_needs_the_scales_of_its_recipe(
    calibrated: Bundle, tiny: LoadedModel, tmp_path: Path
) -> None:
    """None yet, damaged ones, or those of something else."""
    empty = Bundle.create(tmp_path / "empty", describe(tiny, recipes.make(RECIPE)))
    with pytest.raises(
        BundleError, match="is not calibrated; run: ditcast calibrate .* -o .*/empty"
    ):
        to_onnx(empty, tiny)
    held = calibrated.manifest.quantization
    assert held is not None
    scales = calibrated.file(held.file)
    content = scales.read_bytes()
    scales.write_bytes(content[:-1] + b"?")
    with pytest.raises(BundleError, match="scales.safetensors in .*: SHA-256 differs"):
        to_onnx(calibrated, tiny)
    scales.write_bytes(content)
    calibrated.commit({"quantization": held.model_copy(update={"made_from": "0" * 64})})
    with pytest.raises(BundleError, match="are of another recipe; compile the bundle again"):
        to_onnx(calibrated, tiny)


def test_scheme_none_exports_float_graphs(tiny: LoadedModel, tmp_path: Path) -> None:
    """Both targets are there, and the second has no integers either."""
    bundle = Bundle.create(
        tmp_path / "float", describe(tiny, recipes.make(RECIPE | {"scheme": "none"}))
    )
    calibrate(bundle, tiny)
    to_onnx(bundle, tiny)
    for name in ("full", "sampler"):
        pair = [bundle.graph(target, name).read_bytes() for target in ("reference", "onnxruntime")]
        assert pair[0] == pair[1]
    assert bundle.verify() == 11  # 2 targets of 4 graphs and weights, the golden step


@pytest.fixture
def identity(tmp_path: Path) -> GraphFile:
    """A graph that gives back its input."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "identity.onnx")
    return GraphFile(path=tmp_path / "identity.onnx")


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.5])
def test_parity_fails_on_wrong_and_on_missing_numbers(
    identity: GraphFile, quantized: bool, wrong: float
) -> None:
    """NaN compares as neither more nor less, and must not pass for that."""
    expected, far = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.1, 0.6, 1.1])
    for x, y in (
        (torch.tensor([0.0, 0.5, wrong]), expected),
        (expected, torch.tensor([0.0, 0.5, wrong])),
    ):
        with np.errstate(invalid="ignore"), pytest.raises(ParityError, match="differs from torch"):
            parity.measure(identity, {"x": x}, {"y": y}, {"y": far} if quantized else None)


def test_parity_fails_on_a_nan_in_any_output(tmp_path: Path) -> None:
    """Also where the first output is right."""
    names = ("x", "right", "wrong")
    x, *outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in names]
    nodes = [
        helper.make_node("Identity", ["x"], ["right"]),
        helper.make_node("Log", ["x"], ["wrong"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "two.onnx")
    feed = torch.tensor([-1.0, 1.0])
    with pytest.raises(ParityError, match="got nan, expected at most 0.0001 of the range"):
        parity.measure(
            GraphFile(path=tmp_path / "two.onnx"),
            {"x": feed},
            {"right": feed, "wrong": torch.tensor([0.0, 0.0])},
        )


def test_parity_is_relative_to_the_range(identity: GraphFile) -> None:
    """An error of 0.001 in a range of 100: 1e-5 and, root mean square of 4 values, 106 dB."""
    x = torch.tensor([0.0, 50.0, 75.0, 100.0])
    y = torch.tensor([0.0, 50.001, 75.0, 100.0])
    found, outputs = parity.measure(identity, {"x": x}, {"y": y})
    assert found["max_abs_of_range"] == pytest.approx(1e-5, rel=0.01)
    assert found["psnr_db"] == pytest.approx(106, abs=0.1)
    np.testing.assert_array_equal(outputs["y"], x)


def test_a_quantized_graph_is_closer_to_its_simulation_than_to_the_float_model(
    identity: GraphFile,
) -> None:
    """Forgotten Q/DQ nodes or other scales are as far off as quantization itself: refused."""
    simulated = torch.tensor([0.0, 0.5, 1.0])
    flipped, unquantized = simulated + 1e-4, simulated + torch.tensor([5e-3, -5e-3, 0.0])
    found, _ = parity.measure(identity, {"x": flipped}, {"y": simulated}, {"y": unquantized})
    assert found["share_of_quantization_error"] < 0.05
    with pytest.raises(
        ParityError, match=r"got 1.0e\+00, expected at most 0.5 of the quantization error"
    ):
        parity.measure(identity, {"x": unquantized}, {"y": simulated}, {"y": unquantized})


def test_an_output_before_which_nothing_is_quantized(identity: GraphFile) -> None:
    """As of a first block in float: it is held to the limit of float graphs."""
    y = torch.tensor([0.0, 0.5, 1.0])
    parity.measure(identity, {"x": y + 1e-6}, {"y": y}, {"y": y})
    with pytest.raises(ParityError, match=r"1.0e-03, expected .* of y, before which nothing is qu"):
        parity.measure(identity, {"x": y + 1e-3}, {"y": y}, {"y": y})


@pytest.mark.parametrize("keys", [{}, {"fsc": "all"}], ids=["one range", "a range per step"])
def test_a_quantized_last_layer_is_quantized_in_reuse_steps_too(
    model: LoadedModel, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Rules may ask for it; the reuse step then rounds as its simulation does, in both loops."""
    rules = [{"pattern": "*", "precision": "w8a8"}]
    found = make_bundle(model, tmp_path / "b", rules=rules, **keys)
    nodes = onnx.load(found.graph("onnxruntime", "reuse"), load_external_data=False).graph.node
    assert [node.name for node in nodes if node.op_type == "QuantizeLinear"] == [
        "final.proj/QuantizeLinear"
    ]
    pipeline = Pipeline(found)
    samples = pipeline.sample([0, 3], seed=3)
    assert np.array_equal(samples, pipeline.sample([0, 3], seed=3, loop="graph"))


def test_behind_many_layers_drift_may_be_as_large_as_quantization(identity: GraphFile) -> None:
    """Under 40 dB the float model is asked: two independent roundings are no further apart."""
    simulated, drift = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([3e-2, -3e-2, 3e-2])
    feeds, expected = {"x": simulated + drift}, {"y": simulated}
    found, _ = parity.measure(identity, feeds, expected, {}, lambda: {"y": simulated - drift})
    assert found["psnr_db"] < 40
    assert found["share_of_quantization_error"] == pytest.approx(1, abs=1e-3)
    match = (
        r"got 30.5 dB, 2.00 of the quantization error, expected at least 40.0 dB, or at most 1.41"
    )
    with pytest.raises(ParityError, match=match):
        parity.measure(identity, feeds, expected, {}, lambda: {"y": simulated - drift / 2})
