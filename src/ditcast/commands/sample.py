"""`ditcast sample`: images from a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from ditcast.cache import StepPlan
from ditcast.options import (
    BACKEND,
    BUNDLE,
    JSON,
    LOOP,
    OUTPUT,
    QUIET,
    STRICT,
    parse_labels,
    runtime_options,
    write_json,
)
from ditcast.progress import counting
from ditcast.settings import Settings
from ditcast.tables import warn_of_idle_cache, warn_of_idle_run

if TYPE_CHECKING:
    from ditcast.runtime.pipeline import Pipeline, Samples, Step


@click.command()
@BUNDLE
@OUTPUT
@click.option("--labels", required=True, help="classes by number or name: --labels 3 5")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="of the noise")
@click.option("--steps", type=int, help="instead of the recipe's")
@click.option("--guidance", type=float, help="instead of the recipe's")
@click.option("--cache", help="instead of the recipe's policy, such as none")
@click.option("--target", help="graphs to run, such as reference  [default: the backend's]")
@click.option("--scale", type=click.IntRange(1), default=1, show_default=True, help="enlarge .png")
@click.option("--low-memory", is_flag=True, help="load the parts of the model one by one")
@LOOP
@BACKEND
@runtime_options
@STRICT
@QUIET
@JSON
def sample(
    bundle: Path,
    output: Path,
    labels: str,
    seed: int,
    steps: int | None,
    guidance: float | None,
    cache: str | None,
    target: str | None,
    scale: int,
    low_memory: bool,
    loop: Literal["host", "graph"],
    backend: str,
    settings: Settings,
    strict: bool,
    json_file: Path | None,
) -> None:
    """Sample images: a .png grid, or a .npy of the samples themselves."""
    from ditcast.runtime import Pipeline, images, machine

    pipeline = Pipeline(
        bundle, backend=backend, target=target, settings=settings, low_memory=low_memory
    )
    images.check_output(output, pipeline.model.sample_shape[0])
    plan, policy = pipeline.plan(steps, cache), cache or pipeline.recipe.cache
    warn_of_idle_cache(policy, plan, strict)
    numbers = parse_labels(labels, pipeline.model.classes)
    started = time.perf_counter()
    request = {"seed": seed, "guidance": guidance, "steps": steps, "cache": cache, "loop": loop}
    found, full = _batches(pipeline, numbers, plan, request)
    seconds = time.perf_counter() - started
    images.save(found, output, scale)
    figures: dict[str, Any] = {"images": len(numbers), "seconds": round(seconds, 3)}
    mean = sum(full) / len(full)
    figures |= {"full_steps": mean, "reuse_steps": len(plan.full) - mean}
    figures["peak_memory_mib"] = round(machine.peak_memory_mib(), 1)
    write_json(json_file, figures | pipeline.backend.facts())
    click.echo(f"{output}: {len(numbers)} images in {seconds:.1f} s")
    warn_of_idle_run(policy, plan, full, strict)


def _batches(
    pipeline: Pipeline, labels: list[int], plan: StepPlan, request: dict[str, Any]
) -> tuple[Samples, list[int]]:
    """All samples in batches of the recipe's size, and how many steps of each batch were full."""
    size, watched = pipeline.recipe.batch, request["loop"] == "host"
    starts = range(0, len(labels), size)
    found: list[Samples] = []
    full: list[int] = []
    each = len(plan.full) if watched else 1  # the graph loop shows nothing before its end
    with counting("sampling", len(starts) * each) as advance:

        def watch(step: Step) -> None:
            del step
            advance()

        callback = watch if watched else None
        for i in starts:
            batch = pipeline.sample(labels[i : i + size], first=i, callback=callback, **request)
            found.append(batch)
            full.append(pipeline.full_steps)
            if not watched:
                advance()
    return np.concatenate(found), full
