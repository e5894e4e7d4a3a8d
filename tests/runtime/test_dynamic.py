"""Policies that decide on the way, or find their weights there: both loops, and refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cache import make_plan
from ditcast.cache.fitted import of_target, save
from ditcast.cache.stepping import GRAPHS, graphs, held
from ditcast.calibrate import qparams
from ditcast.calibrate.cache import FILE
from ditcast.calibrate.collect import draw_labels
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.threshold import _polynomial
from ditcast.calibrate.trajectory import follow, sample
from ditcast.errors import ConfigError
from ditcast.export import to_onnx
from ditcast.manifest import REFERENCE
from ditcast.models import LoadedModel
from ditcast.runtime import Pipeline
from ditcast.runtime.audit import audit
from ditcast.runtime.bench import announce, bench
from ditcast.schedule import from_config
from ditcast.tables import warn_of_idle_run
from tests.conftest import RECIPE, Cli, make_bundle

STEPS, INTERVAL = 10, 3
POLICIES = ("rfe", "rcs", "relational", "first-block", "stack")
LABELS = [0, 1, 4]


@pytest.fixture(scope="module", params=POLICIES)
def made(
    request: pytest.FixtureRequest, tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """A bundle of each policy, of order 2 where it has one; W8A8, but for the halves of RFC."""
    path = tmp_path_factory.mktemp("dynamic") / "b"
    keys: dict[str, Any] = {"cache": request.param, "steps": STEPS, "interval": INTERVAL}
    keys["scheme"] = "none" if request.param in ("rfe", "rcs") else "w8a8"
    return make_bundle(tiny, path, order=2, **keys)


def full_of(pipeline: Pipeline, labels: list[int], **options: Any) -> tuple[Any, list[bool]]:
    """Samples of a request, and which of its steps were full."""
    full: list[bool] = []
    found = pipeline.sample(labels, callback=lambda step: full.append(step.full), **options)
    return found, full


def marking(full: list[bool]) -> Callable[[int, bool], None]:
    """A callback of torch trajectories that keeps which steps were full."""

    def mark(step: int, was_full: bool) -> None:
        del step
        full.append(was_full)

    return mark


def test_both_loops_give_the_same_bits(made: Bundle) -> None:
    """One arithmetic: gauges, sums, ladders and polynomials, in two batch sizes."""
    pipeline = Pipeline(made)
    for labels in (LABELS, LABELS[:1]):
        host = pipeline.sample(labels, seed=2)
        assert np.array_equal(host, pipeline.sample(labels, seed=2, loop="graph"))


def test_the_graph_loop_counts_its_full_steps(made: Bundle, cli: Cli, tmp_path: Path) -> None:
    """As the host loop does, batch by batch, so that a cache at work passes --strict there too."""
    out, report = tmp_path / "out.npy", tmp_path / "out.json"
    command = ("sample", made.path, "-o", out, "--labels", *LABELS, "--quiet", "--json", report)
    done = cli(*command, "--loop", "graph", "--strict")
    assert (done.code, done.err) == (0, "")
    counts = json.loads(report.read_text())
    pipeline = Pipeline(made)  # whose batches are of two
    full = [full_of(pipeline, LABELS[i : i + 2], first=i)[1] for i in (0, 2)]
    assert counts["full_steps"] == sum(map(sum, full)) / 2
    assert counts["full_steps"] + counts["reuse_steps"] == STEPS
    assert pipeline.full_steps == sum(full[1])


def test_a_policy_reuses_and_stays_close(made: Bundle) -> None:
    """Some steps are full and some are not; samples are near to those of all full steps."""
    pipeline = Pipeline(made)
    found, full = full_of(pipeline, LABELS)
    exact, all_full = full_of(pipeline, LABELS, cache="none")
    assert all(all_full)
    assert 1 < sum(full) < STEPS
    assert not np.array_equal(found, exact)
    error = np.square(found - exact).mean() / np.ptp(exact) ** 2
    assert -10 * np.log10(error) > 50


def test_torch_decides_as_the_runtime_does(made: Bundle, tiny: LoadedModel) -> None:
    """What was calibrated is what runs: the same steps, over 60 dB in full precision."""
    manifest, recipe = made.manifest, made.manifest.recipe
    for target, limit in ((REFERENCE, 60.0), ("onnxruntime", 40.0)):
        pipeline, full = Pipeline(made, target=target), list[bool]()
        wanted, steps = full_of(pipeline, LABELS, seed=1)
        scales = qparams.of_bundle(made) if target != REFERENCE else qparams.QParams()
        with quantized(tiny.adapter, scales):
            found = sample(
                tiny.adapter,
                from_config(manifest.schedule),
                sampler=recipe.sampler,
                steps=STEPS,
                guidance=recipe.guidance,
                seed=1,
                indices=range(len(LABELS)),
                labels=LABELS,
                plan=pipeline.plan(),
                callback=marking(full),
            )
        error = np.square(found.numpy() - wanted).mean() / np.ptp(wanted) ** 2
        assert -10 * np.log10(error) > limit
        assert full == steps


def test_requests_do_not_see_each_other(made: Bundle) -> None:
    """The second request of a pipeline is that of a fresh one, whatever the first was."""
    used = Pipeline(made)
    used.sample([4, 3], seed=9)
    used.sample([2], seed=8, guidance=1.0)
    again = used.sample(LABELS, seed=3)
    assert np.array_equal(again, Pipeline(made).sample(LABELS, seed=3))


def test_a_bundle_holds_what_its_policy_runs(made: Bundle) -> None:
    """The graphs of its steps, with every quantized layer in the audit."""
    names = {graph.name for graph in made.manifest.graphs if graph.target == "onnxruntime"}
    plan = Pipeline(made).plan()
    assert names == {"temporal", "full", "reuse", "sampler", *graphs(plan)}
    layers = 0 if made.manifest.quantization is None else 8
    for loop in ("host", "graph"):
        found = audit(made, Pipeline(made).backend, loop)
        assert found.passed
        assert len(found.layers) == layers


def test_the_threshold_is_tuned_to_the_interval(made: Bundle) -> None:
    """As many full steps as TaylorSeer, in full precision and quantized; kept in the bundle."""
    wanted = make_plan("taylor", steps=STEPS, interval=INTERVAL, slots=4).full_steps
    if made.manifest.recipe.cache == "rfe":
        assert made.manifest.cache is None
        assert Pipeline(made).plan().full_steps == wanted
        return
    assert made.manifest.cache is not None
    assert made.manifest.cache.full_steps == pytest.approx(wanted, abs=1.0)
    for target in (REFERENCE, "onnxruntime"):
        gate = Pipeline(made, target=target).plan().gate
        assert gate is not None
        assert gate.threshold is not None
        assert gate.threshold > 0


def test_other_steps_and_policies_are_refused(made: Bundle) -> None:
    """A threshold belongs to its steps, graphs to their policy."""
    pipeline, recipe = Pipeline(made), made.manifest.recipe
    if recipe.cache != "rfe":
        with pytest.raises(ConfigError, match=r"steps: got 8, but the cache of the bundle was ca"):
            pipeline.sample([0], steps=8)
    other = "stack" if recipe.cache != "stack" else "first-block"
    with pytest.raises(ConfigError, match=f"cache: got {other}, which needs the graphs"):
        pipeline.sample([0], cache=other)
    if recipe.cache == "rfe":
        with pytest.raises(ConfigError, match="cache: got a plan of form residual, which n"):
            pipeline.sample([0], cache=make_plan("stack", steps=STEPS, interval=3, slots=4))
    assert len(pipeline.sample([0], cache="fora")) == 1  # every bundle can


def test_a_threshold_belongs_to_its_policy(stacked: Bundle) -> None:
    """A policy whose graphs are there, but not its threshold."""
    static = make_plan("first-block", steps=6, interval=2, slots=4)
    with pytest.raises(ConfigError, match="cache: this policy needs a threshold, and the bundle h"):
        Pipeline(stacked).sample([0], cache=static)


@pytest.fixture(scope="module")
def stacked(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A float bundle with a threshold of its own."""
    path = tmp_path_factory.mktemp("stacked") / "b"
    return make_bundle(tiny, path, scheme="none", cache="first-block", steps=6, threshold=0.2)


