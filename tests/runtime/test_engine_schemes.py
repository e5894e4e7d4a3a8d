"""Engines of every kind of scheme, built for real: what the audit finds in all of their graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

from ditcast.bundle import Bundle
from ditcast.models import LoadedModel, load
from ditcast.runtime.backends import graph_file, layers_of, make_backend
from ditcast.runtime.backends.tensorrt import EngineBuilder
from ditcast.runtime.engineaudit import EngineAudit, audit_engines
from ditcast.runtime.engines import build_engines
from ditcast.schedule import from_config
from tests.conftest import make_bundle

pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]
RTX = "tensorrt-rtx"
MIXED = [  # a TIB of 4 and 8 bits beside codes of 6: neither is always better
    {"pattern": "temporal.time.*.linear_1", "precision": "float"},
    {"pattern": "temporal.modulation.*", "precision": "w4a8"},
    {"pattern": "temporal.*", "precision": "w8a8"},
    {"pattern": "blocks.*", "precision": "w8a8"},
    {"pattern": "final.*", "precision": "float"},
]


class Case(NamedTuple):
    """A recipe; the bytes of each stored feature, if there are some."""

    keys: dict[str, Any]
    stored: int = 0


CASES = {
    "cache": Case({"temporal": "cache"}, stored=1),
    "cache of 16 bits": Case({"temporal": "cache", "scheme": "w4a16", "group": 32}, stored=2),
    "select": Case(
        {"temporal": "select", "scheme": "w6a6", "rules": MIXED, "tib_outputs": "rounded"},
        stored=1,
    ),
    "tib": Case({"temporal": "tib"}),
    "tib with ranges per step": Case({"temporal": "tib", "fsc": "tib"}),
    "all with ranges per step": Case({"temporal": "tib", "fsc": "all"}),
}


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures of tests are by a key of their own."""
    monkeypatch.setenv("DITCAST_KEY", str(tmp_path / "keys" / "engine.key"))


def audited(bundle: Bundle, *capabilities: str) -> dict[str, EngineAudit]:
    """Every graph's, once all are built."""
    build_engines(bundle, EngineBuilder(RTX, capabilities or ("8.9",)))
    found = [*audit_engines(bundle, RTX, "host"), *audit_engines(bundle, RTX, "graph")]
    return {audit.graph: audit for audit in found}


def features(bundle: Bundle, target: str) -> Any:
    """Of all steps and labels, in ONNX Runtime."""
    schedule, model = from_config(bundle.manifest.schedule), bundle.manifest.model
    feeds: dict[str, Any] = {
        "timesteps": schedule.timesteps(bundle.manifest.recipe.steps).astype(np.float32),
        "class_labels": np.arange(model.num_classes),
    }
    session = make_backend("onnxruntime").session(graph_file(bundle, target, "temporal"))
    return session.run(feeds, ["features"])["features"]


@pytest.mark.parametrize("name", CASES)
def test_no_layer_is_lost(model: LoadedModel, tmp_path: Path, name: str) -> None:
    """Not in the graph of the temporal features either; what is stored is held as its codes."""
    keys, width = CASES[name]
    bundle = make_bundle(model, tmp_path / "b", ("onnxruntime", "tensorrt"), **keys)
    found = audited(bundle)
    for graph, audit in found.items():
        unpacked = graph == "sampler" and name == "cache of 16 bits"  # int4 inside a loop
        assert len(audit.lost) == (4 if unpacked else 0), audit.lines()
    inside = {graph: len(layers_of(bundle, "tensorrt", graph)) for graph in found}
    assert inside["full"] == 4
    if name == "select":  # from both sources: the TIB's layers are beside the codes
        graph = onnx.load(bundle.graph("tensorrt", "temporal"), load_external_data=False).graph
        assert {"QuantizeLinear", "Gather", "Where"} <= {node.op_type for node in graph.node}
    assert ("temporal" in found) == (name in ("select", "tib") or "step" in name)
    assert inside["sampler"] == inside["full"] + inside.get("temporal", 0)
    exact, ours = (features(bundle, target) for target in ("onnxruntime", "tensorrt"))
    if width and name != "select":
        np.testing.assert_array_equal(ours, exact)
        weights = next(e.weights_bytes for e in bundle.manifest.engines if e.graph == "temporal")
        assert exact.size * width < weights < exact.size * (width + 1)
    else:  # codes of u8 and s8 may differ at ties
        assert np.abs(ours - exact).max() <= 0.02 * np.ptp(exact)


def test_the_embedded_model(tmp_path: Path) -> None:
    """All graphs in W8A8."""
    keys: dict[str, Any] = {"steps": 20, "samples": 8, "batch": 4, "interval": 3}
    bundle = make_bundle(load("emoji"), tmp_path / "b", ("tensorrt",), **keys)
    found = audited(bundle)
    assert {engine.graph for engine in bundle.manifest.engines} == {
        "temporal",
        "full",
        "reuse",
        "add",
        "update",
        "sampler",
    }
    for graph in ("full", "sampler"):
        assert found[graph].lost == ()
        assert len(found[graph].layers) == 32
        assert found[graph].products["INT8 gemm"] == 32
        assert found[graph].attention == {"half": 8}
