"""`tools/quality_table.py` without distances, whose packages no extra installs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ditcast.calibrate.qparams import QParams
from ditcast.models import LoadedModel
from ditcast.recipe import make

TOOLS = Path(__file__).parent.parent / "tools"
KEYS = {"iterations": 2, "samples": 1, "rows": 4, "images": 5}

Table = Callable[..., dict[str, Any]]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the tools, which are no package."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


@pytest.fixture
def table(
    tool: Callable[[str], ModuleType], tiny_dir: Path, tmp_path: Path, monkeypatch: Any
) -> Table:
    """Run the tool on the tiny model; returns its figures."""
    module = tool("quality_table")

    def run(*methods: str, **keys: int) -> dict[str, Any]:
        options = [f"--{key}={value}" for key, value in (KEYS | keys).items()]
        fixed = ["--steps=3", "--schemes", "w8a8", "--seeds", "0", "-o", str(tmp_path)]
        fixed += ["--page", str(tmp_path / "page.html")]
        command = ["quality_table", str(tiny_dir), *options, *fixed, "--methods", *methods]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        found: dict[str, Any] = json.loads((tmp_path / "quality.json").read_text())
        return found

    return run


@pytest.mark.slow
def test_a_table_goes_on_where_it_stopped(
    table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = table("absmax")
    capsys.readouterr()
    found = table("absmax", "absmax-tib")
    said = capsys.readouterr()
    assert "run 2 of 2: 3-w8a8-absmax-tib-0" in said.err
    assert "run 1 of 2" not in said.err
    assert found["runs"]["3-w8a8-absmax-0"] == first["runs"]["3-w8a8-absmax-0"]
    assert [row["method"] for row in found["summary"]] == ["absmax", "absmax-tib"]
    assert "absmax-tib" in said.out
    float_tib, tib = found["runs"].values()
    assert float_tib["features"] is None
    assert 0.9 < tib["features"]["cosine_min"] <= tib["features"]["cosine_mean"] <= 1
    each = tib["features"]["cosine_per_step"]
    assert len(each) == 3
    assert (min(each), sum(each) / 3) == pytest.approx(
        (tib["features"]["cosine_min"], tib["features"]["cosine_mean"])
    )
    assert found["summary"][1]["cosine_per_step"] == each
    assert tib["samples"] == KEYS["images"]
    assert tib["calibration"]["peak_memory_mib"] >= tib["calibration"]["loaded_memory_mib"]
    (reference,) = found["references"].values()
    worst = max(bad["psnr_db"]["p50"] for bad in reference["sanity"].values())
    assert worst < min(run["psnr_db"]["p10"] for run in found["runs"].values())
    page = (tmp_path / "page.html").read_text()
    assert "w8a8" in page
    assert '"name":"absmax-tib, w8a8"' in page

    with pytest.raises(SystemExit):
        table("absmax", images=6)
    assert "another images (5, now 6)" in capsys.readouterr().err


@pytest.mark.slow
def test_half_a_calibration_is_made_afresh(table: Table, tmp_path: Path) -> None:
    left = tmp_path / "3-w8a8-absmax-0" / "bundle" / "half.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"?")
    assert table("absmax")["missing"] == {}
    assert not left.exists()


def test_exact_features_do_not_turn(tool: Callable[[str], ModuleType], tiny: LoadedModel) -> None:
    recipe = make({"steps": 4, "cache": "none"})
    found = tool("quality_run").compare_features(tiny, recipe, QParams(), [0, 1, 1])
    assert found.pop("cosine_per_step") == pytest.approx([1] * 4)
    assert found == pytest.approx({"cosine_mean": 1, "cosine_min": 1, "nearest_share": 1})


def test_as_many_labels_as_can_be_stored(
    tool: Callable[[str], ModuleType], tiny: LoadedModel
) -> None:
    storable = tool("quality_run").storable_labels
    sizes = []
    for steps in (2, 100, 200):
        recipe = make({"steps": steps, "cache": "none", "temporal": "cache"})
        sizes.append(len(storable(tiny, recipe)))
    assert sizes == [tiny.adapter.num_classes, 3, 1]
