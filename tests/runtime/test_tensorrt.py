"""Engines of TensorRT for RTX, built for real: what is kept, what is lost, what is refused."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from ditcast.bundle import Bundle
from ditcast.errors import ConfigError, DitcastError, MissingDependencyError, UnsupportedError
from ditcast.manifest import Engine as Section
from ditcast.manifest import Layer
from ditcast.options import ENGINE_BACKENDS
from ditcast.runtime.backends import GraphFile
from ditcast.runtime.backends.enginelog import EngineLayer, parse_layers, weights_bytes
from ditcast.runtime.backends.gpu import find_gpu
from ditcast.runtime.backends.tensorrt import LIBRARIES, EngineBuilder
from ditcast.runtime.engineaudit import EngineAudit, audit_layers
from ditcast.runtime.engines import profile_of
from tests import qdq

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt

ROWS = {"x": {0: (1, 4, 8)}}
AGAIN = "export its graphs with: ditcast export BUNDLE --target tensorrt"
SECTION = Section(
    graph="one",
    backend="tensorrt-rtx",
    version="1",
    device="sm89",
    flags=(),
    profile={},
    made_from="",
    key="",
    path="",
    layers="",
    weights_bytes=0,
    build_s=0.0,
)


def builder(*capabilities: str) -> EngineBuilder:
    """TensorRT for RTX, for an Ada GPU unless others are named."""
    return EngineBuilder("tensorrt-rtx", capabilities or ("8.9",))


def built(model: onnx.ModelProto, folder: Path, precision: str, *capabilities: str) -> EngineAudit:
    """The audit of a graph of one layer."""
    path = qdq.save(model, folder)
    layers = parse_layers(builder(*capabilities).build(GraphFile(path=path), ROWS).listing)
    expected = Layer(name="layer", block="", precision=precision, shape=(1, 1), positions=1)
    return audit_layers("one", SECTION, [expected], layers)


DEVICES = {"fp8": ("8.9", "12.0")}
BLOCKS = np.random.default_rng(1).uniform(0.005, 0.02, (4, qdq.N))
KEPT: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "int8": (qdq.linear, "w8a8", "INT8 gemm"),
    "int8 convolution": (qdq.convolution, "w8a8", "INT8 convolution"),
    "int4 blocks": (
        lambda: qdq.weight_only(qdq.packed(TensorProto.INT4, qdq.NARROW), BLOCKS, 0, 32),
        "w4a16",
        "INT4-weight gemm",
    ),
    "fp8": (qdq.fp8, "fp8", "FP8 gemm"),
    "fp8 convolution": (lambda: qdq.fp8(qdq.convolution()), "fp8", "FP8 convolution"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(tmp_path: Path, name: str) -> None:
    make, precision, kernel = KEPT[name]
    found = built(make(), tmp_path, precision, *DEVICES.get(precision, ()))
    assert found.lost == ()
    assert found.products == {kernel: 1}


def test_fp4(tmp_path: Path) -> None:
    """With scales on two levels and inputs in fp4 as well; a weight alone is lost in silence."""
    assert built(qdq.nvfp4(), tmp_path, "w4a16", "12.0").products == {"FP4 gemm": 1}
    found = built(qdq.fp4(), tmp_path, "w4a16", "12.0")
    assert found.lines()[0] == "FLOAT layer: float gemm (wanted INT4-weight)"
    assert not found.as_json()["passed"]


def joint(apart: bool) -> onnx.ModelProto:
    """Query, key and value of 64 inputs from one product or three, and attention of two heads."""
    helper, parts, width = onnx.helper, [f"part{i}" for i in range(3)], 64
    codes, scales = np.tile(qdq.CODES[:width], 3), np.tile(qdq.SCALES, 3)
    nodes, held = list(qdq.linear().graph.node[:2]), list(qdq.linear().graph.initializer[:2])
    for i in range(3 if apart else 1):
        columns = slice(width * i, width * (i + 1)) if apart else slice(None)
        held.append(qdq.tensor(f"b{i}", np.ones((1, 1, 3 * width))[..., columns]))
        held.append(qdq.tensor(f"w{i}", codes[:, columns], np.int8))
        held.append(qdq.tensor(f"ws{i}", scales[columns]))
        restored, names = [f"wd{i}"], [f"w{i}", f"ws{i}"]
        name = f"layer/weight/DequantizeLinear/{i}"
        nodes.append(helper.make_node("DequantizeLinear", names, restored, name, axis=1))
        product, output = [f"p{i}"], [parts[i] if apart else "joint"]
        nodes.append(helper.make_node("MatMul", ["xd", *restored], product, f"layer/MatMul/{i}"))
        nodes.append(helper.make_node("Add", [*product, f"b{i}"], output, f"layer/Add/{i}"))
    if not apart:
        held.append(qdq.tensor("widths", [width] * 3, np.int64))
        nodes.append(helper.make_node("Split", ["joint", "widths"], parts, "split", axis=-1))
    held.append(qdq.tensor("shape", [0, 0, 2, 32], np.int64))
    held.append(qdq.tensor("factor", 32**-0.25, np.float16))
    held.append(qdq.tensor("flat", [0, 0, width], np.int64))
    heads = ["query", "key", "value"]
    for i, head in enumerate(heads):
        perm = [0, 2, 3, 1] if head == "key" else [0, 2, 1, 3]
        to = TensorProto.FLOAT16
        nodes.append(helper.make_node("Cast", [parts[i]], [f"half{i}"], f"cast{i}", to=to))
        nodes.append(helper.make_node("Reshape", [f"half{i}", "shape"], [f"cut{i}"], f"cut{i}"))
        turned = f"turned{i}" if i < 2 else head
        nodes.append(helper.make_node("Transpose", [f"cut{i}"], [turned], f"t{i}", perm=perm))
        if i < 2:
            nodes.append(helper.make_node("Mul", [turned, "factor"], [head], f"mul{i}"))
    nodes.append(helper.make_node("MatMul", heads[:2], ["scores"], "scores"))
    nodes.append(helper.make_node("Softmax", ["scores"], ["shares"], "softmax", axis=-1))
    nodes.append(helper.make_node("MatMul", ["shares", heads[2]], ["mixed"], "mixed"))
    nodes.append(helper.make_node("Transpose", ["mixed"], ["rows"], "t3", perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["rows", "flat"], ["half"], "r3"))
    nodes.append(helper.make_node("Cast", ["half"], ["y"], "c", to=TensorProto.FLOAT))
    return qdq.model(nodes, held, shape=("n", 16, width), output=("n", 16, width))


LOST: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "weight scales along the inputs": (
        lambda: qdq.linear(weight_scale=np.tile(qdq.SCALES, 2), axis=0),
        "w8a8",
    ),
    "an activation scale per channel": (
        lambda: qdq.linear(scale=np.tile(qdq.SCALES, 2), scale_axis=1),
        "w8a8",
    ),
    "int4 with a scale per channel": (
        lambda: qdq.weight_only(qdq.packed(TensorProto.INT4, qdq.NARROW), qdq.SCALES, 1),
        "w4a16",
    ),
    "int4 with one block per channel": (
        lambda: qdq.weight_only(qdq.packed(TensorProto.INT4, qdq.NARROW), BLOCKS[:1], 0, qdq.K),
        "w4a16",
    ),
    "heads cut out of one product": (lambda: joint(apart=False), "w8a8"),
    "fp8 with weight scales along the inputs": (
        lambda: qdq.fp8(qdq.linear(weight_scale=np.tile(qdq.SCALES, 2), axis=0)),
        "fp8",
    ),
    "fp8 with an activation scale per channel": (
        lambda: qdq.fp8(qdq.linear(scale=np.tile(qdq.SCALES, 2), scale_axis=1)),
        "fp8",
    ),
    "heads cut out of one product of fp8": (lambda: qdq.fp8(joint(apart=False)), "fp8"),
    "int8 where fp8 is wanted": (qdq.linear, "fp8"),
    "fp8 where int8 is wanted": (qdq.fp8, "w8a8"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_lost_in_silence(tmp_path: Path, name: str) -> None:
    """The build succeeds; only the audit sees it."""
    make, precision = LOST[name]
    found = built(make(), tmp_path, precision)
    assert [layer.layer for layer in found.lost] == ["layer"]
    assert found.lines()[0].startswith("FLOAT layer: ")
    assert not found.as_json()["passed"]


@pytest.mark.parametrize(("precision", "kind"), [("w8a8", "INT8"), ("fp8", "FP8")])
def test_heads_cut_out_of_several_products_are_kept(
    tmp_path: Path, precision: str, kind: str
) -> None:
    model = joint(apart=True)
    found = built(qdq.fp8(model) if precision == "fp8" else model, tmp_path, precision)
    assert found.lost == ()
    assert found.products == {f"{kind} gemm": 1}  # joined again
    assert found.attention == {"half": 1}


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    model = qdq.linear()
    model.graph.node[-1].name = "someone/else"
    found = built(model, tmp_path, "w8a8")
    assert found.lines()[0] == "FLOAT layer: missing (wanted INT8)"


OPERATORS = (
    "QLinearMatMul",
    "QLinearConv",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantizeLinear",
)
ZERO = f"a zero point that is not 0; TensorRT takes symmetric int8 only, .*; {AGAIN}"
REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "activation zero point": (
        lambda: qdq.linear(zero=3),
        rf"node layer/QuantizeLinear \(QuantizeLinear\): {ZERO}",
    ),
    "weight zero point": (
        lambda: qdq.linear(weight_zero=2),
        rf"node layer/weight/DequantizeLinear \(DequantizeLinear\): {ZERO}",
    ),
    "u8 as ONNX Runtime has it": (
        lambda: qdq.linear(zero=128, kind=np.uint8),
        rf"node layer/QuantizeLinear \(QuantizeLinear\): {ZERO}",
    ),
    "int32 bias": (
        lambda: qdq.linear(bias=True),
        r"node layer/bias/DequantizeLinear \(DequantizeLinear\): an int32 tensor behind "
        f"DequantizeLinear, such as a bias; keep biases in float; {AGAIN}",
    ),
    "uint4 weights": (
        lambda: qdq.weight_only(qdq.packed(TensorProto.UINT4, qdq.NARROW + 8), BLOCKS, 0, 32),
        r"initializer w has a type that TensorRT does not hold .*; use int8, or int4 for weights",
    ),
    "int16 activations": (
        lambda: qdq.linear(kind=np.int16),
        r"initializer z has a type that TensorRT does not hold .*; use int8, or int4 for weights",
    ),
    "blocks along the wrong axis": (
        lambda: qdq.weight_only(
            qdq.packed(TensorProto.INT4, qdq.NARROW), np.ones((qdq.K, 2)), 0, 32
        ),
        r"node layer/weight/DequantizeLinear \(DequantizeLinear\): blocks of scales along another "
        f"axis than the one that is quantized; put them along the inputs of the weight; {AGAIN}",
    ),
    "int8 in blocks of 64": (
        lambda: qdq.linear(weight_scale=BLOCKS[:2], axis=0, block=64),
        r"node layer/weight/DequantizeLinear \(DequantizeLinear\): int8 weights with scales in "
        f"blocks, .* wrong factors; use one scale per output channel, or int4; {AGAIN}",
    ),
    **{
        kind: (
            lambda kind=kind: qdq.operator(kind),  # type: ignore[misc]
            rf"node layer/{kind} \({kind}\): an operator of ONNX Runtime's, which TensorRT does "
            f"not have; write it as a float product between .*; {AGAIN}",
        )
        for kind in OPERATORS
    },
    **{
        kind: (
            lambda kind=kind: qdq.operator(kind),  # type: ignore[misc]
            rf"node layer/{kind} \({kind}\): an operator that TensorRT does not have; replace it "
            f"by standard ones, or {AGAIN}",
        )
        for kind in ("SkipLayerNormalization", "FusedMatMul")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    """In one line: the node, its operator, the reason, the remedy."""
    make, message = REFUSED[name]
    path = qdq.save(make(), tmp_path)
    with pytest.raises(
        UnsupportedError, match=f"^backend tensorrt-rtx: .*one.onnx: {message}"
    ) as e:
        builder().build(GraphFile(path=path), ROWS)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("make", "capability", "kind"),
    [
        (qdq.fp8, "8.6", "fp8_e4m3"),
        (qdq.fp4, "8.9", "fp4_e2m1"),
    ],
)
def test_a_type_that_the_device_lacks(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], capability: str, kind: str
) -> None:
    """Refused at once, and not at the end of a build."""
    message = (
        f"{kind} is a type that this device does not multiply; int4 needs compute capability 8.0 "
        "or newer, fp8 needs 8.9, fp4 needs 12.0: build for one of these, or compile with"
    )
    with pytest.raises(UnsupportedError, match=message):
        built(make(), tmp_path, "w8a8", capability)


@pytest.mark.parametrize(("graph", "builds"), [("full", 6), ("sampler", 3)])
def test_plans_are_the_same_bytes(
    typed_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str, builds: int
) -> None:
    """Whatever the environment, the seed of hashes, and the folder, which differ by user.

    One may be another: beside other work, one of about 290 is (see the module).
    """
    profile, here = profile_of(typed_bundle.manifest, graph), typed_bundle.graph("tensorrt", graph)
    elsewhere = tmp_path / "a folder with a long name" / here.name
    shutil.copytree(here.parent, elsewhere.parent)
    plans = []
    for seed, path in enumerate([here, *[elsewhere] * (builds - 1)]):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        monkeypatch.setenv("SOMETHING_LONG", "x" * 100 * seed)
        plans.append(builder("8.0", "8.9", "12.0").build(GraphFile(path=path), profile).plan)
    counts = Counter(hashlib.sha256(plan).hexdigest() for plan in plans)
    assert max(counts.values()) >= len(plans) - 1


BAD_DEVICES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "none": (
        "tensorrt-rtx",
        (),
        "compute-capability: got none, and this machine has no NVIDIA GPU; say for which",
    ),
    "unknown": (
        "tensorrt-rtx",
        ("9.0",),
        "compute-capability: got 9.0, expected one or more of 8.0, .*, 12.1; .* --backend tensorrt",
    ),
    "without float32 products": (
        "tensorrt-rtx",
        ("8.9", "7.5"),
        "compute-capability: got 7.5, expected one or more of 8.0, .* builds these graphs for no",
    ),
    "twice": ("tensorrt-rtx", ("8.9", "8.9"), "compute-capability: got 8.9 twice"),
    "tensorrt": ("tensorrt", ("8.9",), "compute-capability: TensorRT builds for the GPU of this"),
    "no GPU": ("tensorrt", (), "backend tensorrt: needs an NVIDIA GPU to build an engine, and no"),
    "no such": ("openvino", (), "backend: 'openvino' builds no engines; expected one of tensorrt"),
}


@pytest.mark.parametrize("name", BAD_DEVICES)
def test_what_cannot_be_built_here(name: str) -> None:
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    backend, capabilities, message = BAD_DEVICES[name]
    with pytest.raises(DitcastError, match=f"^{message}"):
        EngineBuilder(backend, capabilities)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    message = "package tensorrt-rtx-cu13 is needed .* pip install 'ditcast\\[tensorrt-rtx\\]'"
    with pytest.raises(MissingDependencyError, match=message):
        builder()


def test_a_killed_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the process of a build is said, and not waited for."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnsupportedError, match="ended with code 1; out of memory, if it was kill"):
        built(qdq.linear(), tmp_path, "w8a8")


def test_the_log_is_understood_or_refused() -> None:
    line = "Name: a, LayerType: gemm, Inputs: [], Constants: [], Outputs: [], TacticName: , X"
    assert parse_layers(f"Layers:\n{line}\n\nI/O Tensors:\n Name: x") == [
        EngineLayer("a", "gemm", (), (), (), ())
    ]
    with pytest.raises(UnsupportedError, match="a layer that is not understood"):
        parse_layers("Layers:\nName: a, Kind: gemm")
    with pytest.raises(UnsupportedError, match="the builder listed no layers; build again on a"):
        parse_layers("")
    assert weights_bytes(["Total Weights Memory: 12 bytes"]) == 12
    assert weights_bytes([]) == 0


def test_names_agree() -> None:
    """The command line knows them without importing the runtime."""
    assert tuple(LIBRARIES) == ENGINE_BACKENDS
    with pytest.raises(ConfigError, match="backend: 'x' builds no engines"):
        EngineBuilder("x")


def test_no_driver() -> None:
    assert find_gpu("libno-such-driver.so") is None
