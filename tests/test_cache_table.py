"""`tools/cache_table.py`: every point beside full precision, and what stacking loses."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditcast.bundle import Bundle
from ditcast.models import LoadedModel
from ditcast.runtime.fidelity import DISTANCES
from ditcast.schedule import SPACINGS
from tests import realset
from tests.conftest import TOOLS, Cli, make_bundle

EIGHT, FOUR = "w8a8 absmax fp", "w4a8 absmax fp"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own."""
    command = [sys.executable, str(TOOLS / "cache_table.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def taylor_bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """W4A8 with a corrected and guarded plan."""
    keys: dict[str, Any] = {"scheme": "w4a8", "cache": "taylor", "correction": "moment"}
    keys["guard"] = "error"
    path = tmp_path_factory.mktemp("cache_table") / "w4a8.bundle"
    return make_bundle(tiny, path, **keys)


@pytest.fixture(scope="module")
def relating_bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Full precision under a policy that needs graphs of its own."""
    path = tmp_path_factory.mktemp("cache_table") / "rfe.bundle"
    return make_bundle(tiny, path, scheme="none", cache="rfe", interval=3)


@pytest.fixture(scope="module")
def placed_bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Full precision with full steps where calibration put them."""
    path, keys = tmp_path_factory.mktemp("cache_table") / "placed.bundle", {"placement": "fitted"}
    return make_bundle(tiny, path, scheme="none", cache="taylor", interval=3, **keys)


def test_every_point_has_speed_and_fidelity(
    taylor_bundle: Bundle,
    shared_bundle: Bundle,
    relating_bundle: Bundle,
    placed_bundle: Bundle,
    tmp_path: Path,
) -> None:
    """Three precisions, two policies at one interval, fewer steps, and the plans of bundles."""
    held = (shared_bundle.path, taylor_bundle.path, relating_bundle.path, placed_bundle.path)
    done = run(
        *(*held, "--policies", "fora", "taylor-1"),
        *("--intervals", 3, "--images", 4, "--threads", 1),
        *("--json", tmp_path / "cache.json", "--page", tmp_path / "cache.html"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "cache.json").read_text())
    rows = report["rows"]
    found = [(row["precision"], row["policy"], row["full_steps"], row["steps"]) for row in rows]
    assert found == [
        ("fp32", "full precision", 6, 6),
        ("fp32", "fora", 3, 6),
        ("fp32", "taylor-1", 3, 6),
        (EIGHT, "none", 6, 6),
        (EIGHT, "fora", 3, 6),
        (EIGHT, "taylor-1", 3, 6),
        (FOUR, "none", 6, 6),
        (FOUR, "fora", 3, 6),
        (FOUR, "taylor-1", 3, 6),
        ("fp32", "fewer steps", 3, 3),
        (EIGHT, "fewer steps", 3, 3),
        (FOUR, "fewer steps", 3, 3),
        (FOUR, "fitted: taylor-1, guard error, vc moment, full trajectories, uniform", 4, 6),
        ("fp32", "rfe-1", 3, 6),
        ("fp32", "taylor-1, placed", 3, 6),
    ]
    assert rows[-1]["reused"] == rows[-2]["reused"] == 0.5
    assert rows[0]["psnr_db"]["p50"] == 100
    assert all(row["psnr_db"]["p50"] < 100 for row in rows[1:])
    assert all(row["image_ms"]["p50"] > 0 for row in rows)
    assert all(row["spacing"] is not None for row in rows[9:12])
    assert rows[1]["psnr_db"] != rows[2]["psnr_db"]
    assert "fewer steps" in done.stdout
    page = (tmp_path / "cache.html").read_text()
    assert all(f"{row['precision']}, {row['policy']}" in page for row in rows[1:])


def test_distances_of_every_point(run_tool: Cli, shared_bundle: Bundle, tmp_path: Path) -> None:
    """With `--data`: to full precision and to real pictures, and what they stand on."""
    real = realset.write(tmp_path / "real.npz")
    done = run_tool(
        *("cache_table", shared_bundle.path, "--policies", "fora", "--intervals", 3),
        *("--images", 4, "--threads", 1, "--data", real, "--json", tmp_path / "cache.json"),
    )
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "cache.json").read_text())
    assert report["distances"]["real"] == "real.npz"
    for row in report["rows"]:
        assert all(row[key]["low"] < row[key]["high"] for key in DISTANCES[2:])
    assert report["rows"][1]["fd_to_fp"]["value"] > report["rows"][0]["fd_to_fp"]["value"]


def test_fewer_steps_get_their_best_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is, of images of which one spacing's are those that are wanted."""
    monkeypatch.syspath_prepend(str(TOOLS))
    table = importlib.import_module("cache_table")
    wanted = np.zeros((1, 3, 4, 4), np.float32)
    for best in SPACINGS:

        class Fake:
            spacing: str | None = None

            def sample(self, labels: list[int], first: int, best: str = best) -> Any:
                del labels, first
                return wanted if self.spacing == best else wanted + 0.5

        point = Fake()
        table.choose_spacing(point, [0], wanted)
        assert point.spacing == best


def entry(precision: str, policy: str, value: float, interval: int = 4) -> dict[str, Any]:
    """A row, as far as stacking reads it."""
    row = {"precision": precision, "policy": policy, "interval": interval, "full_steps": 14}
    return row | {"fd_to_fp": {"value": value}}


def test_stacking_loss_is_beyond_the_larger_of_the_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantized 0.1, cached 0.3, both 0.7: a loss of 0.4, of which 0.1 is left."""
    rows = [
        entry("w8a8", "none", 0.1, interval=1),
        entry("fp32", "taylor-1", 0.3),
        entry("fp32", "taylor-1", 9.0, interval=3),
        entry("w8a8", "taylor-1", 0.7),
        entry("w8a8", "fitted: taylor-1, guard error, vc exact", 0.4),
        entry("w4a8", "fitted: taylor-1, guard error, vc exact", 0.4),
    ]
    monkeypatch.syspath_prepend(str(TOOLS))
    (found,) = importlib.import_module("cache_table").stacking(rows)
    assert found["loss"] == pytest.approx(0.4)
    assert found["left"] == pytest.approx(0.1)
    assert found["won_back"] == pytest.approx(0.75)
    assert "no row of taylor-1 at interval 4 to compare w4a8 with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", 2], "images: got 2, expected at least 4"),
        (["--data", "nowhere.npz"], "held-out pictures: no file nowhere.npz"),
        (["--json", "nowhere/f.json"], "no folder nowhere; create it first"),
        (["--intervals", 9], "interval: got 9, expected at most the number of steps (6)"),
    ],
)
def test_bad_requests_are_one_line(
    run_tool: Cli, shared_bundle: Bundle, arguments: list[object], message: str
) -> None:
    done = run_tool("cache_table", shared_bundle.path, *arguments)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("cache_table: error: ")
    assert message in line


def test_bundles_of_other_models_are_refused(shared_bundle: Bundle, other_bundle: Bundle) -> None:
    """One line from a fresh process, too."""
    done = run(shared_bundle.path, other_bundle.path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "has another model" in line
