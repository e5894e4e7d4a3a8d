"""What temporal features cost: products, bytes and time of `temporal.onnx` of several bundles.

All are asked for the features of their whole schedule, for one label and the null label, in turn
and in one process: what a request with guidance does once before its loop.

    python tools/tib_cost.py fp.bundle tib.bundle cache.bundle --threads 1
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from command import Parser, tool

from ditcast.bundle import Bundle
from ditcast.errors import ConfigError
from ditcast.runtime import machine
from ditcast.runtime.backends import Session, graph_file, make_backend
from ditcast.runtime.backends.base import Arrays
from ditcast.sampling import with_null
from ditcast.schedule import from_config
from ditcast.settings import Settings

TARGET = "onnxruntime"
PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")


class Entry(NamedTuple):
    """A bundle's graph of temporal features, loaded, and what it is asked for."""

    facts: dict[str, Any]
    session: Session
    feeds: Arrays


def entry(path: Path, settings: Settings) -> Entry:
    """Open a bundle.

    Raises:
        BundleError: none is there, or it is damaged or not exported.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    steps = from_config(manifest.schedule).timesteps(manifest.recipe.steps).astype(np.float32)
    first = (manifest.stored_labels() or (0,))[0]
    labels = np.array(with_null([first], manifest.model.null_label), np.int64)
    feeds: Arrays = {"timesteps": steps, "class_labels": labels}
    graph = graph_file(bundle, TARGET, "temporal")
    facts = {
        "bundle": bundle.path.name,
        "temporal": manifest.recipe.temporal,
        "scheme": manifest.recipe.scheme,
        "steps": len(steps),
        "labels": len(labels),
        "macs": macs(graph.path, feeds),
        "bytes": stored_bytes(graph.path),
    }
    return Entry(facts, make_backend(TARGET, settings).session(graph), feeds)


def macs(path: Path, feeds: Arrays) -> int:
    """Multiply-adds of all products of a graph for inputs of these shapes."""
    model = onnx.load(path)
    for given in model.graph.input:
        for dim, size in zip(
            given.type.tensor_type.shape.dim, feeds[given.name].shape, strict=True
        ):
            dim.dim_value = size
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    shapes |= {held.name: list(held.dims) for held in graph.initializer}
    return sum(
        math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
        for node in graph.node
        if node.op_type in PRODUCTS
    )


def stored_bytes(path: Path) -> int:
    """The file of a graph, and what it has in the file of weights."""
    model = onnx.load(path, load_external_data=False)
    entries = [held.external_data for held in model.graph.initializer]
    lengths = (int(e.value) for entry in entries for e in entry if e.key == "length")
    return path.stat().st_size + sum(lengths)


def measure(entries: list[Entry], runs: int) -> list[dict[str, Any]]:
    """The facts of all, with the median time of a call in ms and its quartiles."""
    found: list[list[float]] = [[] for _ in entries]
    for run in range(runs + 1):  # the first is to warm up
        for each, times in zip(entries, found, strict=True):
            began = time.perf_counter()
            each.session.run(each.feeds, ["features"])
            if run:
                times.append(1e3 * (time.perf_counter() - began))
    quartiles = [np.percentile(times, (50, 25, 75)).round(4).tolist() for times in found]
    return [
        each.facts | {"ms": dict(zip(("p50", "p25", "p75"), values, strict=True))}
        for each, values in zip(entries, quartiles, strict=True)
    ]


@tool("tib_cost")
def main() -> None:
    """Measure and print: exit 2 for wrong usage or input, in one line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="exported")
    parser.add_argument("--runs", type=int, default=100, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=0, help="0 is one per core")
    parser.add_argument("--json", type=Path, help="write the figures")
    args: argparse.Namespace = parser.parse_args()
    if args.runs < 1:
        raise ConfigError(f"runs: got {args.runs}, expected at least 1")
    settings = Settings(threads=args.threads)
    rows = measure([entry(path, settings) for path in args.bundles], args.runs)
    facts = machine.describe()
    print(f"{facts['cpu']}, {settings.thread_count()} threads, {facts['date']}")
    for row in rows:
        print(
            f"{row['bundle']}: {row['temporal']}, {row['scheme']}, {row['steps']} steps, "
            f"{row['labels']} labels: {row['macs'] / 1e6:.2f} M multiply-adds, "
            f"{row['bytes'] / 2**20:.3f} MiB, "
            f"{row['ms']['p50']:.3f} ms ({row['ms']['p25']:.3f}–{row['ms']['p75']:.3f})"
        )
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
