"""Measure cache policies on bundles: speed beside fidelity, and fewer steps at equal cost.

Every policy runs at the same numbers of full steps, in full precision and in every bundle's own
precision; beside it both with as many steps in all. A bundle whose own plan was
fitted (noise guard, variance correction), or whose policy needs graphs of its own, is a point of
its own. All points take turns, batch by
batch, in one run; images are those of noise that no calibration has seen.

    python tools/emoji_dataset.py -o build/emoji.npz
    python tools/cache_table.py w8a8.bundle w4a8.bundle --data build/emoji.npz --page cache.html

`--data` needs the extra `distances`; without it there are no distances between sets.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cache_report
import numpy as np
from bench_cpu import paired
from command import Parser, tool
from cpu_report import spread
from quality_run import SEED, Samples, image_labels

from ditcast.bundle import Bundle
from ditcast.cache import StepPlan, make_plan
from ditcast.errors import ConfigError, optional
from ditcast.held_out import open_distances
from ditcast.progress import counting, say
from ditcast.recipe import ORDERED
from ditcast.runtime import Pipeline, images, machine
from ditcast.runtime.choice import open_backend
from ditcast.runtime.pipeline import Step
from ditcast.schedule import SPACINGS
from ditcast.settings import Settings

if TYPE_CHECKING:
    from ditcast.distances import Distances

FULL, FEWER, FITTED = "full precision", "fewer steps", "fitted"
STATIC = ("none", "fora", "deepcache", "taylor", "output")  # policies that every bundle can run
POLICIES = (
    "fora",
    "taylor-1",
    "taylor-2",
    "output-1",
    "output-2",
    "taylor-3",
    "output-0",
    "output-3",
    "deepcache",
)  # a policy and its order


@dataclass
class Point:
    """One way to make the images, and what was measured of it."""

    precision: str
    policy: str
    pipeline: Pipeline
    plan: StepPlan | None  # None is the bundle's own
    steps: int
    interval: int = 1
    spacing: str | None = None
    image_ms: list[float] = field(default_factory=list)  # per batch
    full: list[int] = field(default_factory=list)  # NFC, per batch
    samples: list[Samples] = field(default_factory=list)

    def sample(self, labels: Sequence[int], first: int) -> Samples:
        """The images `first` and following."""
        self.full.append(0)

        def count(step: Step) -> None:
            self.full[-1] += step.full

        found: Samples = self.pipeline.sample(
            labels,
            seed=SEED,
            first=first,
            steps=self.steps,
            cache=self.plan,
            spacing=self.spacing,
            callback=count,
        )
        return found

    def turn(self, labels: Sequence[int], first: int) -> None:
        """The same, timed and kept."""
        if not self.samples:
            self.full.clear()  # of runs to warm up
        started = time.perf_counter()
        self.samples.append(self.sample(labels, first))
        self.image_ms.append((time.perf_counter() - started) * 1e3 / len(labels))

    def full_steps(self) -> float:
        """NFC: the mean number of full steps of a batch."""
        return round(float(np.mean(self.full)), 2)

    def reused(self) -> float:
        """CUR: the share of (step, slot) that was not computed."""
        plan = self.pipeline.plan(self.steps, self.plan)
        return plan.reused if plan.mask is not None else 1 - self.full_steps() / self.steps


def points(bundles: Sequence[Bundle], args: argparse.Namespace) -> list[Point]:
    """Full precision first; policies on each precision; fewer steps; what was fitted."""
    recipe, slots = bundles[0].manifest.recipe, len(bundles[0].manifest.model.slots)
    backend = open_backend("onnxruntime", bundles[0], Settings(threads=args.threads))
    exact = Pipeline(bundles[0], backend=backend, target="reference")
    precisions, fitted = {"fp32": exact}, []
    for bundle in bundles:
        held, name = bundle.manifest.recipe, precision_of(bundle)
        pipeline = Pipeline(bundle, backend=backend)
        if bundle.manifest.quantization is not None:
            precisions.setdefault(name, pipeline)
        policy = f"{held.cache}-{held.order}" if held.cache in ORDERED else held.cache
        placed = held.placement == "fitted"
        if held.cache not in STATIC or placed:  # what this bundle only has: graphs, or full steps
            policy += ", placed" if placed else ""
            own = Pipeline(bundle, backend=backend, target="reference")
            for precision, runs in (("fp32", own), (name, pipeline))[: 1 + (held.scheme != "none")]:
                fitted.append(Point(precision, policy, runs, None, recipe.steps, held.interval))
        elif bundle.manifest.cache is not None:
            what = f"{FITTED}: {policy}, guard {held.guard}, vc {held.correction}"
            what += f", {held.trajectories} trajectories, {held.selection}"
            fitted.append(Point(name, what, pipeline, None, recipe.steps, held.interval))
    nothing, found = make_plan("none", steps=recipe.steps, interval=1, slots=slots), []
    for name, pipeline in precisions.items():
        title = FULL if name == "fp32" else "none"
        found.append(Point(name, title, pipeline, nothing, recipe.steps))
        for text in args.policies:
            policy, _, order = text.partition("-")
            for interval in args.intervals:
                plan = make_plan(
                    policy,
                    steps=recipe.steps,
                    interval=interval,
                    slots=slots,
                    order=int(order or 0),
                )
                found.append(Point(name, text, pipeline, plan, recipe.steps, interval))
    for interval in args.intervals:
        plan = make_plan("fora", steps=recipe.steps, interval=interval, slots=slots)
        nothing = make_plan("none", steps=plan.full_steps, interval=1, slots=slots)
        for name, pipeline in precisions.items():
            if not pipeline.fixed_steps("none"):  # stored features are those of the recipe's steps
                found.append(Point(name, FEWER, pipeline, nothing, plan.full_steps))
    return [*found, *fitted]


def precision_of(bundle: Bundle) -> str:
    """What is the same in bundles whose quantization is compared: scheme, method, features."""
    recipe = bundle.manifest.recipe
    return f"{recipe.scheme} {recipe.method} {recipe.temporal}"


def check_bundles(bundles: Sequence[Bundle]) -> None:
    """Refuse bundles whose images cannot be compared.

    Raises:
        ConfigError: of another model or sampling than the first, or of latents.
    """
    first = bundles[0]
    if first.manifest.model.sample_shape[0] != 3:
        raise ConfigError(f"bundles: {first.path} samples latents, which are no pictures")
    for bundle in bundles[1:]:
        keys = [
            key
            for key in ("steps", "sampler", "guidance")
            if getattr(bundle.manifest.recipe, key) != getattr(first.manifest.recipe, key)
        ]
        if bundle.manifest.model.fingerprint != first.manifest.model.fingerprint:
            keys.insert(0, "model")
        if keys:
            raise ConfigError(
                f"bundles: {bundle.path} has another {', '.join(keys)} than {first.path}; "
                "compile all with the same"
            )


def choose_spacing(point: Point, labels: Sequence[int], wanted: Samples) -> None:
    """Fewer steps get the timestep spacing that is best on the first batch."""

    def fidelity(spacing: str) -> float:
        point.spacing = spacing
        return float(np.median(paired(point.sample(labels, 0), wanted, unit=True)))

    point.spacing = max(SPACINGS, key=fidelity)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Sample all points in turns, then compare."""
    bundles = [Bundle.open(path) for path in args.bundles]
    model, recipe = bundles[0].manifest.model, bundles[0].manifest.recipe
    check_bundles(bundles)
    distances = None
    if args.data is not None:
        distances = open_distances(args.data, args.images, model.sample_shape, model.num_classes)
    entries = points(bundles, args)
    labels = image_labels(list(range(model.num_classes)), args.images)
    batches = [labels[i : i + recipe.batch] for i in range(0, args.images, recipe.batch)]
    wanted = entries[0].sample(batches[0], 0)
    for point in entries:
        if point.policy == FEWER:
            choose_spacing(point, batches[0], wanted)
        else:
            point.sample(batches[0][:1], 0)  # opens its sessions
    with counting("measuring", len(batches) * len(entries)) as advance:
        for i, batch in enumerate(batches):
            for point in entries[i:] + entries[:i]:
                point.turn(batch, i * recipe.batch)
                advance()
    facts = machine.describe() | entries[0].pipeline.backend.facts()
    report: dict[str, Any] = {
        "machine": facts,
        "request": {
            "model": model.source,
            "images": args.images,
            "batch": recipe.batch,
            "steps": recipe.steps,
            "guidance": recipe.guidance,
            "image_seed": SEED,
            "bundles": {str(b.path): b.manifest.recipe.model_dump(mode="json") for b in bundles},
        },
        "distances": distances.describe() if distances else None,
        "rows": [_row(point, entries[0], labels, distances) for point in entries],
    }
    return report | {"stacking": stacking(report["rows"])}


