"""Several reports in one page: what can be compared is, and what cannot is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditcast.bundle import Bundle
from ditcast.runtime.report import write_report
from tests import bundles, reports
from tests.conftest import Cli
from tests.reports import NAMES, Page, make_report, pictures, spread, with_distances


def measured(folder: Path, speedup: float, psnr: float, **request: Any) -> Bundle:
    """A bundle with figures and pictures; what it runs has this speed-up and this PSNR."""
    bundle = reports.exported(bundles.make(folder))
    report = make_report(bundle, *NAMES, shape=(16, 3, 32, 32))
    report["shown"] = dict.fromkeys(NAMES, pictures(16))
    report["variants"][3] |= {"speedup": spread(speedup), "psnr_db": spread(psnr)}
    report["request"] |= request
    report["bundle"]["recipe"]["interval"] = int(10 * speedup)
    write_report(bundle, report)
    return bundle


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Two bundles: a fast one and a close one."""
    return measured(tmp_path / "a", 3.1, 24.0).path, measured(tmp_path / "b", 2.1, 31.5).path


def compared(cli: Cli, folder: Path, *paths: Path) -> Page:
    """The page of a comparison that has to succeed."""
    output = folder / "page.html"
    done = cli("compare", *paths, "-o", output)
    assert (done.code, done.out, done.err) == (0, f"comparison: {output}\n", "")
    return Page(output.read_text())


def test_two_bundles(cli: Cli, tmp_path: Path, both: tuple[Path, Path]) -> None:
    """The verdict, the figures of both, their pictures on one full precision, and differences."""
    page = compared(cli, tmp_path, *both)
    assert (
        "a is the fastest, 3.10 times full precision at 24.0 dB (160 samples); "
        "b the closest, 2.10 times full precision at 31.5 dB (160 samples)."
    ) in page.text
    assert page.tags.count("img") == 3
    assert page.tags.count("table") == 4
    assert "recipe: interval 31 21" in page.text
    assert "recipe: scheme" not in page.text  # it is the same
    assert "ditcast compare a b" in page.text
    assert 'id="plot-speed"' in page.source


def test_report_files_have_figures_alone(cli: Cli, tmp_path: Path, both: tuple[Path, Path]) -> None:
    """A file of `bench --json` has no pictures; one that is best in both is called so."""
    path = tmp_path / "figures.json"
    figures = json.loads((both[0] / "reports/bench.json").read_text())
    figures["variants"][3] |= {"psnr_db": spread(40.0)}
    path.write_text(json.dumps(figures))
    page = compared(cli, tmp_path, path, both[1])
    assert "figures.json is both the fastest and the closest: 3.10 times" in page.text
    assert "img" not in page.tags


@pytest.mark.parametrize(
    ("section", "values", "note"),
    [
        ("bundle", {"fingerprint": "0" * 64}, "The models differ: fidelity is to another full"),
        ("bundle", {"random_weights": True}, "The weights are random: fidelity means nothing"),
        ("request", {"steps": 9}, "The numbers of steps differ: fidelity is over other images"),
        ("request", {"seed": 9}, "The seeds differ: fidelity is over other images"),
        ("machine", {"cpu": "Another"}, "Processors or backends differ: compare speed-ups"),
    ],
)
def test_what_cannot_be_compared(
    cli: Cli,
    tmp_path: Path,
    both: tuple[Path, Path],
    section: str,
    values: dict[str, Any],
    note: str,
) -> None:
    path = tmp_path / "figures.json"
    figures = json.loads((both[0] / "reports/bench.json").read_text())
    figures[section] |= values
    path.write_text(json.dumps(figures))
    page = compared(cli, tmp_path, path, both[1])
    assert note in page.text
    assert ("is the fastest" in page.text) == (section == "machine")


def test_distances_of_one_report_or_of_both(
    cli: Cli, tmp_path: Path, both: tuple[Path, Path]
) -> None:
    """Shown where measured; another basis is a note and a difference."""
    figures = json.loads((both[0] / "reports/bench.json").read_text())
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    measured_too = with_distances(figures, 0.3)
    paths[0].write_text(json.dumps(measured_too))
    page = compared(cli, tmp_path, paths[0], both[1])
    assert "0.5 0.45 – 0.56" in page.text
    assert "The distances stand on" not in page.text
    assert "distances: real real.npz –" in page.text
    measured_too["distances"]["real_sha256"] = "b" * 64
    paths[1].write_text(json.dumps(measured_too))
    page = compared(cli, tmp_path, *paths)
    assert (
        "The distances stand on other real pictures, dimensions or another extractor" in page.text
    )
    assert f"distances: real sha256 {'a' * 64} {'b' * 64}" in page.text


def test_bundles_of_one_name_are_told_apart(cli: Cli, tmp_path: Path) -> None:
    paths = [measured(tmp_path / folder / "x", 2.0, 30.0).path for folder in ("one", "two")]
    page = compared(cli, tmp_path, *paths)
    for path in paths:
        assert f"{path}: somewhere, 2026-01-02" in page.text


def test_names_are_escaped(cli: Cli, tmp_path: Path, both: tuple[Path, Path]) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(1)>.json"
    hostile.write_bytes((both[0] / "reports/bench.json").read_bytes())
    page = compared(cli, tmp_path, hostile, both[1])
    assert "img" not in page.tags
    assert hostile.name in page.text


def test_bad_requests(cli: Cli, tmp_path: Path, both: tuple[Path, Path]) -> None:
    good, other = both
    (tmp_path / "x.json").write_text("[]")
    for arguments, line in (
        ((good,), "compare: got one report, expected at least two; see ditcast report"),
        ((good, good), "compare: got the same report twice; name each once"),
        ((good, tmp_path / "no"), f"no file {tmp_path / 'no'}; give a bundle, or what"),
        ((good, tmp_path / "x.json"), "x.json is no report of this version of ditcast"),
        ((good, other, "-o", tmp_path / "no/x.html"), "no folder"),
    ):
        done = cli("compare", *arguments)
        assert (done.code, done.out) == (2, "")
        assert line in done.err
    bundle = Bundle.open(other)
    bundles.stage(bundle, {"graphs/onnxruntime/full.onnx": b"others" * 20})
    bundle.commit({})
    done = cli("compare", good, other, "-o", tmp_path / "page.html")
    assert done.code == 2
    assert f"{other} has changed since reports/bench.json was measured" in done.err
