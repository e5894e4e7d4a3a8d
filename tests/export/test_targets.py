"""Targets: exported when they are asked for, each with its weights, and never halfway."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.errors import ConfigError, ParityError
from ditcast.export import to_onnx
from ditcast.manifest import WEIGHTS
from ditcast.models import LoadedModel


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
