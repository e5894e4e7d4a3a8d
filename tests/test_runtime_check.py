"""`tools/runtime_check.py`: the codes of ONNX Runtime beside those of the simulation."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ditcast.bundle import Bundle
from ditcast.models import LoadedModel
from tests.conftest import make_bundle

TOOL = Path(__file__).parents[1] / "tools" / "runtime_check.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_was_calibrated_is_what_runs(shared_bundle: Bundle, tmp_path: Path) -> None:
    """Few codes differ at the first, a middle and the last step; the first layer's hardly any."""
    done = run(shared_bundle.path, "--images", 2, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    assert "psnr_db_to_simulation" in done.stdout
    found = json.loads((tmp_path / "figures.json").read_text())
    steps = shared_bundle.manifest.recipe.steps
    assert list(found["codes_differing"]) == ["0", str(steps // 2), str(steps - 1)]
    for of in found["codes_differing"].values():
        assert len(of["layers"]) == len(shared_bundle.manifest.quantization.layers)  # type: ignore[union-attr]
        assert of["first_layer"] <= 1e-3
        assert of["mean"] <= 1e-2
    assert found["psnr_db_to_simulation"]["p50"] >= 40
    assert (
        found["psnr_db_to_simulation"]["p50"] > found["psnr_db_to_full_precision"]["p50"]
    )  # of the same noise


def test_codes_that_differ_are_counted(
    tiny: LoadedModel, shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth code of one layer is changed, and those of the other layers are not."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    check = importlib.import_module("runtime_check")
    samples, (step,) = check.simulated(tiny, shared_bundle, [1, 3], [0])
    assert samples.std() > 0.1
    name = "blocks.1.mlp.fc1"
    codes = step.codes[name].copy()
    codes.reshape(-1)[::4] ^= 1
    with check.giving_codes(shared_bundle, list(step.codes)) as session:
        plain = check.differing(session, step)
        found = check.differing(session, step._replace(codes=step.codes | {name: codes}))
    assert found[name] == pytest.approx(0.25, abs=2 * plain[name] + 1e-6)
    assert {k: v for k, v in found.items() if k != name} == {
        k: v for k, v in plain.items() if k != name
    }
    assert all(np.ptp(of) > 20 for of in step.codes.values())  # they are spread


def test_a_bundle_without_its_graphs(blocks_bundle: Bundle) -> None:
    """One whose model is there, but not a graph that this compares."""
    done = run(blocks_bundle.path, "--images", 2)
    assert done.returncode == 2
    assert done.stderr.startswith("runtime_check: error: ")
    assert "onnxruntime" in done.stderr


def test_a_bundle_without_such_layers(tiny: LoadedModel, tmp_path: Path) -> None:
    """Its inputs are in float."""
    bundle = make_bundle(tiny, tmp_path / "b", scheme="w4a16", method="mse")
    done = run(bundle.path, "--images", 2)
    assert done.returncode == 2
    message = "runtime_check: error: bundle: no layer has 8-bit inputs with one scale for all steps"
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", 0), "images: got 0, expected at least 1"),
        (("--json", "nowhere/f.json"), "json: no folder nowhere; create it first"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    """Said before the bundle is opened."""
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr == f"runtime_check: error: {message}\n"


def test_no_bundle(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "runtime_check: error: bundle: no manifest.json in" in done.stderr
