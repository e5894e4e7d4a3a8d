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


def _forecasting(build: Builder, top: Scope) -> str:
    """The loop of a plan whose full steps know which reuse steps they serve; returns samples."""
    spec, outer = build.spec, Scope("segments")
    starts, lengths = spec.plan.segments()
    index = "segments/iteration"
    start = outer.op("Gather", build.constant("segment_starts", starts), index, axis=0)
    later, weights = spec.plan.ahead()
    later, weights = later[starts], weights[starts]
    carried = [build.sample("segments", "noise", "segments/after")]
    carried_rows = later.shape[1] - later.shape[1] // spec.plan.history
    wanted = outer.op("Gather", build.constant("ahead_steps", later), index, axis=0)
    ahead = {
        "ahead": build.features_of(outer, wanted, axis=1),
        "weights": outer.op(
            "Gather", build.constant("ahead_weights", weights, np.float32), index, axis=0
        ),
    }
    results = build.network(outer, "full", "segments/x", start, ahead)
    if spec.plan.full.all():
        build.step(outer, "segments/x", start, results["output"], "segments/after")
    else:
        forecasts = results["forecast"]
        if carried_rows:
            carried.append(_pending(build, top, carried_rows))
            forecasts = _carry(build, outer, forecasts, carried_rows)
        build.step(outer, "segments/x", start, results["output"], "segments/x_full")
        inner = Scope("reuse_steps")
        one = build.constant("scalar_one", 1)
        offset = inner.op("Add", "reuse_steps/iteration", one)
        t = inner.op("Add", start, offset)
        forecast = inner.op("Gather", forecasts, "reuse_steps/iteration", axis=0)
        reused = build.network(inner, "reuse", "reuse_steps/x", t, {"forecast": forecast})
        build.step(inner, "reuse_steps/x", t, reused["output"], "reuse_steps/after")
        length = outer.op("Gather", build.constant("segment_lengths", lengths), index, axis=0)
        trips = outer.op("Sub", length, one)
        inside = [build.sample("reuse_steps", "segments/x_full", "reuse_steps/after")]
        last = build.loop(outer, inner, trips, inside)[0]
        outer.name_it(last, "segments/after")
    trips = build.constant("segments_count", len(starts))
    return build.loop(top, outer, trips, carried)[0]


def _output(build: Builder, top: Scope) -> str:
    """The loop of a plan that predicts the network's output; returns samples.

    Outputs of earlier full steps are carried from segment to segment. Before there are any they
    are zeros, whose weights are zero too.
    """
    spec, outer, inner = build.spec, Scope("segments"), Scope("reuse_steps")
    starts, lengths = spec.plan.segments()
    index, one = "segments/iteration", build.constant("scalar_one", 1)
    start = outer.op("Gather", build.constant("segment_starts", starts), index, axis=0)
    nothing = np.zeros((0, spec.plan.weights.shape[2]))
    ahead = build.features_of(outer, build.constant("no_steps", nothing[:, 0]), axis=1)
    none = {"ahead": ahead, "weights": build.constant("no_weights", nothing, np.float32)}
    newest = build.network(outer, "full", "segments/x", start, none)["output"]
    build.step(outer, "segments/x", start, newest, "segments/x_full")
    outputs = [newest, *(f"segments/output_{age}" for age in range(1, spec.plan.history))]
    t = inner.op("Add", start, inner.op("Add", "reuse_steps/iteration", one))
    table = build.constant("output_weights", spec.plan.weights[..., 0], np.float32)
    weights, found = inner.op("Gather", table, t, axis=0), ""
    for age, output in enumerate(outputs):
        weight = inner.op("Gather", weights, build.constant(f"age_{age}", age), axis=0)
        part = inner.op("Mul", weight, output)
        found = inner.op("Add", found, part) if found else part
    build.step(inner, "reuse_steps/x", t, found, "reuse_steps/after")
    length = outer.op("Gather", build.constant("segment_lengths", lengths), index, axis=0)
    inside = [build.sample("reuse_steps", "segments/x_full", "reuse_steps/after")]
    last = build.loop(outer, inner, outer.op("Sub", length, one), inside)[0]
    outer.name_it(last, "segments/after")
    carried = [build.sample("segments", "noise", "segments/after")]
    carried += _older(build, top, outer, outputs)
    return build.loop(top, outer, build.constant("segments_count", len(starts)), carried)[0]


def _older(build: Builder, top: Scope, outer: Scope, outputs: list[str]) -> list[Carried]:
    """The outputs but the newest, as they move on from one segment to the next."""
    shape = (build.spec.output_channels, *build.spec.sample_shape[1:])
    sizes = build.constant("output_shape", shape)
    rows, zero = top.op("Shape", build.row_index), build.constant("no_output", 0.0, np.float32)
    zeros = top.op("Expand", zero, top.op("Concat", rows, sizes, axis=0))
    carried = []
    for newer, name in itertools.pairwise(outputs):
        outer.name_it(newer, f"{name}_after")
        carried.append(Carried(name, zeros, f"{name}_after", ["N", *shape]))
    return carried


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
