"""Sessions over engines, with the device of `fake_gpu`.

What is real: the session, its buffers, their order and lifetimes, the search for engines, the
checks before a plan is loaded. The fakes have the names that the real modules have, which is
checked too.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.cache.learned import KEPT
from ditcast.calibrate import router
from ditcast.errors import BundleError, ConfigError, UnsupportedError
from ditcast.models import LoadedModel
from ditcast.runtime import Pipeline
from ditcast.runtime.backends import GraphFile, graph_file, make_backend
from ditcast.runtime.backends import tensorrt_session as sessions
from ditcast.runtime.backends.base import HostMemory
from ditcast.runtime.backends.gpu import Gpu, find_gpu
from ditcast.runtime.backends.tensorrt import EngineBuilder
from ditcast.runtime.choice import check_backend
from ditcast.runtime.engineaudit import audit_engines
from ditcast.runtime.engines import build_engines
from ditcast.settings import Settings
from tests.conftest import Cli, make_bundle
from tests.fake_gpu import FakeContext, FakeDevice, FakeEngine, plug_in

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def built(typed_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle with its engines, signed by a key of its own."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITCAST_KEY", str(folder / "engine.key"))
        shutil.copytree(typed_bundle.path, folder / "b")
        build_engines(Bundle.open(folder / "b"), EngineBuilder("tensorrt-rtx", ("8.9",)))
        yield Bundle.open(folder / "b")


@pytest.fixture
def gpu(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """A machine with the engines of the bundle."""
    return plug_in(built, monkeypatch)


@pytest.mark.parametrize("loop", ["host", "graph"])
def test_a_pipeline_over_engines(built: Bundle, gpu: FakeDevice, loop: Any) -> None:
    """The samples of ONNX Runtime on the same graphs, batches of one and two."""
    pipeline = Pipeline(built, backend="tensorrt-rtx")
    wanted = Pipeline(built, target="tensorrt")
    for labels in ([3], [1, 4], [2]):
        found = pipeline.sample(labels, seed=2, loop=loop)
        np.testing.assert_allclose(
            found, wanted.sample(labels, seed=2, loop=loop), rtol=0, atol=1e-5
        )
    assert not gpu.queue
    assert pipeline.backend.facts()["compute_capability"] == "8.9"
    assert gpu.memory
    del pipeline
    assert gpu.memory == {}


def test_a_learned_cache(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partial steps are engines with a branch per slot, in the graph loop as well."""
    monkeypatch.setenv("DITCAST_KEY", str(tmp_path / "engine.key"))
    held: NDArray[np.float32] = np.full((6, 4), KEPT, np.float32)
    held[1::2, ::2] = held[2::2, 1::2] = -KEPT
    router.save(held, tiny, tmp_path / "router.safetensors")
    keys: dict[str, Any] = {"cache": "learned", "router": str(tmp_path / "router.safetensors")}
    bundle = make_bundle(tiny, tmp_path / "b", ("tensorrt",), **keys)
    engines = build_engines(bundle, EngineBuilder("tensorrt-rtx", ("8.9",)))
    assert [x.graph for x in engines] == [
        "temporal",
        "full",
        "reuse",
        "partial",
        "add",
        "update",
        "sampler",
    ]
    rows = {"0": (1, 4, 4)}
    names = ("sample", "features", *(f"cache.{k}" for k in range(4)))
    assert engines[3].profile == dict.fromkeys(names, rows)
    audits = [
        audit for x in ("host", "graph") for audit in audit_engines(bundle, "tensorrt-rtx", x)
    ]
    assert [audit.graph for audit in audits] == ["full", "partial", "sampler"]
    for audit in audits:
        assert (audit.lost, len(audit.layers), audit.attention) == ((), 8, {"half": 2})
    plug_in(bundle, monkeypatch)
    pipeline, wanted = Pipeline(bundle, backend="tensorrt-rtx"), Pipeline(bundle, target="tensorrt")
    for labels in ([3], [1, 4]):
        for loop in ("host", "graph"):
            found, same = (p.sample(labels, seed=2, loop=loop) for p in (pipeline, wanted))
            np.testing.assert_allclose(found, same, rtol=0, atol=1e-5)
        resident = pipeline.sample(labels, seed=2)
        with monkeypatch.context() as patch:
            patch.setattr(type(pipeline.backend), "memory", HostMemory)
            np.testing.assert_array_equal(pipeline.sample(labels, seed=2), resident)


