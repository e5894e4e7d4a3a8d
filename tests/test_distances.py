"""Distances between sets of pictures: bad ones score badly; `bench` measures, `gate` judges."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.errors import DitcastError
from ditcast.held_out import open_distances
from ditcast.runtime import bench as measuring
from ditcast.runtime.fidelity import BASIS, DISTANCES, Distances, judged
from tests import realset
from tests.conftest import Cli
from tests.reports import Page, blurred, pictures

IMAGES = 32
LABELS = [i % realset.CLASSES for i in range(IMAGES)]

Samples = NDArray[np.float32]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return realset.write(tmp_path_factory.mktemp("real") / "real.npz")


@pytest.fixture(scope="module")
def distances(real: Path) -> Distances:
    """Of 32 pictures per side, made without a network."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return open_distances(real, IMAGES, (3, 16, 16), realset.CLASSES)


@pytest.fixture(scope="module")
def samples() -> Samples:
    """What full precision would make: discs that are in no file, in [-1, 1]."""
    return pictures(120)[-IMAGES:, :, ::2, ::2].copy()


def values(found: dict[str, Any]) -> dict[str, float]:
    return {key: found[key]["value"] for key in DISTANCES}


def test_bad_pictures_score_badly(distances: Distances, samples: Samples) -> None:
    """The more so the more they are blurred; by each of the four figures."""
    rng = np.random.default_rng(1)
    sets = {
        "near": samples + 0.01 * rng.standard_normal(samples.shape, np.float32),
        "blurred": blurred(samples, 3),
        "more blurred": blurred(samples, 7),
        "black": np.full_like(samples, -1),
        "noise": rng.uniform(-1, 1, samples.shape).astype(np.float32),
    }
    full, *made = judged([samples, *sets.values()], LABELS, distances)
    assert full["fd_to_fp"] is full["kd_to_fp"] is None
    found = {name: values(row) for name, row in zip(sets, made, strict=True)}
    for key in DISTANCES:
        near, little, much, black, noise = (row[key] for row in found.values())
        assert near < little < much < max(black, noise), key
        assert near < min(black, noise), key
    assert abs(found["near"]["fd_to_real"] - full["fd_to_real"]["value"]) < 0.2
    for row in made:
        assert all(row[key]["low"] <= row[key]["value"] <= row[key]["high"] for key in DISTANCES)


def test_they_are_the_same_again(distances: Distances, samples: Samples, real: Path) -> None:
    """Bit by bit, by another object on the same file, and they say what they stand on."""
    sets = [samples, blurred(samples)]
    again = open_distances(real, IMAGES, (3, 16, 16), realset.CLASSES)
    assert judged(sets, LABELS, distances) == judged(sets, LABELS, again)
    basis = distances.describe()
    assert basis == again.describe()
    assert basis.keys() >= {*BASIS, "interval", "pca_kept_variance", "versions"}
    assert basis["pictures_per_side"] == IMAGES
    assert basis["pca_dimensions"] == IMAGES // 4
    assert basis["pca_fitted_on"] == "40 held-out real pictures"
    assert (basis["seed"], basis["real"]) == (0, "real.npz")
    assert basis["real_sha256"] == hashlib.sha256(real.read_bytes()).hexdigest()


def test_nothing_is_measured_without_being_asked(samples: Samples) -> None:
    assert judged([samples] * 2, LABELS, None) == [dict.fromkeys(DISTANCES)] * 2


def test_samples_that_are_no_numbers(distances: Distances, samples: Samples) -> None:
    broken = samples.copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(DitcastError, match="distances: samples hold NaN, so there are no pictures"):
        judged([samples, broken], LABELS, distances)


def test_measured_shown_and_judged(
    cli: Cli, bundle: Bundle, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers in the table, the file and the page; the gate passes and fails on them."""
    monkeypatch.setattr(measuring, "_peak_memory_mib", lambda *arguments: 123.0)
    path = tmp_path / "bench.json"
    assert cli("audit", bundle.path).code == 0
    done = cli("bench", bundle.path, "--images", 8, "--real", real, "--json", path)
    assert done.code == 0, done.err
    assert (
        "distances (no FID): 8 pictures per side, 2 dimensions of PCA, EfficientNet-Lite0"
        in done.err
    )
    figures = json.loads(path.read_text())
    assert figures["distances"]["real"] == "real.npz"
    exact, *others = figures["variants"]
    assert exact["fd_to_fp"] is None
    page = Page((bundle.path / "reports/report.html").read_text())
    for row in others:
        for key in DISTANCES:
            assert f"{row[key]['value']:.4g} │" in done.out
            assert "({low:.4g} to {high:.4g})".format(**row[key]) in done.out
            assert "{value:.4g} {low:.4g} – {high:.4g}".format(**row[key]) in page.text
    assert f"--real {real.name}" in page.text
    assert "they are no FID" in page.text
    distance = others[2]["fd_to_fp"]["value"]
    gate = ("gate", bundle.path, "--allow", "slower", "--allow", "pictures", "--max-fd-to-fp")
    assert cli(*gate, distance * 1.01).code == 0
    done = cli(*gate, distance * 0.99)
    assert done.code == 1
    assert f"fd_to_fp of w8a8 + cache (8 samples) is {distance:.4g}, expected at" in done.out
    done = cli("bench", bundle.path, "--images", 4)
    assert (done.code, "fd_to_fp" in done.out) == (0, False)
    assert re.search(
        r"w8a8 \+ cache is .* full precision.*\(4 samples\), with .* MiB of graphs", done.out
    )
    assert "The medians are over 4 samples; over fewer than 128 they can move" in done.out
    done = cli(*gate, 1)
    assert done.code == 2
    assert "measure it with: ditcast bench BUNDLE --real DATA.npz (extra distances)" in done.err
