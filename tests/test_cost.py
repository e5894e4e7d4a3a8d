"""What compiling cost: only of stages that did something, and for as long as it is known."""

from __future__ import annotations

from pathlib import Path

from ditcast.commands.cost import Cost
from ditcast.runtime import kept
from tests import bundles, reports
from tests.reports import NAMES, make_report


def test_a_stage_that_changed_nothing_costs_nothing(tmp_path: Path) -> None:
    bundle = bundles.make(tmp_path / "b")
    cost = Cost(bundle)
    cost.stage("calibrate")
    bundles.stage(bundle, {"graphs/reference/full.onnx": b"another"})
    bundle.commit({})
    cost.stage("export")
    assert list(cost.found) == ["export"]
    assert cost.found["export"]["seconds"] >= 0
    assert cost.found["export"]["peak_memory_mib"] > 10
    assert cost.found["export"]["parts"] == {}


def test_a_stage_that_knows_its_parts_costs_their_sum(tmp_path: Path) -> None:
    """Those of earlier runs are in it, which took longer than this one."""
    bundle = bundles.make(tmp_path / "b")
    cost = Cost(bundle)
    bundles.stage(bundle, {bundles.SCALES: b"another"})
    bundle.commit({})
    cost.stage("calibrate", {"TIB": 100.004, "cache: noise guard": 20.5})
    found = cost.found["calibrate"]
    assert found["seconds"] == 120.5
    assert found["parts"] == {"TIB": 100.0, "cache: noise guard": 20.5}


def test_the_next_measurement_knows_it(tmp_path: Path) -> None:
    """Until the graphs change."""
    bundle = reports.exported(bundles.make(tmp_path / "b"))
    assert kept.known_cost(bundle) == {}
    report = make_report(bundle, *NAMES)
    reports.keep(bundle, report)
    assert kept.known_cost(bundle) == report["cost"] != {}
    bundles.stage(bundle, {"graphs/reference/full.onnx": b"another"})
    bundle.commit({})
    assert kept.known_cost(bundle) == {}