def test_a_run_says_how_often_it_reused(stacked: Bundle, cli: Cli, tmp_path: Path) -> None:
    """Full steps are counted on the way."""
    out, report = tmp_path / "out.npy", tmp_path / "out.json"
    done = cli("sample", stacked.path, "-o", out, "--labels", "0", "1", "--json", report)
    assert done.code == 0, done.err
    _, full = full_of(Pipeline(stacked), [0, 1])
    figures = json.loads(report.read_text())
    assert (figures["full_steps"], figures["reuse_steps"]) == (sum(full), 6 - sum(full))
    assert 1 < sum(full) < 6
    assert re.search(r"threshold\s+0\.2, ", cli("inspect", stacked.path).out)


@pytest.mark.parametrize(
    ("threshold", "match"),
    [
        (1e-9, "cache first-block never reused: all 6 steps were full; its threshold is 1e-09"),
        (1e9, r"cache first-block reused every step that it may: its threshold is 1e\+09"),
    ],
)
def test_runs_that_decide_nothing(
    stacked: Bundle, threshold: float, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning with its reason, and an error where that is asked for."""
    pipeline = Pipeline(stacked)
    gate = pipeline.plan().gate
    assert gate is not None
    plan = replace(pipeline.plan(), gate=replace(gate, threshold=threshold))
    counts = [sum(full_of(pipeline, labels, cache=plan)[1]) for labels in ([0], [1, 2])]
    warn_of_idle_run("first-block", plan, counts, strict=False)
    assert re.search(f"warning: {match}", " ".join(capsys.readouterr().err.split()))
    with pytest.raises(ConfigError, match=match):
        warn_of_idle_run("first-block", plan, counts, strict=True)
    warn_of_idle_run("first-block", plan, [counts[0], 3], strict=True)  # one batch did otherwise


def test_bench_says_that_a_policy_decided_nothing(
    stacked: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its row, for the gate, and as a warning."""
    tables, threshold = of_target(stacked, REFERENCE), np.asarray(1e9, np.float32)
    monkeypatch.setattr(
        "ditcast.runtime.pipeline.of_target", lambda *_: tables._replace(threshold=threshold)
    )
    monkeypatch.setattr("ditcast.runtime.bench._peak_memory_mib", lambda *_: None)
    report = bench(stacked, count=4)
    reason = "cache first-block reused every step that it may: its threshold is 1e+09"
    assert {row["name"]: row["idle"] for row in report["variants"][:2]} == {
        "full precision": None,
        "cache": reason,
    }
    announce(report)
    assert f"warning: cache: {reason}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("threshold", "match"),
    [(1e-9, "with which 6 of 6 steps are full"), (1e9, "with which 1 of 6 steps are full")],
)
def test_thresholds_that_decide_nothing(
    tiny: LoadedModel, tmp_path: Path, threshold: float, match: str
) -> None:
    """All steps full, or none but those that have to be."""
    with pytest.raises(ConfigError, match=match):
        make_bundle(
            tiny, tmp_path / "b", scheme="none", cache="first-block", steps=6, threshold=threshold
        )


