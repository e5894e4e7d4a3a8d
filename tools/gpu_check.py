"""What a bundle does on an NVIDIA GPU: correctness, latency, sizes; the only script that needs one.

python tools/gpu_check.py BUNDLE... [--backend tensorrt] [--runs 30] [--images 4] [--json FILE]

Each bundle was exported with `--target tensorrt`; compile one with `--scheme none` for the row in
half precision, one with `--scheme fp8` for 8-bit floats. Missing engines are built first. A row in
float32 is of one step of the graph of full precision, which is built for it and not kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from command import Parser, tool

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache import make_plan
from ditcast.errors import ConfigError, UnsupportedError
from ditcast.manifest import REFERENCE
from ditcast.options import ENGINE_BACKENDS
from ditcast.progress import say
from ditcast.runtime import Pipeline
from ditcast.runtime.backends import Session, graph_file, make_backend
from ditcast.runtime.backends.gpu import find_gpu
from ditcast.runtime.backends.tensorrt import EngineBuilder, no_gpu
from ditcast.runtime.backends.tensorrt_session import TensorRtBackend
from ditcast.runtime.engineaudit import audit_engines
from ditcast.runtime.engines import TARGET, build_engines, profile_of
from ditcast.tables import show

PSNR_LIMIT_DB = 40.0  # of a step, between this GPU and ONNX Runtime on the same graph
SEED = 1


def psnr_db(found: Any, wanted: Any) -> float:
    """Over the range of what is wanted, capped at 150."""
    error = np.square(found.astype(np.float64) - wanted).mean() / np.ptp(wanted) ** 2
    return float(-10 * np.log10(max(error, 1e-15)))


def timed(run: Callable[[], object], runs: int) -> dict[str, float]:
    """10th percentile, median and 90th percentile in ms, after three runs to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(runs):
        started = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - started) / 1e6)
    return dict(zip(("p10", "p50", "p90"), np.percentile(times, (10, 50, 90)), strict=True))


def golden(bundle: Bundle, target: str) -> tuple[dict[str, Any], Any]:
    """Inputs and output of a target's full step that export wrote down."""
    held, _ = tensors.load(bundle.file(bundle.manifest.golden[0]))
    prefix = f"{target}.input."
    feeds = {key.removeprefix(prefix): held[key] for key in held if key.startswith(prefix)}
    rows = {key: array[:2] for key, array in feeds.items()}
    empty = {"ahead": rows["ahead"][:0, :2], "weights": rows["weights"][:0]}
    return rows | empty, held[f"{target}.output"][:2]


def step(session: Session, bundle: Bundle, target: str, runs: int) -> dict[str, Any]:
    """A full step against the output that export wrote down."""
    feeds, wanted = golden(bundle, target)
    return {
        "step_psnr_db": psnr_db(session.run(feeds, ["output"])["output"], wanted),
        "full_step_ms": timed(lambda: session.run(feeds, ["output"]), runs),
    }


def float32(
    bundle: Bundle, backend: TensorRtBackend, builder: EngineBuilder, runs: int
) -> dict[str, Any]:
    """The row of one step of full precision."""
    say(f"gpu_check: {bundle.path.name}, a step in float32")
    graph = graph_file(bundle, REFERENCE, "full")
    built = builder.build(graph, profile_of(bundle.manifest, "full"), decompose=True)
    before = backend.device.used()
    session = backend.over(built.plan, graph)
    return step(session, bundle, REFERENCE, runs) | {
        "bundle": bundle.path.name,
        "scheme": "float32",
        "loop": "step",
        "cache": "none",
        "engines": [],
        "memory_mib": (backend.device.used() - before) / 2**20,
        "plan_bytes": {"full": len(built.plan)},
        "full_steps": 1,
    }


