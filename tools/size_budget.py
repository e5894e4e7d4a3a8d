"""Gate: files, functions and parameter lists stay small enough to be read in one go.

python tools/size_budget.py [--json FILE]
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "calibrate", "export", "runtime", "tools", "tests")
FILE_LINES, MEDIAN_FILE_LINES = 400, 150
FUNCTION_LINES, P95_FUNCTION_LINES = 60, 40
POSITIONAL = 5


class Function(NamedTuple):
    """One function: where it is, its lines, and its parameters that can be positional."""

    place: str
    lines: int
    positional: int


def functions(path: str, source: str) -> Iterator[Function]:
    """Every function of a file, inner ones and methods included."""
    tree = ast.parse(source)
    methods = {
        id(child)
        for parent in ast.walk(tree)
        if isinstance(parent, ast.ClassDef)
        for child in parent.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            count = _positional(node, id(node) in methods)
            yield Function(f"{path}:{node.lineno} {node.name}", lines, count)


def _positional(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> int:
    """Positional parameters without self or cls.

    Click and pytest call by keyword: a command has one parameter per option, a test or a
    fixture one per fixture it uses. So functions with a decorator and tests count as none, and so
    does `forward`, which has one per input of a graph.
    """
    if node.decorator_list or node.name.startswith("test_") or node.name == "forward":
        return 0
    return len(node.args.posonlyargs) + len(node.args.args) - method


def sources(root: Path) -> dict[str, str]:
    """Text of every module by its path; what is reached twice through a link counts once."""
    found = {path.resolve() for folder in FOLDERS for path in (root / folder).rglob("*.py")}
    return {str(path.relative_to(root.resolve())): path.read_text() for path in sorted(found)}


def measure(root: Path) -> tuple[dict[str, Any], list[str]]:
    """The figures of a tree, and a line for everything over the budget."""
    texts = sources(root)
    files = {path: len(text.splitlines()) for path, text in texts.items()}
    found = [function for path, text in texts.items() for function in functions(path, text)]
    lengths = sorted(function.lines for function in found) or [0]
    figures: dict[str, Any] = {
        "files": len(files),
        "lines": sum(files.values()),
        "file_lines": {"median": median(files.values() or [0]), "max": max(files.values() or [0])},
        "functions": len(found),
        "function_lines": {
            "median": median(lengths),
            "p95": lengths[math.ceil(0.95 * len(lengths)) - 1],
            "max": lengths[-1],
        },
    }
    over = [f"{p}: {n} lines, at most {FILE_LINES}" for p, n in files.items() if n > FILE_LINES]
    for f in found:
        if f.lines > FUNCTION_LINES:
            over.append(f"{f.place}: {f.lines} lines, at most {FUNCTION_LINES}")
        if f.positional > POSITIONAL:
            over.append(f"{f.place}: {f.positional} positional parameters, at most {POSITIONAL}")
    for name, value, limit in (
        ("median file", figures["file_lines"]["median"], MEDIAN_FILE_LINES),
        ("95th percentile of functions", figures["function_lines"]["p95"], P95_FUNCTION_LINES),
    ):
        if value > limit:
            over.append(f"{name}: {value:g} lines, at most {limit}")
    return figures, over


def main() -> None:
    """Print what is over the budget; exit 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures and the offenders")
    args = parser.parse_args()
    figures, over = measure(ROOT)
    if args.json is not None:
        args.json.write_text(json.dumps(figures | {"over": over}, indent=1) + "\n")
    for line in over:
        print(line)
    print(
        f"size budget: {figures['files']} files, {figures['functions']} functions, {len(over)} over"
    )
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
