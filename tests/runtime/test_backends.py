"""Backends: only exact integer products, and errors that say what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.errors import BundleError, ConfigError, MissingDependencyError, UnsupportedError
from ditcast.runtime import backends
from ditcast.runtime.backends import GraphFile, graph_file, make_backend
from ditcast.runtime.backends.onnxruntime import PROBE, OnnxRuntimeBackend, OnnxRuntimeSession
from ditcast.settings import Settings, cores


def test_largest_codes_are_multiplied_exactly() -> None:
    """255 * 127 * 64, where a saturating kernel would give about half."""
    session = make_backend("onnxruntime").session(GraphFile(path=PROBE))
    found = session.run({"x": np.full((1, 32, 64), 255, np.float32)}, ["y"])["y"]
    assert (found == 255 * 127 * 64).all()


@pytest.mark.parametrize(
    ("exact", "mode"),
    [([True], "u8 x s8"), ([False, True], "u8 x u8 (this CPU saturates u8 x s8)")],
)
def test_a_saturating_cpu_is_worked_around(
    monkeypatch: pytest.MonkeyPatch, exact: list[bool], mode: str
) -> None:
    """The probe decides which kernels are used, and reports say so."""
    answers = list(exact)
    monkeypatch.setattr(OnnxRuntimeBackend, "_multiplies_exactly", lambda self: answers.pop(0))
    assert make_backend("onnxruntime").facts()["integer_mode"] == mode
    assert not answers


def test_a_cpu_without_exact_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong images in silence would be worse."""
    monkeypatch.setattr(OnnxRuntimeBackend, "_multiplies_exactly", lambda self: False)
    with pytest.raises(UnsupportedError, match="saturate on this CPU .* use --target reference"):
        make_backend("onnxruntime")


@pytest.mark.parametrize("threads", [-1, cores() + 1])
def test_threads_are_at_most_cores(threads: int) -> None:
    """More would only wait for each other, fewer than none is a mistake."""
    with pytest.raises(ConfigError, match=f"threads: got {threads}, expected 1 to {cores()}, or 0"):
        make_backend("onnxruntime", Settings(threads=threads))


@pytest.mark.parametrize(("asked", "used"), [(0, cores()), (1, 1)])
def test_threads_that_are_used(asked: int, used: int) -> None:
    """Zero is one per core."""
    assert make_backend("onnxruntime", Settings(threads=asked)).facts()["threads"] == used


def test_an_unknown_backend_lists_the_choices() -> None:
    """A name that is none."""
    with pytest.raises(
        ConfigError, match="backend: unknown 'tensorflow'; expected one of onnxruntime"
    ):
        make_backend("tensorflow")


@pytest.mark.parametrize(("extra", "install"), [("gpu", "ditcast[gpu]"), ("", "ditcast'")])
def test_a_backend_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, extra: str, install: str
) -> None:
    """The error names the extra that brings its package."""
    monkeypatch.setitem(backends.BACKENDS, "later", ("ditcast.runtime.no_such", "Backend", extra))
    with pytest.raises(MissingDependencyError, match="backend 'later' cannot be loaded") as caught:
        make_backend("later")
    assert install in str(caught.value)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    """ONNX Runtime's own exceptions become ours."""
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="backend onnxruntime: loading .*bad.onnx fails: "):
        make_backend("onnxruntime").session(GraphFile(path=tmp_path / "bad.onnx"))


def test_profiling_gives_a_kernel_for_every_node(shared_bundle: Bundle) -> None:
    """Names as in the graph, so that layers can be found; no file is left behind."""
    backend = make_backend("onnxruntime")
    model = shared_bundle.manifest.model
    feeds: dict[str, NDArray[Any]] = {
        "timesteps": np.array([5.0], np.float32),
        "class_labels": np.array([0, model.num_classes], np.int64),
    }
    found = backend.profile(graph_file(shared_bundle, "reference", "temporal"), feeds, 2)
    assert len(found) == len({node for node, _, _ in found}) > 5
    assert all(ms >= 0 for _, _, ms in found)
    assert {"Gemm", "MatMul"} & {kernel for _, kernel, _ in found}
    shared_bundle.verify()


def test_sessions_run_on_the_cpu_only(shared_bundle: Bundle) -> None:
    """Also where ONNX Runtime has other providers: audits and timings are of the CPU's kernels."""
    session = make_backend("onnxruntime").session(graph_file(shared_bundle, "reference", "full"))
    assert isinstance(session, OnnxRuntimeSession)
    assert session._session.get_providers() == ["CPUExecutionProvider"]


def test_peak_memory_is_the_processes_own() -> None:
    """Linux hands `ru_maxrss` down: a small child of this large process must not report ours."""
    code = "from ditcast.runtime.machine import peak_memory_mib; print(peak_memory_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 150
