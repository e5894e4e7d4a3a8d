"""The OpenVINO backend: the same pictures from the same integers, and a second start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditcast.bundle import Bundle
from ditcast.errors import ConfigError, MissingDependencyError, UnsupportedError
from ditcast.models import LoadedModel
from ditcast.runtime import Pipeline
from ditcast.runtime.audit import audit
from ditcast.runtime.backends import GraphFile, graph_file, make_backend
from ditcast.runtime.backends.onnxruntime import OnnxRuntimeSession
from ditcast.runtime.backends.openvino import OpenVinoBackend
from ditcast.settings import Settings
from tests.conftest import make_bundle

LABELS = [0, 3, 4]


@pytest.fixture(scope="module")
def backend() -> OpenVinoBackend:
    found = make_backend("openvino")
    assert isinstance(found, OpenVinoBackend)
    return found


def db(found: np.ndarray, wanted: np.ndarray) -> float:
    """PSNR over the range."""
    return float(-10 * np.log10(np.square(found - wanted).mean() / np.ptp(wanted) ** 2))


@pytest.mark.parametrize("cache", ["none", "fora"])
def test_samples_are_those_of_onnx_runtime(
    narrow_bundle: Bundle, backend: OpenVinoBackend, cache: str
) -> None:
    """The float parts may be in bfloat16, so not to the last bit."""
    wanted = Pipeline(narrow_bundle).sample(LABELS, cache=cache)
    found = Pipeline(narrow_bundle, backend=backend).sample(LABELS, cache=cache)
    assert db(found, wanted) > 40


@pytest.mark.parametrize("policy", ["relational", "first-block"])
def test_policies_decide_as_in_onnx_runtime(
    tiny: LoadedModel, backend: OpenVinoBackend, tmp_path: Path, policy: str
) -> None:
    """The host loop over OpenVINO's graphs: the same steps are full, in both precisions."""
    keys: dict[str, Any] = {"cache": policy, "scheme": "w7a8", "steps": 10, "interval": 3}
    bundle = make_bundle(tiny, tmp_path / "b", ("onnxruntime", "openvino"), **keys)
    for target, limit in (("reference", 60), (None, 40)):
        wanted, found = (
            sampled(Pipeline(bundle, backend=runs, target=target))
            for runs in ("onnxruntime", backend)
        )
        assert db(found[0], wanted[0]) > limit
        assert found[1] == wanted[1]
        assert 1 < sum(found[1]) < 10


def sampled(pipeline: Pipeline) -> tuple[np.ndarray, list[bool]]:
    """Samples, and which of their steps were full."""
    full: list[bool] = []
    return pipeline.sample(LABELS, callback=lambda step: full.append(step.full)), full


def test_a_float_graph_is_in_full_precision(
    narrow_bundle: Bundle, backend: OpenVinoBackend
) -> None:
    wanted = Pipeline(narrow_bundle, target="reference").sample(LABELS)
    found = Pipeline(narrow_bundle, backend=backend, target="reference").sample(LABELS)
    assert db(found, wanted) > 80


def test_every_layer_runs_in_integers(narrow_bundle: Bundle, backend: OpenVinoBackend) -> None:
    found = audit(narrow_bundle, backend)
    assert len(found.layers) == 8
    assert found.passed
    assert set(found.rates) == {0, 7, 8}
    assert "/" in found.layers[0].kernel


def test_a_second_start_reads_what_the_first_compiled(
    narrow_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Same samples; and a blob that cannot be read is said and compiled again."""
    monkeypatch.setenv("DITCAST_CACHE", str(tmp_path))
    first = Pipeline(narrow_bundle, backend="openvino").sample(LABELS)
    (blob,) = tmp_path.rglob("graph.blob")
    made = blob.stat().st_mtime_ns
    assert np.array_equal(Pipeline(narrow_bundle, backend="openvino").sample(LABELS), first)
    assert blob.stat().st_mtime_ns == made
    blob.write_bytes(b"x" * blob.stat().st_size)
    assert np.array_equal(Pipeline(narrow_bundle, backend="openvino").sample(LABELS), first)
    assert "cannot be read" in capsys.readouterr().err
    assert blob.read_bytes()[:1] != b"x"


def test_what_runs_once_is_read_in_place(narrow_bundle: Bundle, backend: OpenVinoBackend) -> None:
    """OpenVINO would pack a copy of the temporal weights at every start."""
    found = backend.session(graph_file(narrow_bundle, "openvino", "temporal"))
    assert isinstance(found, OnnxRuntimeSession)


def test_saturating_products_of_wide_weights_are_refused(
    narrow_bundle: Bundle, backend: OpenVinoBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "exact", False)
    file = graph_file(narrow_bundle, "openvino", "full")
    assert file.weight_bits == 7
    backend.session(file)
    wide = GraphFile(path=file.path, weight_bits=8)
    with pytest.raises(UnsupportedError, match="products saturate on this CPU, and weights of 8"):
        backend.session(wide)


def test_the_graph_loop_is_refused(narrow_bundle: Bundle, backend: OpenVinoBackend) -> None:
    pipeline = Pipeline(narrow_bundle, backend=backend)
    with pytest.raises(ConfigError, match="use --loop host, or --backend onnxruntime"):
        pipeline.sample(LABELS, loop="graph")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    monkeypatch.delitem(__import__("sys").modules, "ditcast.runtime.backends.openvino")
    with pytest.raises(MissingDependencyError, match=r"pip install 'ditcast\[openvino\]'"):
        make_backend("openvino", Settings())


@pytest.mark.parametrize(("graph", "bits", "hint"), [("temporal", 7, "f32"), ("full", 7, None)])
def test_temporal_features_stay_in_full_precision(
    backend: OpenVinoBackend,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    bits: int,
    hint: str | None,
) -> None:
    """The float parts of a quantized step are free to be bfloat16; what every step uses is not."""

    class Core:
        def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
            del model, device
            return settings

    monkeypatch.setattr(backend, "core", Core())
    file = GraphFile(path=Path(f"{graph}.onnx"), weight_bits=bits)
    settings = backend.compile(None, file, "", profiled=True)
    assert settings.get("INFERENCE_PRECISION_HINT") == hint
