"""The verdict of `ditcast gate` in the forms that CI systems read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from ditcast.runtime.bench import distance_summary, summary
from ditcast.runtime.gate import Check
from ditcast.runtime.verdict import verdict


def junit(name: str, checks: Sequence[Check]) -> bytes:
    """JUnit XML: one suite, one case per check."""
    failures = sum(not check.passed for check in checks)
    counts = {"tests": str(len(checks)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": f"ditcast gate {name}"} | counts)
    for check in checks:
        case = {"classname": f"ditcast.gate.{name}", "name": check.name}
        element = ElementTree.SubElement(suite, "testcase", case)
        if check.passed:
            ElementTree.SubElement(element, "system-out").text = check.line
        else:
            ElementTree.SubElement(element, "failure", {"message": check.line}).text = check.line
    ElementTree.indent(root)
    found: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return found + b"\n"


def markdown(name: str, checks: Sequence[Check], figures: dict[str, Any]) -> str:
    """The verdict, every check, and every figure, as GitHub shows them on a run's page."""
    failed = sum(not check.passed for check in checks)
    state = f"❌ {failed} of {len(checks)} checks failed" if failed else "✅ passed"
    tables = [table for table in (summary(figures), distance_summary(figures)) if table]
    lines = [
        f"### ditcast gate: {_cell(name)}: {state}",
        "",
        _cell(verdict(figures)),
        "",
        *_table(
            ["", "check", "figure"],
            [["✅" if check.passed else "❌", check.name, check.line] for check in checks],
        ),
        "",
    ]
    for header, *rows in tables:
        lines += [*_table(header, rows), ""]
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in cells]


def _cell(text: str) -> str:
    """Text that breaks out of no cell and is no HTML."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return plain.replace("|", "\\|")
