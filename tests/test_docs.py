"""Every `ditcast` command in README and docs is one that the command line takes."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

from ditcast.cache import POLICIES, make_plan
from ditcast.cache.stepping import FORMS, GRAPHS
from ditcast.cli import app
from ditcast.export.loop import LOOPS
from ditcast.options import join_labels

ROOT = Path(__file__).parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
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


def test_what_the_architecture_names_is_there() -> None:
    """Files and folders."""
    named = set(re.findall(r"`([a-z_/]+(?:\.py|/))`", ARCHITECTURE.read_text()))
    assert len(named) > 40
    assert not [name for name in named if not (ROOT / name).exists()]


def rows(first: str) -> list[list[str]]:
    """The cells of the lines of the architecture's table whose header starts so."""
    lines = iter(ARCHITECTURE.read_text().splitlines())
    next(line for line in lines if line.startswith(first))
    next(lines)
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def code(cell: str) -> tuple[str, ...]:
    """What a cell has in code spans."""
    return tuple(re.findall(r"`([^`]+)`", cell))


def test_graphs_of_the_architecture() -> None:
    """Names, inputs and outputs of all step graphs, in their order."""
    found = {
        code(name): (code(inputs), code(outputs))
        for name, inputs, outputs, _ in rows("| graph | inputs | outputs | what")
    }
    assert found == {(name,): tuple(signature) for name, signature in GRAPHS.items()}


def test_forms_of_the_architecture() -> None:
    """Every policy with its form, the graphs of its steps, and what builds its graph loop."""
    found = {}
    for form, policies, gauge, full, other, loop in rows("| form |"):
        steps = tuple(dict.fromkeys(code(full) + code(other)))
        for policy in code(policies):
            found[policy] = (code(form), code(gauge), steps, code(loop))
    wanted = {}
    for policy in POLICIES:
        plan = make_plan(policy, steps=8, interval=2, slots=4)
        gauges = () if plan.gate is None else (plan.gate.graph,)
        module = LOOPS[plan.form].__module__.removeprefix("ditcast.")
        file = f"{module.replace('.', '/')}.py"
        wanted[policy] = ((plan.form,), gauges, FORMS[plan.form][1], (file,))
    assert found == wanted
