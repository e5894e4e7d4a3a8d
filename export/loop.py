"""The graph loop: one ONNX model that turns noise and labels into samples.

An outer `Loop` runs over segments. Each is one full step, then an inner `Loop` of reuse steps
that captures the forecasts from the outer body: a flat `Loop` with them as loop-carried state
would copy all of them at every step. What a full step sums up for the reuse steps behind later
ones is carried from segment to segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from onnx import ModelProto

from ditcast.export.body import Builder, Carried, LoopSpec, Scope
from ditcast.export.loop_deciding import deciding


def sampler_graph(spec: LoopSpec) -> ModelProto:
    """Compose `sampler.onnx`: noise [n,C,H,W], class_labels [n], guidance_scale [] -> latents.

    Stochastic samplers also take step_noise [T,n,C,H,W]; a plan with a gate also gives
    full_steps [], how many of the run's steps were full.
    """
    build, top = Builder(spec), Scope("loop")
    build.rows(top)
    top.name_it(LOOPS[spec.plan.form](build, top), "latents")
    return build.model(top)


# The pieces of a segment. A full step gives its output, and what the reuse steps behind it read; a
# reuse step its output, of that.
Full = Callable[[Scope, str, str], tuple[str, list[str]]]  # of body, number and segment
Reuse = Callable[[Scope, str, list[str]], str]  # of body, number and what it reads


def _segments(build: Builder, top: Scope, full: Full, reuse: Reuse, carried: list[Carried]) -> str:
    """One full step, then its reuse steps, segment by segment; returns samples.

    `carried` is what goes on from one segment to the next beside the samples.
    """
    outer, inner, index = Scope("segments"), Scope("reuse_steps"), "segments/iteration"
    starts, lengths = build.spec.plan.segments()
    start = outer.op("Gather", build.constant("segment_starts", starts), index, axis=0)
    output, kept = full(outer, start, index)
    if build.spec.plan.full.all():
        build.step(outer, "segments/x", start, output, "segments/after")
    else:
        build.step(outer, "segments/x", start, output, "segments/x_full")
        one = build.constant("scalar_one", 1)
        t = inner.op("Add", start, inner.op("Add", "reuse_steps/iteration", one))
        build.step(inner, "reuse_steps/x", t, reuse(inner, t, kept), "reuse_steps/after")
        length = outer.op("Gather", build.constant("segment_lengths", lengths), index, axis=0)
        inside = [build.sample("reuse_steps", "segments/x_full", "reuse_steps/after")]
        last = build.loop(outer, inner, outer.op("Sub", length, one), inside)[0]
        outer.name_it(last, "segments/after")
    carried = [build.sample("segments", "noise", "segments/after"), *carried]
    return build.loop(top, outer, build.constant("segments_count", len(starts)), carried)[0]


def _full(build: Builder, scope: Scope, start: str, index: str) -> dict[str, str]:
    """A full step, which forecasts for the reuse steps that read it."""
    starts, _ = build.spec.plan.segments()
    later, weights = (table[starts] for table in build.spec.plan.ahead())
    steps = scope.op("Gather", build.constant("ahead_steps", later), index, axis=0)
    table = build.constant("ahead_weights", weights, np.float32)
    ahead = {
        "ahead": build.features_of(scope, steps, axis=1),
        "weights": scope.op("Gather", table, index, axis=0),
    }
    return build.network(scope, "full", "segments/x", start, ahead)


def _forecasting(build: Builder, top: Scope) -> str:
    """The loop of a plan whose full steps know which reuse steps they serve; returns samples."""
    plan = build.spec.plan
    many = plan.ahead()[0].shape[1]
    rows = many - many // plan.history  # for reuse steps behind later full steps

    def full(scope: Scope, start: str, index: str) -> tuple[str, list[str]]:
        found = _full(build, scope, start, index)
        forecast = found["forecast"]
        return found["output"], [_carry(build, scope, forecast, rows) if rows else forecast]

    def reuse(scope: Scope, t: str, kept: list[str]) -> str:
        forecast = scope.op("Gather", kept[0], "reuse_steps/iteration", axis=0)
        return build.network(scope, "reuse", "reuse_steps/x", t, {"forecast": forecast})["output"]

    return _segments(build, top, full, reuse, [_pending(build, top, rows)] if rows else [])


def _output(build: Builder, top: Scope) -> str:
    """The loop of a plan that predicts the network's output; returns samples.

    Outputs of earlier full steps are carried from segment to segment. Before there are any they
    are zeros, whose weights are zero too.
    """
    plan = build.spec.plan
    older = [f"segments/output_{age}" for age in range(1, plan.history)]

    def full(scope: Scope, start: str, index: str) -> tuple[str, list[str]]:
        outputs = [_full(build, scope, start, index)["output"], *older]
        for newer, name in itertools.pairwise(outputs):
            scope.name_it(newer, f"{name}_after")
        return outputs[0], outputs

    def reuse(scope: Scope, t: str, kept: list[str]) -> str:
        table = build.constant("output_weights", plan.weights[..., 0], np.float32)
        weights, found = scope.op("Gather", table, t, axis=0), ""
        for age, output in enumerate(kept):
            weight = scope.op("Gather", weights, build.constant(f"age_{age}", age), axis=0)
            part = scope.op("Mul", weight, output)
            found = scope.op("Add", found, part) if found else part
        return found

    shape = (build.spec.output_channels, *build.spec.sample_shape[1:])
    sizes = build.constant("output_shape", shape)
    rows, zero = top.op("Shape", build.row_index), build.constant("no_output", 0.0, np.float32)
    zeros = top.op("Expand", zero, top.op("Concat", rows, sizes, axis=0))
    carried = [Carried(name, zeros, f"{name}_after", ["N", *shape]) for name in older]
    return _segments(build, top, full, reuse, carried)


def _pending(build: Builder, scope: Scope, rows: int) -> Carried:
    """Nothing, summed up for `rows` reuse steps behind later full steps."""
    shape = [
        build.constant(f"pending_{i}", [size])
        for i, size in enumerate((rows, *build.spec.slot_shape))
    ]
    batch = scope.op("Shape", build.row_index)
    zero = build.constant("no_forecast", 0.0, np.float32)
    start = scope.op("Expand", zero, scope.op("Concat", shape[0], batch, *shape[1:], axis=0))
    return Carried(
        "segments/pending", start, "segments/pending_after", [rows, "N", *build.spec.slot_shape]
    )


def _carry(build: Builder, scope: Scope, forecast: str, rows: int) -> str:
    """The forecasts of this segment's reuse steps; what is for later ones is carried on.

    Both are summed up from the oldest full step to the newest, as in the host loop.
    """
    zero, end = "zero", "end"
    longest = build.constant("longest_run", [rows // (build.spec.plan.history - 1)])
    summed = scope.op("Slice", forecast, zero, build.constant("pending_rows", [rows]), zero)
    summed = scope.op("Add", "segments/pending", summed)
    newest = scope.op("Slice", forecast, build.constant("pending_rows", [rows]), end, zero)
    now = scope.op("Slice", summed, zero, longest, zero)
    later = scope.op("Slice", summed, longest, end, zero)
    scope.name_it(scope.op("Concat", later, newest, axis=0), "segments/pending_after")
    return str(now)


def _partial(build: Builder, top: Scope) -> str:
    """A flat loop: every step computes the slots of its mask; returns samples."""
    plan, body = build.spec.plan, Scope("steps")
    assert plan.mask is not None
    t = "steps/iteration"
    shape: list[str | int] = ["N", *build.spec.slot_shape]
    masks = build.constant("masks", plan.mask, np.float32)
    given = {f"cache.{k}": f"steps/cache.{k}" for k in range(plan.mask.shape[1])}
    mask = body.op("Gather", masks, t, axis=0)
    found = build.network(body, "partial", "steps/x", t, {"mask": mask, **given})
    build.step(body, "steps/x", t, found["output"], "steps/after")
    sizes = [build.constant(f"slot_{i}", [size]) for i, size in enumerate(build.spec.slot_shape)]
    rows, nothing = top.op("Shape", build.row_index), build.constant("nothing", 0.0, np.float32)
    zeros = top.op("Expand", nothing, top.op("Concat", rows, *sizes, axis=0))
    carried = [build.sample("steps", "noise", "steps/after")]
    for name, held in given.items():
        body.name_it(found[name.replace("cache", "kept")], f"{held}_after")
        carried.append(Carried(held, zeros, f"{held}_after", shape))
    return build.loop(top, body, build.constant("steps_count", len(plan.full)), carried)[0]


# How the plans of each form run; to add one: a function that returns the samples.
LOOPS: dict[str, Callable[[Builder, Scope], str]] = {
    "forecast": _forecasting,
    "residual": deciding,
    "output": _output,
    "first-block": deciding,
    "extrapolate": deciding,
    "relate": deciding,
    "partial": _partial,
}
