"""Write `docs/api.md` from the source of the public Python interface, which is not imported.

python tools/api_reference.py
"""

from __future__ import annotations

from pathlib import Path

import griffe

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
HEAD = """\
# Python interface

Made by `tools/api_reference.py` from the source. What is not on this page may change without a
word in [CHANGELOG.md](../CHANGELOG.md). [guide.md](guide.md#5-from-python) has examples;
[README.md](../README.md#adding-to-it) says in which file and which table to add what.

`ditcast.models`, `ditcast.calibrate` and `ditcast.export` need the extra `compile`, and
`open_distances` the extra `distances`; all else is in the base install.
"""

# Of each chapter: the names, by the module that they are imported from.
CHAPTERS: dict[str, dict[str, str]] = {
    "Run and measure a bundle": {
        "ditcast.runtime": "Pipeline Step",
        "ditcast.settings": "Settings",
        "ditcast.bundle": "Bundle",
        "ditcast.manifest": "Manifest ModelInfo",
        "ditcast.runtime.images": "save to_pixels to_unit psnr_db ssim",
        "ditcast.runtime.bench": "bench",
        "ditcast.held_out": "open_distances",
        "ditcast.runtime.audit": "audit Audit LayerAudit",
        "ditcast.progress": "quiet",
    },
    "Make a bundle": {
        "ditcast.recipe": "load make Recipe Rule",
        "ditcast.models": "load describe LoadedModel",
        "ditcast.calibrate": "check calibrate",
        "ditcast.export": "to_onnx",
    },
    "Errors": {
        "ditcast.errors": "DitcastError ConfigError UnsupportedError MissingDependencyError "
        "BundleError ParityError",
    },
    "Add a model family": {
        "ditcast.models": "Adapter ADAPTERS",
        "ditcast.models.base": "Layer Part Temporal Modulated",
    },
    "Add a cache policy": {
        "ditcast.cache": "POLICIES make_plan StepPlan",
        "ditcast.cache.plan": "Gate hold gated",
        "ditcast.cache.stepping": "Stepper Request Signature GRAPHS FORMS",
    },
    "Add a backend": {
        "ditcast.runtime.backends": "Backend Session GraphFile NodeTime make_backend BACKENDS "
        "ENGINES",
        "ditcast.export.targets": "Target TARGETS",
    },
    "Add a PTQ method": {
        "ditcast.calibrate.methods": "Method METHODS",
        "ditcast.calibrate.ranges": "Observer State OBSERVERS",
        "ditcast.calibrate.balance": "BALANCES",
    },
}
# Methods of classes that have others, for ditcast's own use, or a constructor of their own.
METHODS = {
    "Bundle": ("open", "create", "graph", "verify"),
    "Pipeline": ("__init__", "plan", "sample"),
    "Stepper": ("__init__", "run", "full", "reuse", "held"),
}


def page() -> str:
    """The whole page: a section per module, all names of it in one listing."""
    package = griffe.load("ditcast", search_paths=[ROOT / "src"])
    lines = [HEAD]
    for chapter, modules in CHAPTERS.items():
        lines += [f"## {chapter}", ""]
        for module, names in modules.items():
            lines += [f"### {module}", "", "```python"]
            found = [package[f"{module}.{name}".removeprefix("ditcast.")] for name in names.split()]
            lines += ["\n\n\n".join(map(_outline, found)), "```", ""]
    return "\n".join(lines)


def _outline(item: griffe.Object | griffe.Alias) -> str:
    """Its source without what its functions do: declaration, docstring, fields, methods."""
    source, first = item.module.lines, _start(item)
    if item.docstring is None:  # a constant
        return "\n".join(source[first : item.endlineno])
    methods = [member for member in item.members.values() if member.docstring]  # fields have none
    last = item.docstring.endlineno
    if item.is_class:
        last = min([_start(method) for method in methods], default=item.endlineno)
    wanted = METHODS.get(item.name) or [m.name for m in methods if not m.name.startswith("_")]
    parts = ["\n".join(source[first:last]).rstrip()]
    parts += [_outline(method) for method in methods if method.name in wanted]
    return "\n\n".join(parts)


def _start(item: griffe.Object | griffe.Alias) -> int:
    """The index of its first line, with the decorators and comments above it."""
    source, first = item.module.lines, (item.lineno or 1) - 1
    while source[first - 1].lstrip().startswith(("@", "#")):
        first -= 1
    return first


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
