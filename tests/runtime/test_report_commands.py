"""The commands on the page: parsed as the command line parses them, they give what was measured."""

from __future__ import annotations

import html
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cli import app
from ditcast.options import join_labels, parse_labels
from ditcast.recipe import Recipe
from ditcast.runtime.page import render
from ditcast.runtime.report import write_report
from tests import bundles
from tests.reports import NAMES, make_report


def code(source: str, name: str) -> str:
    """The text of one of the commands on a page."""
    return html.unescape(source.partition(f'<code id="{name}">')[2].partition("</code>")[0])


def parsed(line: str) -> dict[str, Any]:
    """What the command line makes of a line."""
    program, name, *arguments = shlex.split(line)
    assert program == "ditcast"
    return app.commands[name].make_context(name, join_labels(arguments)).params


def page(bundle: Bundle, **backend: Any) -> str:
    """The text of the page of a bundle that was measured on a backend."""
    report = make_report(bundle, *NAMES)
    report["backend"] |= backend
    path = write_report(bundle, report)
    assert path is not None
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"steps": 20, "guidance": 1.5, "labels": (1, 0), "cache": "learned", "router": "a b.pt"},
        {"iepo": "cumulative", "router_epochs": 3, "cache": "learned", "reuse": 0.25},
        {"tib_outputs": "rounded", "temporal": "tib", "percentile": 99.9, "method": "percentile"},
        {
            "seed": 3,
            "rules": [
                {"pattern": "blocks.*.mlp.fc[12]", "precision": "w4a8"},
                {"pattern": "*: #'END", "precision": "w8a8"},
                {"pattern": "*", "precision": "float"},
            ],
        },
    ],
    ids=["default", "labels", "router", "tib", "rules"],
)
def test_the_bundle_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    """The flags, and the file that is written where there are rules, are an equal recipe."""
    monkeypatch.chdir(tmp_path)
    wanted = recipes.make(keys)
    bundle = Bundle.create(tmp_path / "a bundle", bundles.manifest(**keys))
    *written, line = code(page(bundle), "recompile").split("\n")
    subprocess.run(["sh", "-c", "\n".join(written)], check=True)
    found = parsed(line)
    given = {key: found[key] for key in Recipe.model_fields if found.get(key) is not None}
    if "labels" in given:
        given["labels"] = parse_labels(given["labels"], ())
    assert recipes.load(found["recipe_file"], given) == wanted
    assert (found["model"], found["output"]) == ("somewhere", Path("a bundle"))


def test_what_is_measured_again(bundle: Bundle) -> None:
    """The very backend and its settings, and the targets that it needs."""
    source = page(bundle, backend="openvino", threads=1, spin=False)
    found = parsed(code(source, "command"))
    settings = [found["backend"], found["threads"], found["spin"], found["seed"], found["images"]]
    assert settings == ["openvino", 1, False, 7, 160]
    found = parsed(code(source, "recompile"))
    assert (found["backend"], found["targets"]) == ("openvino", ())
    found = parsed(code(page(bundle, backend="tensorrt"), "recompile"))
    assert found["backend"] == "onnxruntime"


def test_targets_are_those_of_the_graphs(typed_bundle: Bundle) -> None:
    report = make_report(typed_bundle, *NAMES)
    text = render(typed_bundle, report, {}, None, "")
    assert parsed(code(text, "recompile"))["targets"] == ("onnxruntime", "tensorrt")