@pytest.mark.parametrize(
    ("threshold", "match"), [(1e-9, "never reused: all 6 steps were"), (1e9, "reused every step")]
)
def test_the_graph_loop_says_that_it_decided_nothing(
    stacked: Bundle, tiny: LoadedModel, cli: Cli, tmp_path: Path, threshold: float, match: str
) -> None:
    """Its threshold is a constant; under --strict that is an error."""
    path = tmp_path / "b"
    shutil.copytree(stacked.path, path)
    bundle = Bundle.open(path)
    tables = of_target(bundle, REFERENCE)._replace(threshold=np.asarray(threshold, np.float32))
    save(tables, tables, bundle.staged(FILE))
    bundle.commit({})
    to_onnx(bundle, tiny)
    command = ("sample", path, "-o", tmp_path / "out.npy", "--labels", 0, "--loop", "graph")
    done = cli(*command)
    assert done.code == 0
    assert f"warning: cache first-block {match}" in " ".join(done.err.split())
    assert cli(*command, "--strict").code == 2


def test_full_steps_fall_with_the_threshold(tiny: LoadedModel) -> None:
    """From all of them to those of the warm-up (RFC's acceptance checks iv and v)."""
    counts = []
    for threshold in (0.0, 0.02, 0.1, 0.3, 1.0, 3.0, 1e9):
        plan, full = _with_threshold("relational", threshold), list[bool]()
        sample(
            tiny.adapter,
            from_config(tiny.scheduler),
            sampler="ddim",
            steps=STEPS,
            guidance=2.0,
            seed=0,
            indices=range(2),
            labels=[0, 1],
            plan=plan,
            callback=marking(full),
        )
        counts.append(sum(full))
    assert counts[0] == STEPS
    assert counts[-1] == 2
    assert counts == sorted(counts, reverse=True)


