"""The size budget of `tools/size_budget.py`, on small trees of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "size_budget.py"
SIX = "a, b, c, d, e, f"
SMALL = 20  # modules that keep the median and the percentile low


def check(tree: Path, source: str) -> tuple[int, list[str], dict[str, Any]]:
    """Run the tool on one module among small ones; its exit code, lines and figures."""
    for folder in ("tools", "export", "src"):
        (tree / folder).mkdir()
    shutil.copy(TOOL, tree / "tools")
    for i in range(SMALL):
        (tree / "export" / f"small_{i}.py").write_text("def small(): ...")
    (tree / "export" / "module.py").write_text(source)
    (tree / "src" / "export").symlink_to("../export")
    figures = tree / "figures.json"
    command = [sys.executable, str(tree / "tools" / TOOL.name), "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines(), json.loads(figures.read_text())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n" * 401, "export/module.py: 401 lines, at most 400"),
        (
            "def long():\n" + "    x = 1\n" * 60,
            "export/module.py:1 long: 61 lines, at most 60",
        ),
        (
            f"class C:\n    def f(self, {SIX}): ...",
            "export/module.py:2 f: 6 positional parameters, at most 5",
        ),
        (
            "".join(f"def f{i}():\n" + "    x = 1\n" * 40 for i in range(9)),
            "95th percentile of functions: 41 lines, at most 40",
        ),
    ],
)
def test_what_is_over_is_named_once(tmp_path: Path, source: str, message: str) -> None:
    code, lines, figures = check(tmp_path, source)
    assert code == 1
    assert lines[:-1] == figures["over"] == [message]


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n" * 400,
        "def edge():\n" + "    x = 1\n" * 59,
        "def f(a, b, c, d, e, *, g, h): ...",
        "class C:\n    def f(self, a, b, c, d, e): ...",
        f"@command\ndef f({SIX}): ...",
        f"def test_many_fixtures({SIX}): ...",
    ],
)
def test_what_is_within_passes(tmp_path: Path, source: str) -> None:
    code, lines, figures = check(tmp_path, source)
    assert code == 0, lines
    assert figures["over"] == []
    assert figures["files"] == SMALL + 2  # the link adds none