def check(
    bundle: Bundle, backend: TensorRtBackend, *, runs: int, images: int
) -> list[dict[str, Any]]:
    """One row per control loop and cache; every latency has its fidelity beside it.

    `memory_mib` is the most that sessions and a request take of the GPU.
    """
    exact = Pipeline(bundle, target=TARGET)
    audits = [x for loop in ("host", "graph") for x in audit_engines(bundle, backend.name, loop)]
    common = {
        "bundle": bundle.path.name,
        "scheme": bundle.manifest.recipe.scheme,
        **step(backend.session(graph_file(bundle, TARGET, "full")), bundle, TARGET, runs),
        "engines": [audit.as_json() for audit in audits],
        "plan_bytes": {
            engine.graph: bundle.manifest.files[engine.path].size
            for engine in bundle.manifest.engines
            if engine.backend == backend.name
        },
    }
    first = (bundle.manifest.stored_labels() or (0,))[0]
    labels, rows = [first] * images, []
    for loop, cache in (("host", "none"), ("host", None), ("graph", None)):
        chosen: Any = {"loop": loop, "cache": cache}
        used: list[int] = []
        watch: Any = {"callback": lambda _, used=used: used.append(backend.device.used())}
        say(f"gpu_check: {bundle.path.name}, {loop} loop, cache {cache or 'of the recipe'}")
        before = backend.device.used()
        pipeline = Pipeline(bundle, backend=backend)
        found = pipeline.sample(labels, seed=SEED, **chosen, **(watch if loop == "host" else {}))
        memory = max([*used, backend.device.used()]) - before
        same = exact.sample(labels, seed=SEED, **chosen)
        again = functools.partial(pipeline.sample, labels, seed=SEED, **chosen)
        spread = timed(again, max(runs // 10, 2))
        rows.append(
            common
            | {
                "loop": loop,
                "cache": cache or bundle.manifest.recipe.cache,
                "images": images,
                "full_steps": full_steps(pipeline, cache),
                "image_ms": {key: ms / images for key, ms in spread.items()},
                "psnr_db": psnr_db(found, same),
                "memory_mib": memory / 2**20,
            }
        )
        del pipeline, again  # and their buffers
    return rows


def full_steps(pipeline: Pipeline, cache: str | None) -> int:
    """How many full steps a sample takes."""
    if cache != "none":
        return pipeline.plan().full_steps
    recipe = pipeline.recipe
    slots = len(pipeline.model.slots)
    plan = make_plan("none", steps=recipe.steps, interval=1, order=0, slots=slots)
    return plan.full_steps


def report(rows: list[dict[str, Any]]) -> None:
    """The table."""
    header = (
        "bundle scheme loop cache full-steps step-ms step-dB ms/image dB-to-ORT plans-MiB GPU-MiB"
    )
    table = [header.split()]
    for row in rows:
        figures = [
            f"{row['full_step_ms']['p50']:.2f}",
            f"{row['step_psnr_db']:.1f}",
            f"{row['image_ms']['p50']:.1f}" if "image_ms" in row else "-",
            f"{row['psnr_db']:.1f}" if "psnr_db" in row else "-",
            f"{sum(row['plan_bytes'].values()) / 2**20:.1f}",
            f"{row['memory_mib']:.1f}",
        ]
        names = [row["bundle"], row["scheme"], row["loop"], row["cache"], str(row["full_steps"])]
        table.append([*names, *figures])
    show(table, right=4)


@tool("gpu_check")
def main() -> None:
    """Check every bundle; exit 1 where a step differs or a quantized layer became float."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--backend", choices=ENGINE_BACKENDS, default="tensorrt")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write all figures")
    args: argparse.Namespace = parser.parse_args()
    gpu = find_gpu()
    if gpu is None:
        raise UnsupportedError(no_gpu(args.backend, "check a bundle"))
    if min(args.runs, args.images) < 1:
        raise ConfigError(f"got --runs {args.runs} --images {args.images}, expected at least 1")
    builder, rows = EngineBuilder(args.backend), []
    backend: Any = make_backend(args.backend)
    for path in args.bundles:
        bundle = Bundle.open(path)
        build_engines(bundle, builder)
        rows.append(float32(bundle, backend, builder, args.runs))
        rows += check(bundle, backend, runs=args.runs, images=args.images)
    report(rows)
    if args.json is not None:
        facts = {"gpu": gpu._asdict(), args.backend: builder.version, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    failed = [row for row in rows if row["step_psnr_db"] < PSNR_LIMIT_DB]
    lost = [e for row in rows for e in row["engines"] if not e["passed"]]
    if failed or lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
