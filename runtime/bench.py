"""What a bundle gains and loses: every variant interleaved in one run, fidelity beside speed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.cache import idle, idle_run
from ditcast.progress import counting, tell
from ditcast.runtime import fidelity, images, machine
from ditcast.runtime.choice import open_backend
from ditcast.runtime.fidelity import DISTANCES, Distances, spread
from ditcast.runtime.pipeline import Pipeline, Step
from ditcast.runtime.steps import describe, feature_cosine
from ditcast.schedule import SPACINGS
from ditcast.settings import Settings

SHOWN = 16  # images of each variant that the report shows
FOLLOWED = 4  # samples of a batch that are compared after every step


@dataclass
class Variant:
    """One way to make the same images, and what was measured of it."""

    name: str
    pipeline: Pipeline
    cache: str
    steps: int
    spacing: str | None = None
    image_ms: list[float] = field(default_factory=list)  # per round
    step_ms: dict[bool, list[float]] = field(default_factory=lambda: defaultdict(list))
    full_steps: list[int] = field(default_factory=list)  # per round
    samples: list[NDArray[np.float32]] = field(default_factory=list)
    # Of the last batch, per step: whether it was full, and the first few samples.
    path: list[tuple[bool, NDArray[np.float32]]] = field(default_factory=list)

    def run(self, labels: list[int], seed: int, first: int, guidance: float) -> None:
        """Sample one batch and keep its time and its images."""
        self.path.clear()
        self.samples.append(self.timed(labels, seed, first, guidance))

    def timed(
        self, labels: list[int], seed: int, first: int, guidance: float, steps: int | None = None
    ) -> Any:
        """Sample one batch, adding its time per image and per step."""
        last = started = time.perf_counter_ns()
        self.full_steps.append(0)

        def watch(step: Step) -> None:
            nonlocal last
            self.full_steps[-1] += step.full
            now = time.perf_counter_ns()
            if step.index:  # the first step's time holds the temporal features
                self.step_ms[step.full].append((now - last) / 1e6)
            self.path.append((step.full, step.sample[:FOLLOWED].copy()))
            last = time.perf_counter_ns()

        found = self.pipeline.sample(
            labels,
            seed=seed,
            first=first,
            guidance=guidance,
            steps=self.steps if steps is None else steps,
            cache=self.cache,
            spacing=self.spacing,
            callback=watch,
        )
        self.image_ms.append((time.perf_counter_ns() - started) / 1e6 / len(labels))
        return found

    def warm_up(self, labels: list[int], guidance: float) -> None:
        """A few steps of one batch, of both kinds, whose times do not count."""
        few = min(self.steps, self.pipeline.recipe.interval + 1)
        if self.pipeline.fixed_steps(self.cache):
            few = self.steps
        self.timed(labels, 0, 0, guidance, few)
        self.forget()

    def idle(self) -> str | None:
        """Why its cache did nothing in any batch, or all that it may in every one."""
        plan = self.pipeline.plan(self.steps, self.cache)
        return idle(self.cache, plan) or idle_run(self.cache, plan, self.full_steps)

    def forget(self) -> None:
        """Drop all times so far."""
        self.image_ms.clear()
        self.step_ms.clear()
        self.full_steps.clear()


def bench(
    bundle: Bundle,
    *,
    backend: str = "onnxruntime",
    settings: Settings | None = None,
    count: int = 128,
    steps: int | None = None,
    seed: int = 1,
    distances: Distances | None = None,
) -> dict[str, Any]:
    """Measure full precision, quantized, cached, both, and fewer full-precision steps.

    `count` images in batches of the recipe's size, classes in turn; `distances`, opened for as
    many, compares them as whole sets. Returns the report as plain values (units are in their
    names); the samples that the page shows are under `"shown"` as `(n, C, H, W)` arrays by variant.

    Raises:
        DitcastError: as `Pipeline` and `Pipeline.sample`.
    """
    recipe = bundle.manifest.recipe
    settings = settings or Settings()
    steps = recipe.steps if steps is None else steps
    variants = _variants(bundle, backend, settings, steps)
    batches = _batches(bundle, count)
    for variant in variants:
        variant.warm_up(batches[0], recipe.guidance)
    if len(variants) > 1 and not has_random_weights(bundle):  # these make no image to compare
        variants.append(_fewer_steps(variants, batches[0], recipe.guidance, seed))
    with counting("measuring", len(batches) * len(variants)) as advance:
        for i, batch in enumerate(batches):
            for variant in variants:
                variant.run(batch, seed, i * recipe.batch, recipe.guidance)
                advance()
    rows = [_row(variant, variants[0], bundle, settings) for variant in variants]
    sets = [np.concatenate(variant.samples) for variant in variants]
    labels = [label for batch in batches for label in batch]
    for row, found in zip(rows, fidelity.judged(sets, labels, distances), strict=True):
        row |= found
    return {
        "machine": machine.describe(),
        "backend": variants[0].pipeline.backend.facts(),
        "bundle": _described(bundle, {row["target"] for row in rows}),
        "request": {
            "images": count,
            "batch": min(recipe.batch, count),
            "steps": steps,
            "guidance": recipe.guidance,
            "seed": seed,
        },
        "variants": rows,
        "distances": None if distances is None else distances.describe(),
        "interaction": _interaction(variants),
        "steps": _steps(variants, steps, batches[-1][:FOLLOWED]),
        "pictures": _pictures(variants),
        "cost": {},
        "unpaired_psnr_db": fidelity.unpaired(sets[0]),
        "shown": {v.name: samples[:SHOWN] for v, samples in zip(variants, sets, strict=True)},
    }


def has_random_weights(bundle: Bundle) -> bool:
    """Whether the model was never trained, so that fidelity means nothing."""
    return bundle.manifest.model.source.startswith("random:")


def _described(bundle: Bundle, targets: set[str]) -> dict[str, Any]:
    """Which bundle was measured, and which of its graphs."""
    model = bundle.manifest.model
    return {
        "model": model.source,
        "fingerprint": model.fingerprint,
        "digest": bundle.manifest.digest,
        "content": bundle.content(targets),
        "recipe": bundle.manifest.recipe.model_dump(mode="json"),
        "random_weights": has_random_weights(bundle),
    }


def _batches(bundle: Bundle, count: int) -> list[list[int]]:
    """Labels of `count` images, classes in turn, in batches of the recipe's size."""
    pool = bundle.manifest.stored_labels() or range(bundle.manifest.model.num_classes)
    labels, size = [pool[i % len(pool)] for i in range(count)], bundle.manifest.recipe.batch
    return [labels[i : i + size] for i in range(0, count, size)]


