"""Reports and graphs that were changed, copied in or lost, and bundles that cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ditcast.bundle import Bundle
from ditcast.runtime import kept
from ditcast.runtime.report import write_report
from tests import reports
from tests.conftest import Cli
from tests.reports import NAMES, make_report

CHANGED = "SHA-256 differs from the manifest; it was changed, or is of another bundle; "


@pytest.fixture
def made(tmp_path: Path) -> Bundle:
    """A handmade bundle with good figures and a good audit."""
    return reports.good(tmp_path / "good.bundle")


def edit(path: Path) -> None:
    """Another byte of the same length."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reports/bench.json", f"{CHANGED}measure again with: ditcast bench "),
        ("reports/audit.json", f"{CHANGED}audit again with: ditcast audit "),
        (
            "graphs/onnxruntime/full.onnx",
            "SHA-256 differs from the manifest; the bundle is damaged, compile it again",
        ),
    ],
)
def test_changed_files(cli: Cli, made: Bundle, name: str, message: str) -> None:
    """What the manifest does not vouch for is not judged."""
    edit(made.file(name))
    done = cli("gate", made.path)
    assert done.code == 2
    assert f"bundle: {name} in {made.path}: {message}" in done.err


def test_figures_of_another_bundle(cli: Cli, made: Bundle, tmp_path: Path) -> None:
    """A report that was copied in, of whatever length, and one that is gone."""
    file = made.file("reports/bench.json")
    file.write_text(json.dumps(make_report(made, *NAMES) | {"shown": None}, indent=3))
    other = tmp_path / "other.json"
    other.write_text(file.read_text())
    for command in (("gate",), ("report",), ("compare", other)):
        done = cli(*command, made.path)
        assert done.code == 2
        assert f"reports/bench.json in {made.path}: {CHANGED}measure again with:" in done.err
    file.unlink()
    done = cli("gate", made.path)
    assert done.code == 2
    assert f"bundle: no file reports/bench.json in {made.path}, expected one; it was" in done.err


def test_measuring_again_mends_changed_reports(
    made: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged audit does not cost the measurement, nor does it get a new hash."""
    for name in ("reports/bench.json", "reports/audit.json"):
        made.file(name).write_text("{}")
    again = Bundle.open(made.path)
    write_report(again, make_report(again, *NAMES) | {"shown": {}})
    assert "reports/audit.json in" in capsys.readouterr().err
    assert "reports/audit.json" not in Bundle.open(made.path).manifest.reports
    assert kept.figures(Bundle.open(made.path))["variants"]


def test_a_folder_that_cannot_be_written(
    cli: Cli, made: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Said before anything is measured."""
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    done = cli("bench", made.path)
    assert done.code == 2
    assert f"bundle: {made.path} cannot be written, so what is measured would be lost;" in done.err
    done = cli("gate", made.path, "--json", tmp_path / "gate.json")
    assert done.code == 2
    assert f"json: {tmp_path / 'gate.json'} cannot be written; give another file" in done.err
