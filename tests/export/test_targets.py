"""Targets: exported when they are asked for, each with its weights, and never halfway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from diffusers import DiTTransformer2DModel
from onnx import numpy_helper

from ditcast import recipe as recipes
from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate
from ditcast.errors import ConfigError, ParityError, UnsupportedError
from ditcast.export import to_onnx
from ditcast.export.targets import check_targets
from ditcast.manifest import WEIGHTS
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.models.dit import DiTAdapter
from tests import unets
from tests.conftest import RECIPE, TINY, Cli


def names(bundle: Bundle) -> dict[str, set[str]]:
    """The graphs of each target."""
    found: dict[str, set[str]] = {}
    for graph in bundle.manifest.graphs:
        found.setdefault(graph.target, set()).add(graph.name)
    return found


def test_a_target_is_added_to_a_bundle(bundle: Bundle, tiny: LoadedModel) -> None:
    """What is there stays as it is, byte for byte; only OpenVINO has no graph loop."""
    before = dict(bundle.manifest.files)
    to_onnx(bundle, tiny, ["openvino"])
    found = Bundle.open(bundle.path)
    steps = {"temporal", "full", "reuse"}
    assert names(found) == {
        "reference": steps | {"sampler"},
        "onnxruntime": steps | {"sampler"},
        "openvino": steps,
    }
    golden = found.manifest.golden[0]
    kept = {name: entry for name, entry in before.items() if name != golden}
    assert kept.items() <= found.manifest.files.items()
    assert {key for key in tensors.load(found.file(golden))[0] if key.endswith(".output")} == {
        "reference.output",
        "onnxruntime.output",
        "openvino.output",
    }
    assert found.verify() == len(before) + 4
    to_onnx(found, tiny, ["openvino"])  # nothing left to do
    assert Bundle.open(bundle.path).manifest == found.manifest


def test_no_file_is_a_link(narrow_bundle: Bundle) -> None:
    """The same integers lie in both folders; ONNX refuses weights with a second hard link."""
    first, second = (
        narrow_bundle.file(f"graphs/{target}/{WEIGHTS}") for target in ("onnxruntime", "openvino")
    )
    assert first.read_bytes() == second.read_bytes()
    assert {path.stat().st_nlink for path in (first, second)} == {1}


@pytest.mark.parametrize(
    ("target", "dtype", "zero"), [("onnxruntime", np.uint8, 128), ("openvino", np.int8, 0)]
)
def test_encodings_of_the_same_integers(
    narrow_bundle: Bundle, target: str, dtype: type, zero: int
) -> None:
    """Types and zero points differ; scales do not; weights of 7 bits stay within 63."""
    model = onnx.load(narrow_bundle.graph(target, "full"))
    held = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
    zeros = [value for name, value in held.items() if name.endswith("/zero_point")]
    assert len(zeros) == 8
    assert {(value.dtype.type, int(value)) for value in zeros} == {(dtype, zero)}
    codes = [value for name, value in held.items() if name.endswith("/weight/codes")]
    assert len(codes) == 8
    assert max(np.abs(value.astype(int)).max() for value in codes) == 63


def test_an_unknown_target(bundle: Bundle, tiny: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="target: unknown 'gpu'; expected one of reference"):
        to_onnx(bundle, tiny, ["gpu"])


def test_a_target_that_fails_leaves_the_bundle_as_it_was(
    bundle: Bundle, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}

    def differ(*arguments: object, **options: object) -> None:
        raise ParityError("export: full.onnx differs from torch")

    monkeypatch.setattr("ditcast.export.parity.measure", differ)
    with pytest.raises(ParityError):
        to_onnx(bundle, tiny, ["openvino"])
    assert Bundle.open(bundle.path).manifest == bundle.manifest
    assert (
        before.items()
        <= {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}.items()
    )


UNABLE = (
    "target: got tensorrt, but layer {} {}; give --target onnxruntime or openvino, which can hold "
    "it, or the rule {{pattern: {}, precision: w8a8}}"
)
CONVOLUTION = "is a convolution with 4-bit weights and float inputs"
BLOCKS = "which are not at least two blocks of 16, 32, 64, 128, as its 4-bit weights come in there"


def test_compile_asks_for_4_bit_weights_that_a_target_can_hold(cli: Cli, tmp_path: Path) -> None:
    """Before it calibrates: no bundle is left behind."""
    folder = unets.save(tmp_path / "unet", unets.CLASSES, **unets.CONDITIONAL)
    arguments = ("compile", folder, "-o", tmp_path / "b", "--scheme", "w4a16")
    done = cli(*arguments, "--target", "onnxruntime", "--target", "tensorrt")
    name = "blocks.0.conv1"
    assert (done.code, done.out) == (2, "")
    assert done.err == f"ditcast: error: {UNABLE.format(name, CONVOLUTION, name)}\n"
    assert not (tmp_path / "b").exists()


def test_a_calibrated_bundle_of_4_bit_convolutions(tmp_path: Path) -> None:
    """Those that are named take it; TensorRT's target is refused when it is added, too."""
    model = unets.loaded(tmp_path / "unet", unets.CLASSES, **unets.CONDITIONAL)
    keys = RECIPE | {"scheme": "w4a16", "cache": "none", "interval": 1}
    bundle = Bundle.create(tmp_path / "b", describe(model, recipes.make(keys)))
    calibrate(bundle, model)
    with pytest.raises(UnsupportedError, match=f"layer blocks.0.conv1 {CONVOLUTION}; give"):
        to_onnx(bundle, model, ["tensorrt"])
    to_onnx(bundle, model, ["onnxruntime", "openvino"])
    assert {"onnxruntime", "openvino"} <= names(bundle).keys()
    assert "tensorrt" not in names(bundle)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"scheme": "w4a16", "group": 8}, f"has 64 inputs in groups of 8, {BLOCKS}"),
        ({"scheme": "w4a16", "group": 64}, f"has 64 inputs in groups of 64, {BLOCKS}"),
        ({"scheme": "w4a16", "group": 32}, ""),
        ({"scheme": "w4a16"}, ""),
        ({"scheme": "w4a8"}, ""),
        ({"scheme": "w8a8", "temporal": "tib"}, ""),
    ],
)
def test_blocks_of_4_bit_weights(tiny: LoadedModel, keys: dict[str, Any], reason: str) -> None:
    """Layers of 64 and 256 inputs: two blocks of 32 are the longest that all of them have."""
    recipe = recipes.make(RECIPE | keys)
    check_targets(["reference", "onnxruntime", "openvino"], tiny, recipe)
    if not reason:
        check_targets(["tensorrt"], tiny, recipe)
        return
    name = "blocks.0.attn.qkv"
    with pytest.raises(UnsupportedError) as caught:
        check_targets(["onnxruntime", "tensorrt"], tiny, recipe)
    assert str(caught.value) == UNABLE.format(name, reason, name)


def test_inputs_that_make_no_blocks() -> None:
    """72 inputs are no multiple of 16; 4-bit weights of the TIB count too."""
    model = LoadedModel(
        source="odd",
        adapter=DiTAdapter(DiTTransformer2DModel(**(TINY | {"attention_head_dim": 36}))),
        scheduler={},
        classes=(),
        fingerprint="0",
    )
    rules = [
        {"pattern": "blocks.*", "precision": "w8a8"},
        {"pattern": "final.*", "precision": "float"},
    ]
    tib = [{"pattern": "temporal.*", "precision": "w4a8"}]
    recipe = recipes.make(RECIPE | {"temporal": "tib", "rules": rules + tib})
    with pytest.raises(UnsupportedError, match=rf"layer temporal\S+ has 72 inputs, {BLOCKS}"):
        check_targets(["tensorrt"], model, recipe)
    recipe = recipes.make(RECIPE | {"temporal": "fp", "rules": rules})
    check_targets(["tensorrt"], model, recipe)