def test_teacache_s_polynomial_is_that_of_least_squares(tiny: LoadedModel) -> None:
    """Of the output's relative change on the gauge's, over all samples and steps."""
    recipe = recipes.make(RECIPE | {"cache": "stack", "steps": STEPS, "samples": 4, "batch": 2})
    plan = make_plan("stack", steps=STEPS, interval=INTERVAL, slots=4)
    assert plan.gate is not None
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(module: Any, args: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> None:
        rows = args[1][:, :128]  # shift and scale of the first block
        norm = tiny.adapter.parts[0].module.norm1(tiny.adapter.stem(args[0]))  # type: ignore[operator]
        shift, scale = rows.chunk(2, dim=1)
        seen.append((norm * (1 + scale[:, None]) + shift[:, None], found[0]))

    hook = tiny.adapter.denoiser.register_forward_hook(look)
    for first in (0, 2):
        follow(tiny, recipe, range(first, first + 2), draw_labels(recipe, 5)[first : first + 2])
    hook.remove()
    x, y = list[torch.Tensor](), list[torch.Tensor]()
    for step in (s for s in range(1, len(seen)) if s % STEPS):
        for now, before, changes in zip(seen[step], seen[step - 1], (x, y), strict=True):
            moved = (now - before).abs().flatten(1).sum(1) / before.abs().flatten(1).sum(1)
            changes.append(moved)
    a, b = torch.cat(x).double().numpy(), torch.cat(y).double().numpy()
    found = _polynomial(tiny, recipe, plan.gate)
    assert len(found) == 5
    assert np.allclose(np.polyval(found, a), np.polyval(np.polyfit(a, b, 4), a), atol=1e-3)


def test_caches_are_counted_in_tensors_of_a_slot() -> None:
    """What each form keeps per row, of 4 slots and order 2, 10 steps at an interval of 3."""

    def kept(policy: str) -> int:
        return held(make_plan(policy, steps=STEPS, interval=INTERVAL, order=2, slots=4), 4)

    assert kept("fora") == 2 * 2  # a forecast for each reuse step of a segment, two buffers
    assert kept("taylor") == 2 * 3 * 2  # of three segments
    assert kept("relational") == kept("rcs") == 2 * 4 * (3 + 1) + 2 * 3
    assert kept("learned") == 2 * 4
    assert kept("stack") == kept("first-block") == 5


def _with_threshold(policy: str, threshold: float) -> Any:
    plan = make_plan(policy, steps=STEPS, interval=INTERVAL, slots=4)
    assert plan.gate is not None
    return replace(plan, gate=replace(plan.gate, threshold=threshold))


def test_every_step_graph_has_a_signature(tiny: LoadedModel) -> None:
    """Adapters and policies name the same graphs."""
    assert set(tiny.adapter.steps) == set(GRAPHS)
