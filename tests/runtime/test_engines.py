"""Engines in a bundle: found again, signed, audited; and the command line over them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.errors import BundleError, ConfigError, UnsupportedError
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.runtime import trust
from ditcast.runtime.backends import graph_file
from ditcast.runtime.backends.gpu import find_gpu
from ditcast.runtime.backends.tensorrt import EngineBuilder
from ditcast.runtime.engineaudit import audit_engines
from ditcast.runtime.engines import (
    build_engines,
    find_engine,
    layers_of,
    load_plan,
    profile_of,
)
from tests import bundles
from tests.conftest import RECIPE, Cli

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt
RTX = "tensorrt-rtx"


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures of tests are by a key of their own."""
    monkeypatch.setenv("DITCAST_KEY", str(tmp_path / "keys" / "engine.key"))


@pytest.fixture(scope="module")
def rtx() -> EngineBuilder:
    """TensorRT for RTX, for three generations of GPUs."""
    return EngineBuilder(RTX, ("8.0", "8.9", "12.0"))


def build(bundle: Bundle, path: Path, builder: EngineBuilder, *graphs: str) -> Bundle:
    """A copy of a bundle with engines."""
    shutil.copytree(bundle.path, path)
    build_engines(Bundle.open(path), builder, graphs)
    return Bundle.open(path)