def test_buffers_are_used_again_and_given_back(built: Bundle, gpu: FakeDevice) -> None:
    session: Any = make_backend("tensorrt-rtx").session(graph_file(built, "tensorrt", "reuse"))
    feeds = {
        "sample": np.zeros((2, 3, 16, 16), np.float32),
        "features": np.zeros((2, 896), np.float32),
        "forecast": np.zeros((2, 16, 64), np.float32),
    }
    first = session.run(feeds, ["output"])["output"]
    held = set(gpu.memory)
    buffers = {"output": np.ones((2, 3, 16, 16), np.float32)}
    session.run_into(feeds, buffers)
    np.testing.assert_array_equal(buffers["output"], first)
    assert set(gpu.memory) == held  # nothing was allocated
    session.run({name: np.repeat(x, 2, axis=0) for name, x in feeds.items()}, ["output"])
    assert len(gpu.memory) == len(held)  # larger ones in the place of those
    del session
    assert gpu.memory == {}


def test_what_an_engine_does_not_take(built: Bundle, gpu: FakeDevice) -> None:
    """More rows than its profile, no value, a buffer of another shape, a run that fails."""
    del gpu
    session: Any = make_backend("tensorrt-rtx").session(graph_file(built, "tensorrt", "reuse"))
    rows = {"sample": (3, 16, 16), "features": (896,), "forecast": (16, 64)}

    def feeds(n: int) -> dict[str, Any]:
        return {name: np.zeros((n, *shape), np.float32) for name, shape in rows.items()}

    message = r"reuse.onnx: got sample \[5, 3, 16, 16\], and its engine takes \[1, .* to \[4, 3"
    with pytest.raises(ConfigError, match=message):
        session.run(feeds(5), ["output"])
    with pytest.raises(ConfigError, match="reuse.onnx: no value for its input features"):
        session.run({"sample": feeds(1)["sample"]}, ["output"])
    for buffer, message in (
        (
            np.zeros((1, 3, 16, 16), np.float32),
            r"is float32 \[1, 3, 16, 16\], expected float32 \[2",
        ),
        (np.zeros((2, 3, 16, 32), np.float32)[..., ::2], "is not contiguous and writeable"),
    ):
        with pytest.raises(ConfigError, match=f"reuse.onnx: the buffer for output {message}"):
            session.run_into(feeds(2), {"output": buffer})
    session._engine.runs_left = 0
    with pytest.raises(BundleError, match="reuse.onnx: its engine fails; .*ditcast build"):
        session.run(feeds(2), ["output"])


def test_only_its_own_engines(built: Bundle, gpu: FakeDevice, monkeypatch: Any) -> None:
    """Graphs of its target, of a bundle, signed or trusted, for this GPU."""
    del gpu
    backend = make_backend("tensorrt-rtx")
    reuse = graph_file(built, "tensorrt", "reuse")
    for graph in (graph_file(built, "reference", "full"), GraphFile(path=reuse.path)):
        with pytest.raises(UnsupportedError, match="runs the engines of target tensorrt, got .*"):
            backend.session(graph)
    with pytest.raises(UnsupportedError, match="its nodes are not timed one by one; see ditcast"):
        backend.profile(reuse, {}, 1)
    assert backend.is_integer("INT8 gemm")
    monkeypatch.setenv("DITCAST_KEY", str(built.path.parent / "other.key"))
    with pytest.raises(BundleError, match="is not signed by this user's key"):
        backend.session(reuse)
    make_backend("tensorrt-rtx", Settings(trust_engines=True)).session(reuse)
    monkeypatch.setattr(sessions, "find_gpu", lambda: Gpu("another GPU", "7.5", 1000))
    with pytest.raises(BundleError, match="is for sm89, and this GPU is sm75; run: ditcast build"):
        make_backend("tensorrt-rtx").session(reuse)


