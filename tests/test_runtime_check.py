"""`tools/runtime_check.py`: the codes of ONNX Runtime beside those of the simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ditcast.bundle import Bundle

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


def test_a_bundle_without_such_layers(blocks_bundle: Bundle) -> None:
    """One whose model is there, but not a graph that this compares."""
    done = run(blocks_bundle.path, "--images", 2)
    assert done.returncode == 2
    assert done.stderr.startswith("runtime_check: error: ")
    assert "onnxruntime" in done.stderr


def test_no_bundle(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "runtime_check: error: bundle: no manifest.json in" in done.stderr
