"""`tools/tib_cost.py`: products are counted, not guessed, and stored features have none."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ditcast.bundle import Bundle
from ditcast.models import LoadedModel
from tests.conftest import RECIPE, make_bundle

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tib_cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("tib_cost")


def test_a_cache_is_looked_up(
    tiny: LoadedModel,
    shared_bundle: Bundle,
    tib_cost: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The embedder runs once per step, modulations once per pair of a step and a label."""
    cached = make_bundle(tiny, tmp_path / "cached", temporal="cache", labels=[2], cache="none")
    file = tmp_path / "cost.json"
    paths = [str(bundle.path) for bundle in (shared_bundle, cached)]
    monkeypatch.setattr(sys, "argv", ["tib_cost", *paths, "--runs", "3", "--json", str(file)])
    tib_cost.main()
    assert "tiny.bundle: fp, w8a8, 6 steps, 2 labels" in capsys.readouterr().out
    float_, codes = json.loads(file.read_text())["rows"]
    embedders, modulations = 2 * (256 * 64 + 64 * 64), 2 * 64 * 6 * 64 + 64 * 2 * 64
    steps = RECIPE["steps"]
    assert float_["macs"] == steps * embedders + 2 * steps * modulations
    assert codes["macs"] == 0
    assert float_["bytes"] > 4 * (embedders + modulations)
    assert 2 * steps * 14 * 64 < codes["bytes"] < float_["bytes"] / 4
    assert min(row["ms"]["p25"] for row in (float_, codes)) > 0


def test_wrong_usage(
    tib_cost: ModuleType,
    shared_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["tib_cost", str(shared_bundle.path), "--runs", "0"])
    with pytest.raises(SystemExit) as caught:
        tib_cost.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "tib_cost: error: runs: got 0, expected at least 1\n"