def _variants(bundle: Bundle, backend: str, settings: Settings, steps: int) -> list[Variant]:
    """Full precision first; then each gain alone and both together, where the recipe has them."""
    runtime = open_backend(backend, bundle, settings)
    recipe = bundle.manifest.recipe
    reference = Pipeline(bundle, backend=runtime, target="reference")
    quantized = Pipeline(bundle, backend=runtime)
    found = [Variant("full precision", reference, "none", steps)]
    if bundle.manifest.quantization is not None:
        found.append(Variant(recipe.scheme, quantized, "none", steps))
    if recipe.cache != "none":  # what the bundle runs; full precision, where it quantizes
        cached = quantized if bundle.manifest.quantization is None else reference
        found.append(Variant("cache", cached, recipe.cache, steps))
    if len(found) == 3:
        found.append(Variant(f"{recipe.scheme} + cache", quantized, recipe.cache, steps))
    return found


def _fewer_steps(variants: list[Variant], batch: list[int], guidance: float, seed: int) -> Variant:
    """The honest rival: full precision with as many steps as the combined variant has time for.

    Its timestep spacing is the one with the best paired PSNR on the first batch.
    """
    reference, combined = variants[0], variants[-1]
    for variant in (reference, combined) * 2:
        variant.timed(batch, seed, 0, guidance)
    ratio = min(combined.image_ms) / min(reference.image_ms)
    combined.forget()
    steps = max(1, min(reference.steps, round(reference.steps * ratio)))
    wanted = images.to_unit(reference.timed(batch, seed, 0, guidance))
    best, spacing = -1.0, SPACINGS[0]
    for candidate in SPACINGS:
        rival = Variant("", reference.pipeline, "none", steps, candidate)
        found = images.to_unit(rival.timed(batch, seed, 0, guidance))
        median = float(np.median(images.psnr_db(found, wanted)))
        if median > best:
            best, spacing = median, candidate
    reference.forget()
    return Variant(f"{steps} steps", reference.pipeline, "none", steps, spacing)


def _row(
    variant: Variant, reference: Variant, bundle: Bundle, settings: Settings
) -> dict[str, Any]:
    """The figures of one variant; speed never without fidelity beside it."""
    made, wanted = (np.concatenate(v.samples) for v in (variant, reference))
    ratios = np.asarray(reference.image_ms) / np.asarray(variant.image_ms)
    folder = f"graphs/{variant.pipeline.target}/"
    files = bundle.manifest.files
    return {
        "name": variant.name,
        "target": variant.pipeline.target,
        "cache": variant.cache,
        "steps": variant.steps,
        "full_steps": round(float(np.mean(variant.full_steps)), 2),
        "idle": variant.idle(),
        "spacing": variant.spacing,
        "image_ms": spread(variant.image_ms),
        "full_step_ms": spread(variant.step_ms[True]),
        "reuse_step_ms": spread(variant.step_ms[False]),
        "speedup": spread(ratios),
        **fidelity.figures(made, wanted),
        "samples": len(made),
        "size_bytes": sum(e.size for name, e in files.items() if name.startswith(folder)),
        "peak_memory_mib": _peak_memory_mib(bundle, variant, settings),
    }