def test_every_graph_is_built_and_kept(
    typed_bundle: Bundle, tmp_path: Path, rtx: EngineBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For three generations in one plan; a second build builds nothing."""
    bundle = build(typed_bundle, tmp_path / "b", rtx)
    engines = {engine.graph: engine for engine in bundle.manifest.engines}
    assert [*engines] == ["temporal", "full", "reuse", "add", "update", "sampler"]
    for engine in engines.values():
        assert engine.path.startswith(f"engines/tensorrt-rtx-{rtx.version}-sm80+sm89+sm120-")
        assert layers_of(bundle, engine)
        assert load_plan(bundle, engine, rtx.version)
    assert engines["full"].weights_bytes < engines["temporal"].weights_bytes
    bundle.verify()
    monkeypatch.setattr(EngineBuilder, "build", lambda *_: pytest.fail("built again"))
    assert build_engines(bundle, rtx) == list(engines.values())
    for loop, graph in (("host", "full"), ("graph", "sampler")):
        (found,) = audit_engines(bundle, RTX, loop)
        assert found.graph == graph
        assert found.lost == ()
        assert len(found.layers) == 8
        assert found.attention == {"half": 2}
        assert found.products["INT8 gemm"] == 8
    assert found.lines()[0].startswith("audit: 8 of 8 quantized layers of sampler.onnx kept their")


def test_policies_with_graphs_of_their_own(
    tiny: LoadedModel, tmp_path: Path, rtx: EngineBuilder
) -> None:
    """No engines are built for those; said before any work."""
    recipe = recipes.make(RECIPE | {"cache": "rfe"})
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipe))
    match = "backend tensorrt-rtx: cache rfe runs observe, relate, for which no engines are built"
    with pytest.raises(UnsupportedError, match=match):
        build_engines(bundle, rtx)


def test_4_bit_weights(blocks_bundle: Bundle, tmp_path: Path, rtx: EngineBuilder) -> None:
    """Inside the kernels of the step graph; in the graph loop they are unpacked, which is said."""
    bundle = build(blocks_bundle, tmp_path / "b", rtx, "full", "sampler")
    (step,) = audit_engines(bundle, RTX, "host")
    assert step.lost == ()
    assert {layer.kernel for layer in step.layers} == {"INT4-weight gemm"}
    (loop,) = audit_engines(bundle, RTX, "graph")
    assert len(loop.lost) == len(loop.layers) == 8
    assert "FLOAT blocks.0.mlp.fc1: half gemm (wanted INT4-weight)" in loop.lines()


@pytest.mark.parametrize("capability", ["8.9", "12.0"])
def test_8_bit_floats(fp8_bundle: Bundle, tmp_path: Path, capability: str) -> None:
    """All layers, in the step graph and inside the loop."""
    builder = EngineBuilder(RTX, (capability,))
    bundle = build(fp8_bundle, tmp_path / "b", builder, "full", "sampler")
    for loop in ("host", "graph"):
        (found,) = audit_engines(bundle, RTX, loop)
        assert found.lost == ()
        assert [(x.precision, x.kernel) for x in found.layers] == [("fp8", "FP8 gemm")] * 8
        assert found.attention == {"half": 2}
        assert "8 of 8 quantized layers" in found.lines()[0]
        assert {row[2] for row in found.rows()} == {"FP8"}


def test_convolutions_of_8_bit_floats(fp8_unet: Bundle, tmp_path: Path) -> None:
    """All of a U-Net's, in one plan for two generations."""
    builder = EngineBuilder(RTX, ("8.9", "12.0"))
    bundle = build(fp8_unet, tmp_path / "b", builder, "full", "reuse", "sampler")
    audits = [audit for loop in ("host", "graph") for audit in audit_engines(bundle, RTX, loop)]
    assert [audit.graph for audit in audits] == ["full", "reuse", "sampler"]
    for found in audits:
        assert found.lost == ()
        kinds = [layer.kernel for layer in found.layers]
        assert set(kinds) <= {"FP8 convolution", "FP8 gemm"}
        assert kinds.count("FP8 convolution") > (0 if found.graph == "reuse" else 5)


@pytest.mark.parametrize("capabilities", [("8.6",), ("8.9", "8.0")])
def test_8_bit_floats_are_not_for_older_devices(
    fp8_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: tuple[str, ...],
) -> None:
    """Said before anything is built; graphs without such layers are for all of them."""
    builder = EngineBuilder(RTX, capabilities)
    with monkeypatch.context() as patch:
        patch.setattr(EngineBuilder, "build", lambda *_: pytest.fail("built"))
        match = (
            "^backend tensorrt-rtx: scheme fp8 is not for this device: compute capability "
            f"{capabilities[-1]} multiplies no 8-bit floats, expected 8.9 or newer .*; build for "
            "such devices only, or compile with --scheme w8a8$"
        )
        with pytest.raises(UnsupportedError, match=match):
            build(fp8_bundle, tmp_path / "b", builder)
    assert build(fp8_bundle, tmp_path / "reuse", builder, "reuse").manifest.engines


@pytest.fixture(scope="module")
def signed(
    typed_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, rtx: EngineBuilder
) -> Path:
    """A bundle with the engine of its smallest graph, and the key of its signature."""
    folder = tmp_path_factory.mktemp("signed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITCAST_KEY", str(folder / "keys" / "engine.key"))
        build(typed_bundle, folder / "built", rtx, "reuse")
    return folder


@pytest.fixture
def built(signed: Path, tmp_path: Path) -> Bundle:
    """A copy that a test may damage, with its key."""
    shutil.copytree(signed, tmp_path, dirs_exist_ok=True)
    return Bundle.open(tmp_path / "built")


def test_a_plan_is_code(built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One edited byte, another description, another user's key: none of them is loaded."""
    (engine,) = built.manifest.engines
    plan = load_plan(built, engine, engine.version)
    assert trust.key_file().stat().st_mode & 0o777 == 0o600
    other = engine.model_copy(update={"device": "sm75"})
    with pytest.raises(BundleError, match="is not signed by this user's key .*--trust-engines"):
        load_plan(built, other, engine.version)
    monkeypatch.setenv("DITCAST_KEY", str(tmp_path / "other.key"))
    with pytest.raises(BundleError, match="engine: .*plan is not signed by this user's key"):
        load_plan(built, engine, engine.version)
    assert load_plan(built, engine, engine.version, trust=True) == plan
    path = built.file(engine.path)
    path.write_bytes(plan[:-1] + bytes([plan[-1] ^ 1]))
    with pytest.raises(BundleError, match="SHA-256 differs from the manifest"):
        load_plan(built, engine, engine.version, trust=True)


def test_keys_that_are_none(built: Bundle) -> None:
    (engine,) = built.manifest.engines
    trust.key_file().chmod(0o644)
    with pytest.raises(ConfigError, match="key: .* has mode 0644, expected 0600: others could"):
        load_plan(built, engine, engine.version)
    trust.key_file().chmod(0o600)
    trust.key_file().write_bytes(b"short")
    with pytest.raises(ConfigError, match="key: .* has 5 bytes, expected 32; remove it"):
        load_plan(built, engine, engine.version)


def test_engines_that_do_not_fit(built: Bundle) -> None:
    """Another version, another device, another graph: what to do is said."""
    (engine,) = built.manifest.engines
    again = f"run: ditcast build {built.path} --backend tensorrt-rtx"
    assert find_engine(built, RTX, "reuse", "sm89") == engine
    with pytest.raises(
        BundleError, match=f"of tensorrt-rtx {engine.version}, and 2.0 is .*{again}"
    ):
        load_plan(built, engine, "2.0")
    with pytest.raises(BundleError, match=f"for sm80.sm89.sm120, and this GPU is sm75; {again}"):
        find_engine(built, RTX, "reuse", "sm75")
    with pytest.raises(BundleError, match=f"has none of full.onnx for tensorrt-rtx; {again}"):
        find_engine(built, RTX, "full")
    built.staged("graphs/tensorrt/weights.data").write_bytes(b"other")
    built.commit({})
    with pytest.raises(BundleError, match=f"that of reuse.onnx is of an older graph; {again}"):
        find_engine(built, RTX, "reuse")


def test_a_stale_engine_leaves_the_bundle(built: Bundle, rtx: EngineBuilder) -> None:
    (old,) = built.manifest.engines
    graph = built.file("graphs/tensorrt/reuse.onnx").read_bytes()
    built.staged("graphs/tensorrt/reuse.onnx").write_bytes(graph.replace(b"ditcast", b"DITCAST"))
    built.commit({})
    (new,) = build_engines(built, rtx, ["reuse"])
    assert built.manifest.engines == (new,)
    assert not built.file(old.path).exists()
    assert built.file(new.path).exists()
    built.verify()


def test_profiles_follow_the_recipe() -> None:
    manifest = bundles.manifest(steps=8, batch=4, cache="fora", interval=4, guidance=2.0)
    rows = {0: (1, 8, 8)}
    assert profile_of(manifest, "full") == {
        "sample": rows,
        "features": rows,
        "ahead": {0: (0, 3, 3), 1: rows[0]},
        "weights": {0: (0, 3, 3)},
    }
    assert profile_of(manifest, "reuse")["forecast"] == rows
    assert profile_of(manifest, "temporal") == {
        "timesteps": {0: (1, 8, 8)},
        "class_labels": {0: (1, 3, 3)},  # two classes and null
    }
    unguided = bundles.manifest(batch=4, guidance=1.0, sampler="ddpm")
    assert profile_of(unguided, "full")["sample"] == {0: (1, 4, 8)}
    assert profile_of(unguided, "sampler")["step_noise"] == {1: (1, 4, 4)}


def test_the_command_line(cli: Cli, typed_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "b"
    shutil.copytree(typed_bundle.path, path)
    arguments = ["--backend", RTX, "--compute-capability", "8.9", "12.0"]
    done = cli("build", path, *arguments, "--graph", "full", "--json", tmp_path / "build.json")
    assert done.code == 0, done.err
    assert "building full.onnx for sm89+sm120" in done.err
    (engine,) = json.loads((tmp_path / "build.json").read_text())
    assert engine["device"] == "sm89+sm120"
    done = cli("audit", path, "--backend", RTX, "--json", tmp_path / "audit.json")
    assert done.code == 0, done.err
    assert "8 of 8 quantized layers of full.onnx kept their precision" in done.out
    assert json.loads((tmp_path / "audit.json").read_text())[0]["passed"]
    assert "tensorrt-rtx/full (sm89+sm120)" in cli("inspect", path).out
    done = cli("audit", path, "--backend", RTX, "--loop", "graph")
    assert (done.code, done.out) == (2, "")
    assert "has none of sampler.onnx for tensorrt-rtx; run: ditcast build" in done.err


def test_a_lost_layer_fails_the_audit(cli: Cli, built: Bundle) -> None:
    """The engine of the reuse step in the place of the full one's has none of its layers."""
    (engine,) = built.manifest.engines
    identity = graph_file(built, "tensorrt", "full").identity
    made_from = hashlib.sha256(identity.encode()).hexdigest()
    other = engine.model_copy(update={"graph": "full", "made_from": made_from})
    built.commit({"engines": (other,)})
    done = cli("audit", built.path, "--backend", RTX)
    assert done.code == 1
    assert "FLOAT blocks.0.attn.qkv: missing (wanted INT8)" in done.out


def test_what_a_build_needs(cli: Cli, shared_bundle: Bundle, built: Bundle) -> None:
    """Graphs for TensorRT, a device, a GPU: each in one line, before anything is built."""
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    ada = ["--backend", RTX, "--compute-capability", "8.9"]
    for arguments, message in (
        ([shared_bundle.path, *ada], "no graph 'temporal' for target 'tensorrt'; it has targets"),
        ([built.path, *ada, "--graph", "partial"], "graph: unknown 'partial'; expected one of"),
        ([built.path, "--backend", RTX], "compute-capability: got none, and this machine has no"),
        ([built.path, "--backend", "tensorrt"], "backend tensorrt: needs an NVIDIA GPU to build"),
    ):
        done = cli("build", *arguments)
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert message in line
