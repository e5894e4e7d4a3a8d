"""`tools/runtime_check.py`: the codes of ONNX Runtime beside those of the simulation."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from ditcast.bundle import Bundle
from ditcast.models import LoadedModel
from tests.conftest import TOOLS, Cli, make_bundle


def test_what_was_calibrated_is_what_runs(
    run_tool: Cli, shared_bundle: Bundle, tmp_path: Path
) -> None:
    """Few codes differ at the first, a middle and the last step; the first layer's hardly any."""
    figures = tmp_path / "figures.json"
    done = run_tool("runtime_check", shared_bundle.path, "--images", 2, "--json", figures)
    assert done.code == 0, done.err
    assert "psnr_db_to_simulation" in done.out
    found = json.loads(figures.read_text())
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
    monkeypatch.syspath_prepend(str(TOOLS))
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


def test_a_bundle_without_its_graphs(run_tool: Cli, blocks_bundle: Bundle) -> None:
    """One whose model is there, but not a graph that this compares."""
    done = run_tool("runtime_check", blocks_bundle.path, "--images", 2)
    assert done.code == 2
    assert done.err.startswith("runtime_check: error: ")
    assert "onnxruntime" in done.err


def test_a_bundle_without_such_layers(run_tool: Cli, tiny: LoadedModel, tmp_path: Path) -> None:
    """Its inputs are in float."""
    bundle = make_bundle(tiny, tmp_path / "b", scheme="w4a16", method="mse")
    done = run_tool("runtime_check", bundle.path, "--images", 2)
    assert done.code == 2
    message = "runtime_check: error: bundle: no layer has 8-bit inputs with one scale for all steps"
    assert message in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", 0), "images: got 0, expected at least 1"),
        (("--json", "nowhere/f.json"), "json: no folder nowhere; create it first"),
    ],
)
def test_bad_arguments(
    run_tool: Cli, arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    """Said before the bundle is opened."""
    done = run_tool("runtime_check", tmp_path, *arguments)
    assert done.code == 2
    assert done.err == f"runtime_check: error: {message}\n"


def test_no_bundle(run_tool: Cli, tmp_path: Path) -> None:
    done = run_tool("runtime_check", tmp_path)
    assert done.code == 2
    assert "runtime_check: error: bundle: no manifest.json in" in done.err
