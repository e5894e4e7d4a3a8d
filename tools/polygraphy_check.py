"""A cross-check of a bundle's TensorRT graphs by NVIDIA's polygraphy, which needs no GPU for it.

python tools/polygraphy_check.py BUNDLE... [--json FILE]

For each graph: what `polygraphy inspect model` counts, what `polygraphy check lint` objects to, and
its comparator's word on ONNX Runtime, as polygraphy runs it, against the session of ditcast.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from command import Parser, tool
from numpy.typing import NDArray

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.errors import MissingDependencyError, UnsupportedError
from ditcast.progress import say
from ditcast.runtime.backends import Session, graph_file, make_backend
from ditcast.runtime.engines import TARGET, graphs_in
from ditcast.sampling import Coefficients, coefficients, draw_noise, needs_noise
from ditcast.schedule import from_config
from ditcast.tables import show

LIMIT = 0.01  # of an output's range: its mean error, as where codes at ties go the other way
COUNTED = re.compile(r"(\d+) Node\(s\)")
COMMAND = [sys.executable, "-c", "from polygraphy.tools import main; main()"]


def load() -> tuple[Any, Any]:
    """Polygraphy's comparator and its runner of ONNX Runtime, as modules.

    Raises:
        MissingDependencyError: it is not installed.
    """
    names = ("comparator", "backend.onnxrt", "logger")
    try:
        comparator, onnxrt, logger = (importlib.import_module(f"polygraphy.{x}") for x in names)
    except ImportError as err:
        raise MissingDependencyError(
            f"package polygraphy is needed and cannot be loaded ({err}). Install it with: pip "
            "install polygraphy"
        ) from err
    logger.G_LOGGER.module_severity = logger.G_LOGGER.ERROR
    return comparator, onnxrt


def feeds_of(bundle: Bundle, graph: str) -> dict[str, Any]:
    """Inputs of a graph: those of the golden step where it takes them, else of a request."""
    recipe, model = bundle.manifest.recipe, bundle.manifest.model
    schedule = from_config(bundle.manifest.schedule)
    timesteps = schedule.timesteps(recipe.steps).astype(np.float32)
    label = (bundle.manifest.stored_labels() or (0,))[0]
    if graph == "temporal":
        return {"timesteps": timesteps, "class_labels": np.array([label])}
    if graph == "sampler":
        noise = draw_noise(0, 0, model.sample_shape, recipe.steps * needs_noise(recipe.sampler))
        found = {"noise": noise[:1], "class_labels": np.array([label]), "timesteps": timesteps}
        found["guidance_scale"] = np.array(recipe.guidance, np.float32)
        return found | ({"step_noise": noise[1:, None]} if len(noise) > 1 else {})
    if graph in ("add", "update"):
        return between_feeds(bundle, graph)
    held, _ = tensors.load(bundle.file(bundle.manifest.golden[0]))
    prefix = f"{TARGET}.input."
    found = {key.removeprefix(prefix): held[key] for key in held if key.startswith(prefix)}
    if graph == "full":
        return found
    rng, rows = np.random.default_rng(0), (len(found["sample"]), *model.slot_shape)
    step = {name: found[name] for name in ("sample", "features")}
    slots = len(model.slots)
    if graph == "reuse":
        return {**step, "forecast": rng.standard_normal(rows).astype(np.float32)}
    caches = {f"cache.{k}": rng.standard_normal(rows).astype(np.float32) for k in range(slots)}
    return {**step, "mask": (np.arange(slots) % 2).astype(np.float32), **caches}


def between_feeds(bundle: Bundle, graph: str) -> dict[str, Any]:
    """Inputs of the graphs between the steps: random ones, and the schedule's first step."""
    recipe, model, rng = bundle.manifest.recipe, bundle.manifest.model, np.random.default_rng(0)
    channels, *size = model.sample_shape

    def draw(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    if graph == "add":
        return {name: draw(2, *model.slot_shape) for name in ("part", "older")}
    schedule = from_config(bundle.manifest.schedule)
    table = coefficients(schedule, recipe.sampler, recipe.steps)
    found: dict[str, Any] = dict(zip(Coefficients._fields, table.T.copy(), strict=True))
    found |= {name: draw(recipe.steps, channels, 1, 1) for name in ("gain", "offset")}
    if needs_noise(recipe.sampler):
        found["step_noise"] = draw(recipe.steps, 1, channels, *size)
    else:
        del found["k_z"]
    scale = np.array(recipe.guidance, np.float32)
    sample, output = draw(1, channels, *size), draw(2, model.output_channels, *size)
    step = np.array(0, np.int64)
    return {**found, "x": sample, "output": output, "step": step, "guidance_scale": scale}


def called(*arguments: str) -> str:
    """What a command of polygraphy prints."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def lint(path: Path) -> list[dict[str, Any]]:
    """What `check lint` objects to.

    Raises:
        UnsupportedError: it wrote no report.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "lint.json"
        said = called("check", "lint", str(path), "-o", str(report))
        if not report.is_file():
            line = " ".join(said.split())[-300:]
            raise UnsupportedError(f"polygraphy check lint gives no report for {path}: {line}")
        found: list[dict[str, Any]] = json.loads(report.read_text())["lint_entries"]
    return found


def compared(path: Path, session: Session, feeds: dict[str, Any]) -> dict[str, float]:
    """Mean error of each output over its range, by polygraphy's comparator."""
    comparator, onnxrt = load()
    theirs = onnxrt.OnnxrtRunner(onnxrt.SessionFromOnnx(str(path)))
    results = comparator.Comparator.run([theirs], data_loader=[feeds])
    (wanted,) = (iteration for held in results.values() for iteration in held)
    ours = session.run(feeds, list(wanted))
    results.add([ours], runner_name="ditcast")
    atol = {name: LIMIT * max(float(np.ptp(x)), 1e-6) for name, x in wanted.items()}
    compare = comparator.SimpleCompareFunc(atol=atol, rtol=0, check_error_stat="mean")
    (found,) = comparator.Comparator.compare_accuracy(results, compare_func=compare)
    ((outputs,),) = found.values()
    return {name: float(x.mean_absdiff) / atol[name] * LIMIT for name, x in outputs.items()}


def check(bundle: Bundle) -> list[dict[str, Any]]:
    """A row per graph."""
    backend, rows = make_backend("onnxruntime"), []
    for graph in graphs_in(bundle):
        file = graph_file(bundle, TARGET, graph)
        say(f"polygraphy_check: {file.path}")
        counted = COUNTED.search(called("inspect", "model", str(file.path)))
        entries = lint(file.path)
        errors = compared(file.path, backend.session(file), feeds_of(bundle, graph))
        rows.append(
            {
                "bundle": bundle.path.name,
                "graph": graph,
                "nodes": int(counted[1]) if counted else 0,
                "lint": entries,
                "errors": errors,
            }
        )
    return rows


def failed(row: dict[str, Any]) -> bool:
    """Whether polygraphy cannot read a graph, has an exception for it, or sees other outputs."""
    severe = [entry for entry in row["lint"] if entry["level"] == "exception"]
    return not row["nodes"] or bool(severe) or max(row["errors"].values()) > LIMIT


def report(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = [["bundle", "graph", "passed", "nodes", "exceptions", "warnings", "mean-error"]]
    for row in rows:
        levels = [entry["level"] for entry in row["lint"]]
        counts = [levels.count("exception"), levels.count("warning")]
        figures = [str(n) for n in (row["nodes"], *counts)]
        names = [row["bundle"], row["graph"], "no" if failed(row) else "yes"]
        table.append([*names, *figures, f"{max(row['errors'].values()):.2e}"])
    show(table, right=3)


@tool("polygraphy_check")
def main() -> None:
    """Check every bundle; exit 1 where polygraphy objects."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--json", type=Path, help="write all findings")
    args: argparse.Namespace = parser.parse_args()
    load()
    rows = [row for path in args.bundles for row in check(Bundle.open(path))]
    report(rows)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if any(map(failed, rows)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