def _steps(variants: list[Variant], steps: int, labels: list[int]) -> dict[str, Any]:
    """What happens at each timestep of the last batch, in what the bundle runs.

    `labels` are those of the samples that are followed.
    """
    exact = (variants[0].pipeline.target, variants[0].cache)
    same = [v for v in variants if v.steps == steps and v.spacing is None]
    paths = {v.name: np.stack([sample for _, sample in v.path]) for v in same}
    made = [v for v in same if (v.pipeline.target, v.cache) != exact] or variants[:1]
    full = np.array([full for full, _ in made[-1].path])
    found = describe(made[-1].pipeline, made[-1].cache, full, paths)
    cosine = feature_cosine(made[-1].pipeline, variants[0].pipeline, labels, steps)
    return found | {"feature_cosine": cosine}


def _pictures(variants: list[Variant]) -> dict[str, int] | None:
    """How many pictures of each variant are kept, and their size; None of latents."""
    shown = np.concatenate(variants[0].samples)[:SHOWN]
    count, channels, height, width = shown.shape
    return {"count": count, "height": height, "width": width} if channels == 3 else None


def _interaction(variants: list[Variant]) -> dict[str, Any] | None:
    """What both gains together are above the product and the sum of each alone.

    None where the bundle has not both. Speed-ups that have nothing to do with each other
    multiply (1), and the squares of such errors add up (0 dB).
    """
    if len(variants) < 4:
        return None
    exact, quantized, cached, both = (np.asarray(v.image_ms) for v in variants[:4])
    samples = [np.concatenate(v.samples) for v in variants[:4]]
    return {
        "speedup": spread((exact / both) / (exact / quantized * exact / cached)),
        "psnr_db": spread(fidelity.interaction(*samples)),
        "samples": len(samples[0]),
    }


def _peak_memory_mib(bundle: Bundle, variant: Variant, settings: Settings) -> float | None:
    """Peak resident memory of a fresh process that samples one image in this way.

    It takes a few steps of both kinds; more would hold no more memory than their features. None,
    and a line that says why, where it fails: what was measured before is not lost for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "sample.json"
        stored = bundle.manifest.stored_labels()
        label = str(stored[0]) if stored else "0"
        command = [sys.executable, "-m", "ditcast", "sample", str(bundle.path), "--labels", label]
        command += ["-o", str(Path(folder) / "sample.npy"), "--json", str(report)]
        command += ["--backend", variant.pipeline.backend.name, "--target", variant.pipeline.target]
        command += ["--threads", str(settings.threads), "--cache", variant.cache]
        command += [] if settings.spin else ["--no-spin"]
        few = min(variant.steps, bundle.manifest.recipe.interval + 1)
        few = variant.steps if variant.pipeline.fixed_steps(variant.cache) else few
        command += ["--steps", str(few)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            tell(f"peak memory of {variant.name!r} was not measured: {done.stderr.strip()}")
            return None
        return float(json.loads(report.read_text())["peak_memory_mib"])


def summary(report: dict[str, Any]) -> list[list[str]]:
    """The report as a table: a header and one row of cells per variant."""
    header = [
        "variant",
        "full steps",
        "ms / image",
        "speed-up",
        "PSNR dB",
        "SSIM",
        "MiB",
        "peak MiB",
    ]
    rows = [header]
    for row in report["variants"]:
        exact = row is report["variants"][0]
        rows.append(
            [
                row["name"],
                f"{row['full_steps']:g} of {row['steps']}",
                _median(row["image_ms"], "{:.1f}"),
                _median(row["speedup"], "{:.2f}x"),
                "(reference)" if exact else _median(row["psnr_db"], "{:.1f}"),
                "(reference)" if exact else _median(row["ssim"], "{:.4f}"),
                f"{row['size_bytes'] / 2**20:.1f}",
                "-" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}",
            ]
        )
    return rows


def distance_summary(report: dict[str, Any]) -> list[list[str]]:
    """Distances as a table: a header and one row of cells per variant; empty if not measured."""
    if report["distances"] is None:
        return []
    rows = [["variant", *DISTANCES]]
    for row in report["variants"]:
        cells = ["(reference)" if row[key] is None else _interval(row[key]) for key in DISTANCES]
        rows.append([row["name"], *cells])
    return rows


def _interval(found: dict[str, float]) -> str:
    return "{value:.4g}\n({low:.4g} to {high:.4g})".format(**found)


def _median(found: dict[str, float] | None, form: str) -> str:
    return "-" if found is None else form.format(found["p50"])


def announce(report: dict[str, Any]) -> None:
    """Say what the table's figures stand on, and which caches chose nothing."""
    for row in report["variants"]:
        if row["idle"] is not None:
            tell(f"warning: {row['name']}: {row['idle']}")
    request, backend = report["request"], report["backend"]
    tell(
        f"{request['images']} images in batches of {request['batch']}, {request['steps']} steps, "
        f"guidance {request['guidance']}, {backend['threads']} threads, "
        f"{report['machine']['cpu']}, integer kernels {backend['integer_mode']}; medians"
    )
    basis = report["distances"]
    if basis is not None:
        tell(
            f"distances (no FID): {basis['pictures_per_side']} pictures per side, "
            f"{basis['pca_dimensions']} dimensions of PCA, {basis['extractor']}"
        )
