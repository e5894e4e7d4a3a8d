"""`tools/polygraphy_check.py`: the cross-check, where polygraphy is installed, and without it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ditcast.bundle import Bundle
from ditcast.runtime.backends import graph_file
from ditcast.runtime.engines import graphs_in


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool, which is in no package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    return importlib.import_module("polygraphy_check")


def test_the_package_is_missing(
    tool: Any, typed_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Said at once, in one line."""
    for name in ("polygraphy", "polygraphy.comparator"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["polygraphy_check", str(typed_bundle.path)])
    with pytest.raises(SystemExit) as done:
        tool.main()
    assert done.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("polygraphy_check: error: package polygraphy is needed and cannot be")
    assert line.endswith("Install it with: pip install polygraphy")


def test_the_inputs_are_those_of_the_graphs(tool: Any, typed_bundle: Bundle) -> None:
    """Every graph runs on them; those of the full step are the golden ones."""
    for name in graphs_in(typed_bundle):
        feeds = tool.feeds_of(typed_bundle, name)
        model = onnx.load(graph_file(typed_bundle, "tensorrt", name).path, load_external_data=False)
        held = {tensor.name for tensor in model.graph.initializer}
        needed = {value.name for value in model.graph.input} - held
        assert needed <= {*feeds}
        assert all(np.isfinite(x).all() for x in feeds.values())


def test_what_fails(tool: Any) -> None:
    """A graph that cannot be read, an exception, another output; a warning does not."""
    good = {"nodes": 3, "lint": [{"level": "warning"}], "errors": {"output": 0.001}}
    assert not tool.failed(good)
    for bad in ({"nodes": 0}, {"lint": [{"level": "exception"}]}, {"errors": {"output": 0.1}}):
        assert tool.failed(good | bad)


@pytest.mark.slow
def test_the_cross_check(tool: Any, typed_bundle: Bundle, capfd: Any) -> None:
    """All graphs of a bundle."""
    pytest.importorskip("polygraphy")
    rows = tool.check(typed_bundle)
    assert [row["graph"] for row in rows] == graphs_in(typed_bundle)
    assert not any(map(tool.failed, rows))
    tool.report(rows)
    assert "sampler" in capfd.readouterr().out
