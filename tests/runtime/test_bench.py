"""The benchmark: every gain with its cost, against honest rivals."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditcast.bundle import Bundle
from ditcast.errors import ConfigError
from ditcast.runtime import Pipeline
from ditcast.runtime.bench import announce, bench, summary
from ditcast.runtime.images import psnr_db, to_unit
from ditcast.settings import Settings

NAMES = ["full precision", "w8a8", "cache", "w8a8 + cache"]


def pretend(*, fail: bool = False) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A fresh process that samples at once, or fails; other programs run as ever."""
    really = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "--json" not in command:
            return really(command, **options)
        if fail:
            return subprocess.CompletedProcess(command, 2, "", "ditcast: error: no memory\n")
        report = Path(command[command.index("--json") + 1])
        cached = command[command.index("--cache") + 1] != "none"
        report.write_text(json.dumps({"peak_memory_mib": 200.0 if cached else 100.0}))
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory without starting a process per variant."""
    monkeypatch.setattr(subprocess, "run", pretend())


@pytest.fixture(scope="module")
def report(shared_bundle: Bundle) -> dict[str, Any]:
    """Five images in batches of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", pretend())
        return bench(shared_bundle, count=5, settings=Settings(threads=1))


def test_each_gain_alone_and_both_together(report: dict[str, Any]) -> None:
    """Full precision first, the rival with fewer steps last."""
    rows = report["variants"]
    assert [row["name"] for row in rows[:4]] == NAMES
    assert [(row["target"], row["cache"]) for row in rows] == [
        ("reference", "none"),
        ("onnxruntime", "none"),
        ("reference", "fora"),
        ("onnxruntime", "fora"),
        ("reference", "none"),
    ]
    assert [row["full_steps"] for row in rows[:4]] == [6, 6, 4, 4]  # T=6, N=2
    rival = rows[4]
    assert 1 <= rival["steps"] <= 6
    assert rival["name"] == f"{rival['steps']} steps"
    assert rival["full_steps"] == rival["steps"]
    assert rival["spacing"] in ("leading", "linspace", "trailing")


def test_no_speed_without_fidelity(report: dict[str, Any]) -> None:
    """Every row has both, over all images; full precision is its own reference."""
    for row in report["variants"]:
        assert row["samples"] == 5
        for key in ("image_ms", "speedup", "psnr_db", "ssim"):
            assert row[key]["p10"] <= row[key]["p50"] <= row[key]["p90"]
        assert row["image_ms"]["p10"] > 0
    reference = report["variants"][0]
    assert reference["speedup"] == {"p10": 1, "p50": 1, "p90": 1}
    assert reference["psnr_db"]["p50"] == 100
    assert all(row["psnr_db"]["p50"] < 100 for row in report["variants"][1:4])


def test_fidelity_is_that_of_the_paired_pictures(
    report: dict[str, Any], shared_bundle: Bundle
) -> None:
    """The same seed, image by image: measured once more by hand."""
    exact, quantized = (Pipeline(shared_bundle, target=t) for t in ("reference", "onnxruntime"))
    labels = [0, 1, 2, 3, 4]  # classes in turn
    wanted = to_unit(exact.sample(labels, seed=1, cache="none"))
    found = psnr_db(to_unit(quantized.sample(labels, seed=1)), wanted)
    row = report["variants"][3]
    assert row["psnr_db"]["p50"] == pytest.approx(float(np.median(found)), abs=0.5)
    assert report["shown"]["w8a8 + cache"].shape == (5, 3, 16, 16)
    assert psnr_db(to_unit(report["shown"]["full precision"]), wanted).min() > 60


def test_times_of_full_and_reuse_steps_are_apart(report: dict[str, Any]) -> None:
    """Only a variant with a cache has reuse steps."""
    reuse = [row["reuse_step_ms"] is not None for row in report["variants"]]
    assert reuse == [False, False, True, True, False]
    assert all(row["full_step_ms"]["p50"] > 0 for row in report["variants"])


def test_sizes_and_memory(report: dict[str, Any], shared_bundle: Bundle) -> None:
    """Bytes of the target's graphs; peak memory from a process of its own."""
    rows = report["variants"]
    files = shared_bundle.manifest.files
    wanted = sum(e.size for n, e in files.items() if n.startswith("graphs/onnxruntime/"))
    assert rows[1]["size_bytes"] == wanted < rows[0]["size_bytes"]
    assert [row["peak_memory_mib"] for row in rows] == [100, 100, 200, 200, 100]


