"""Every `ditcast` command in README and docs is one that the command line takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from ditcast.cli import app
from ditcast.options import join_labels

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^```(?:sh|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The lines of all fenced blocks that run ditcast, without comments and prompts."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in FENCED.findall(path.read_text()):
            lines = block.replace("\\\n", " ").splitlines()
            lines = [line.strip().removeprefix("- run: ") for line in lines]
            found += [line for line in lines if line.startswith("ditcast ")]
    return found


def test_there_are_commands() -> None:
    """Of every kind that a user meets first."""
    names = {shlex.split(line, comments=True)[1] for line in commands()}
    assert names >= {"compile", "sample", "bench", "audit", "gate", "report", "compare", "tune"}


@pytest.mark.parametrize("line", commands())
def test_it_is_a_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, its options and their values are parsed; nothing runs."""
    monkeypatch.chdir(tmp_path)
    name, *arguments = join_labels(shlex.split(line, comments=True)[1:])
    command = app.commands[name]
    context = command.make_context(name, arguments)
    context.close()  # so that a --quiet ends
    assert context.args == []


def test_the_reference_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and every option of it, as `tools/cli_reference.py` writes them."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("cli_reference")
    renew = "run: python tools/cli_reference.py"
    assert tool.PAGE.read_text() == tool.page(), renew