def _row(
    point: Point, reference: Point, labels: list[int], distances: Distances | None
) -> dict[str, Any]:
    """The figures of one point; speed never without fidelity beside it."""
    made, wanted = (np.concatenate(p.samples) for p in (point, reference))
    similarity = images.ssim(images.to_unit(made), images.to_unit(wanted))
    row = {
        "precision": point.precision,
        "policy": point.policy,
        "interval": point.interval,
        "steps": point.steps,
        "full_steps": point.full_steps(),
        "reused": round(point.reused(), 4),
        "spacing": point.spacing,
        "image_ms": spread(point.image_ms),
        "speedup": spread(np.array(reference.image_ms) / np.array(point.image_ms)),
        "psnr_db": spread(paired(made, wanted, unit=True)),
        "ssim": None if similarity is None else spread(similarity),
    }
    if distances is None:
        return row
    features = [distances.features(images.to_unit(samples)) for samples in (made, wanted)]
    return row | distances.judge(features[0], features[1], labels)


def stacking(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What quantization and cache lose together beyond the larger of the two alone, in fd_to_fp.

    One entry per fitted plan that is in the table without what was fitted, too: the loss without
    and with it, and the share that was won back.
    """
    known = {
        (row["precision"], row["policy"], row["interval"]): row["fd_to_fp"]["value"]
        for row in rows
        if "fd_to_fp" in row
    }
    found = []
    for row in rows:
        if not row["policy"].startswith(FITTED) or "fd_to_fp" not in row:
            continue
        precision, interval = row["precision"], row["interval"]
        policy = row["policy"].removeprefix(f"{FITTED}: ").partition(",")[0]
        keys = (precision, "none", 1), ("fp32", policy, interval), (precision, policy, interval)
        if not known.keys() >= {*keys}:
            say(f"stacking: no row of {policy} at interval {interval} to compare {precision} with")
            continue
        quantized, cached, both = (known[key] for key in keys)
        larger = max(quantized, cached)
        loss, left = both - larger, row["fd_to_fp"]["value"] - larger
        entry = {"precision": precision, "fitted": row["policy"], "full_steps": row["full_steps"]}
        entry |= {"quantized": quantized, "cached": cached, "both": both, "loss": loss}
        found.append(entry | {"left": left, "won_back": 1 - left / loss if loss > 0 else None})
    return found


def parse() -> argparse.Namespace:
    """The arguments; what is wrong with them is a `ConfigError`."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("bundles", nargs="+", type=Path, metavar="BUNDLE")
    add("--policies", nargs="+", choices=POLICIES, default=list(POLICIES[:5]), metavar="POLICY")
    add("--intervals", nargs="+", type=int, default=[2, 3, 4, 5, 7])
    add("--images", type=int, default=128)
    add("--threads", type=int, default=0, help="0 is one per core")
    add("--data", type=Path, help="what tools/emoji_dataset.py wrote: adds distances")
    add("--json", type=Path, help="write the figures")
    add("--page", type=Path, help="write a page, .html")
    return parser.parse_args()


@tool("cache_table")
def main() -> None:
    """Measure and report: exit 2 for wrong usage or input, in one line."""
    args = parse()
    if args.images < 4:
        raise ConfigError(f"images: got {args.images}, expected at least 4")
    for path in filter(None, (args.json, args.page)):
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: no folder {path.parent}; create it first")
    if args.page is not None:
        optional("plotly.graph_objects", "report")
    report = measure(args)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    cache_report.show(report)
    if args.page is not None:
        cache_report.plot(report, args.page)


if __name__ == "__main__":
    main()
