"""README and docs: commands are such that the programs take them, references are current."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from ditcast.cache import POLICIES, make_plan
from ditcast.cache.stepping import FORMS, GRAPHS
from ditcast.cli import app
from ditcast.export.loop import LOOPS
from ditcast.options import join_labels
from ditcast.recipe import make

ROOT = Path(__file__).parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MADE = {ROOT / "docs" / "api.md"}  # its blocks are declarations
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - MADE)]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return [text for kind, text in FENCED.findall(page.read_text()) if kind == language]


def lines(page: Path) -> list[str]:
    """What a page has in blocks of shell, and runs in those of CI; no lines of comments."""
    found = [text.replace("\\\n", " ") for text in blocks(page, "sh")]
    found += re.findall(r"^- run: (.*\n)", "".join(blocks(page, "yaml")), re.MULTILINE)
    return [line for line in "".join(found).splitlines() if shlex.split(line, comments=True)]


def shown(program: str) -> list[list[str]]:
    """The arguments of all lines that run a program, without comments."""
    found = [shlex.split(line, comments=True) for page in PAGES for line in lines(page)]
    return [words[1:] for words in found if words[0] == program]


def test_all_blocks_are_checked() -> None:
    """Shell line by line, below; Python and a part of the shell by `tests/test_docs_run.py`."""
    kinds = {kind for page in PAGES for kind, _ in FENCED.findall(page.read_text())}
    assert kinds == {"sh", "python", "yaml", "text"}  # the last is a drawing
    programs = {shlex.split(line)[0] for page in PAGES for line in lines(page)}
    assert programs == {"ditcast", "make", "pip", "python"}


def test_recipes_are_valid() -> None:
    """Blocks of YAML are recipes, but for steps of CI."""
    found = [text for page in PAGES for text in blocks(page, "yaml") if "- run:" not in text]
    assert len(found) == 1
    assert len(make(yaml.safe_load(found[0])).rules) == 3


def test_targets_of_make() -> None:
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*itertools.chain(*shown("make"))} == {"demo", "test"} <= {*known}


def test_installs_name_extras() -> None:
    """That `pyproject.toml` has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command, package in shown("pip"):
        name, _, extras = package.removesuffix("]").partition("[")
        assert (command, name) == ("install", "ditcast")
        assert {*filter(None, extras.split(","))} <= {*project["optional-dependencies"]}


class ParsedError(Exception):
    """A tool has taken its arguments."""


@pytest.mark.parametrize("words", shown("python"), ids=" ".join)
def test_tools_take_their_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs: they need a GPU, or a Triton."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise ParsedError

    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(ParsedError):
        importlib.import_module(Path(words[0]).stem).main()


def test_there_are_commands() -> None:
    """Of every kind that a user meets first."""
    names = {words[0] for words in shown("ditcast")}
    assert names >= {"compile", "sample", "bench", "audit", "gate", "report", "compare", "tune"}


@pytest.mark.parametrize("words", shown("ditcast"), ids=" ".join)
def test_it_is_a_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, its options and their values are parsed; nothing runs."""
    monkeypatch.chdir(tmp_path)
    name, *arguments = join_labels(words)
    command = app.commands[name]
    context = command.make_context(name, arguments)
    context.close()  # so that a --quiet ends
    assert context.args == []


@pytest.mark.parametrize("name", ["cli_reference", "api_reference"])
def test_a_reference_is_current(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its tool writes it: every command and option, every public name of Python."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module(name)
    assert tool.PAGE.read_text() == tool.page(), f"run: python tools/{name}.py"


def test_the_python_interface_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name that its reference lists can be imported from the module it stands under."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    chapters = importlib.import_module("api_reference").CHAPTERS
    listed = [pair for modules in chapters.values() for pair in modules.items()]
    found = [
        getattr(importlib.import_module(m), name) for m, names in listed for name in names.split()
    ]
    assert len(found) > 50


@pytest.mark.parametrize("page", [*PAGES, *MADE], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To files and headings of the repository."""
    for name, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#?)([^)]*)\)", page.read_text()):
        there = page.parent / name if name else page
        assert there.exists(), name
        heads = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE) if anchor else []
        known = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
        assert not anchor or anchor in known, f"{name}#{anchor}"


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