def test_a_report_says_what_it_stands_on(report: dict[str, Any], shared_bundle: Bundle) -> None:
    """Machine, versions, request and bundle; all of it but the pictures is JSON."""
    assert report["request"] == {"images": 5, "batch": 2, "steps": 6, "guidance": 2.0, "seed": 1}
    assert report["backend"]["threads"] == 1
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["versions"].keys() >= {"ditcast", "numpy", "onnxruntime"}
    assert report["bundle"]["digest"] == shared_bundle.manifest.digest
    assert report["bundle"]["random_weights"] is False
    json.dumps({key: value for key, value in report.items() if key != "shown"}, allow_nan=False)


def test_the_table(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A column of fidelity beside the one of speed, and a line with the conditions."""
    header, *rows = summary(report)
    assert header[3:6] == ["speed-up", "PSNR dB", "SSIM"]
    assert rows[0][:2] == ["full precision", "6 of 6"]
    assert rows[0][3:6] == ["1.00x", "(reference)", "(reference)"]
    assert rows[3][1] == "4 of 6"
    assert all(float(row[4]) > 0 for row in rows[1:])
    announce(report)
    assert "5 images in batches of 2, 6 steps, guidance 2.0, 1 threads" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_processes")
def test_random_weights_have_no_rival(shared_bundle: Bundle) -> None:
    """Without a trained model no number of steps makes a better image, and the report says so."""
    info = shared_bundle.manifest.model.model_copy(update={"source": "random:dit-s-2"})
    manifest = shared_bundle.manifest.model_copy(update={"model": info})
    found = bench(Bundle(shared_bundle.path, manifest), count=1)
    assert [row["name"] for row in found["variants"]] == NAMES
    assert found["bundle"]["random_weights"] is True
    assert found["request"]["batch"] == 1


@pytest.mark.usefixtures("_no_processes")
def test_another_number_of_steps(shared_bundle: Bundle) -> None:
    """For every variant; zero is refused and not taken for the default."""
    found = bench(shared_bundle, count=1, steps=4, seed=3)
    assert [row["steps"] for row in found["variants"][:4]] == [4] * 4
    assert [row["full_steps"] for row in found["variants"][:4]] == [4, 4, 3, 3]
    assert found["request"]["seed"] == 3
    with pytest.raises(ConfigError, match="steps: got 0"):
        bench(shared_bundle, count=1, steps=0)


def test_a_process_that_fails_costs_only_its_figure(
    shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured before is kept, and a line says what is missing and why."""
    monkeypatch.setattr(subprocess, "run", pretend(fail=True))
    found = bench(shared_bundle, count=1)
    assert [row["peak_memory_mib"] for row in found["variants"]] == [None] * 5
    assert [row[-1] for row in summary(found)[1:]] == ["-"] * 5
    said = capsys.readouterr().err
    assert "peak memory of 'w8a8' was not measured: ditcast: error: no memory" in said


def test_what_happens_at_each_step(report: dict[str, Any], shared_bundle: Bundle) -> None:
    """The plan of all slots, and how far each step has come away; full precision itself is left."""
    found = report["steps"]
    assert found["timesteps"] == Pipeline(shared_bundle).schedule.timesteps(6).tolist()
    assert found["slots"] == list(shared_bundle.manifest.model.slots)
    assert found["plan"] == ["ffrfrf"] * 4  # T=6, N=2
    assert list(found["closeness_db"]) == NAMES[1:]
    for row in found["closeness_db"].values():
        assert len(row) == 6
    cache = found["closeness_db"]["cache"]
    assert cache[:2] == [100, 100]  # full steps in full precision
    assert cache[2] < 100
    assert found["feature_cosine"] == pytest.approx([1] * 6, abs=1e-5)  # in float
    assert found["ranges"] == {}
    assert (found["forecast_error"], found["selection"]) == (None, None)


def test_interaction_of_both_gains(report: dict[str, Any]) -> None:
    """Over the same images and rounds as the rows."""
    both = report["interaction"]
    assert both["samples"] == 5
    assert both["speedup"]["p10"] <= both["speedup"]["p50"] <= both["speedup"]["p90"]
    assert abs(both["psnr_db"]["p50"]) < 20
    assert report["unpaired_psnr_db"]["p50"] < report["variants"][1]["psnr_db"]["p50"]
    assert report["pictures"] == {"count": 5, "height": 16, "width": 16}