def test_a_plan_that_the_library_refuses(
    built: Bundle, gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    del gpu
    nothing = SimpleNamespace(deserialize_cuda_engine=lambda plan: None)
    monkeypatch.setattr(trt, "Runtime", lambda logger: nothing)
    backend, reuse = make_backend("tensorrt-rtx"), graph_file(built, "tensorrt", "reuse")
    with pytest.raises(BundleError, match="cannot be loaded on a GPU; run: ditcast build"):
        backend.session(reuse)


def test_without_a_gpu(cli: Cli, built: Bundle, tmp_path: Path) -> None:
    """One line; and no compile begins for engines, which have a command of their own."""
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    output = tmp_path / "out.npy"
    done = cli("sample", built.path, "-o", output, "--labels", 1, "--backend", "tensorrt-rtx")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "backend tensorrt-rtx: needs an NVIDIA GPU to run, and no driver or device" in line
    with pytest.raises(ConfigError, match="backend: tensorrt runs engines, .*--target tensorrt, "):
        check_backend("tensorrt", Settings())


def test_the_names_are_those_of_the_library() -> None:
    """What the fakes stand for."""
    for fake, real in (
        (FakeEngine, trt.ICudaEngine),
        (FakeContext, trt.IExecutionContext),
    ):
        used = {n for n in vars(fake) if n.startswith(("get_", "set_", "create_", "execute_"))}
        assert used
        assert used <= set(dir(real))


def test_the_library_has_what_sessions_use() -> None:
    """Every name that the module takes from it, by whatever variable."""
    owners: dict[str, Any] = {
        "self._context": trt.IExecutionContext,
        "self._engine": trt.ICudaEngine,
        "engine": trt.ICudaEngine,
        "self._runtime": trt.Runtime,
        "self._trt": trt,
        "trt": trt,
    }
    used, source = set(), Path(sessions.__file__).read_text()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        owner, held = ast.unparse(node.value), None
        if owner in owners:
            held = owners[owner]
        elif owner.rpartition(".")[0] in owners:  # an enumeration of the module
            held = getattr(owners[owner.rpartition(".")[0]], owner.rpartition(".")[2])
        if held is not None:
            used.add(node.attr)
            assert hasattr(held, node.attr), ast.unparse(node)
    assert used >= {"execute_async_v3", "num_io_tensors", "deserialize_cuda_engine", "OUTPUT"}


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool, which is in no package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("gpu_check")


def test_the_check_of_a_gpu(
    built: Bundle, gpu: FakeDevice, gpu_check: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """All that `tools/gpu_check.py` does once there is one."""
    backend: Any = make_backend("tensorrt-rtx")
    rows = gpu_check.check(built, backend, runs=1, images=2)
    assert [(row["loop"], row["cache"]) for row in rows] == [
        ("host", "none"),
        ("host", "fora"),
        ("graph", "fora"),
    ]
    assert [row["full_steps"] for row in rows] == [6, 4, 4]
    assert min(row["psnr_db"] for row in rows) > 60
    assert rows[0]["step_psnr_db"] > 60
    assert set(rows[0]["plan_bytes"]) == {
        "temporal",
        "full",
        "reuse",
        "add",
        "update",
        "sampler",
    }
    none, fora, graph = (row["memory_mib"] for row in rows)
    assert fora > none > graph > 0  # the buffers of a reuse step, and none of the steps' at all
    row = gpu_check.float32(built, backend, EngineBuilder("tensorrt-rtx", ("8.9",)), 1)
    assert row["step_psnr_db"] > 100
    assert row["memory_mib"] > 0
    assert gpu.used() == 0
    assert row["plan_bytes"]["full"] > 4 * 2 * 12 * 64 * 64  # the weights of two blocks
    gpu_check.report([row, *rows])
    table = capfd.readouterr().out
    assert "w8a8" in table
    assert "float32" in table


def test_the_check_without_a_gpu(
    built: Bundle, gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(built.path)])
    with pytest.raises(SystemExit) as done:
        gpu_check.main()
    assert done.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("gpu_check: error: backend tensorrt: needs an NVIDIA GPU to check a")
