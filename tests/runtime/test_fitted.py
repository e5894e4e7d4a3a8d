"""What was fitted to the cache's plan, in both loops; and plans that a caller brings."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cache import make_plan
from ditcast.cache.fitted import Fitted, of_target, save
from ditcast.cache.plan import hold
from ditcast.calibrate import calibrate
from ditcast.calibrate.cache import FILE
from ditcast.errors import BundleError, ConfigError
from ditcast.export import to_onnx
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.runtime import Pipeline, Step
from ditcast.runtime.bench import bench
from tests.conftest import RECIPE, Cli, make_bundle
from tests.runtime.test_trajectories import LABELS, LIMIT, SEED, largest


def test_both_loops_correct_samples(tiny: LoadedModel, tmp_path: Path) -> None:
    """Bit-identical; full precision has no correction, and no other number of steps is taken."""
    keys: dict[str, Any] = {"cache": "taylor", "correction": "moment", "interval": 3, "steps": 8}
    bundle = make_bundle(tiny, tmp_path / "corrected", **keys)
    pipeline = Pipeline(bundle)
    fitted = pipeline.fitted
    assert fitted.gain is not None
    host = pipeline.sample(LABELS, seed=SEED)
    np.testing.assert_array_equal(pipeline.sample(LABELS, seed=SEED, loop="graph"), host)
    pipeline.fitted = fitted._replace(gain=None, offset=None)
    assert largest(pipeline.sample(LABELS, seed=SEED), host) > LIMIT
    exact = Pipeline(bundle, target="reference")
    assert exact.fitted.gain is None
    assert exact.sample(LABELS, seed=SEED, steps=4).shape == host.shape
    with pytest.raises(ConfigError, match=r"of the bundle was calibrated for its 8 steps"):
        pipeline.sample(LABELS, steps=4)
    assert pipeline.sample(LABELS, seed=SEED, steps=4, cache="none").shape == host.shape


def test_a_guarded_plan_is_what_both_loops_run(tiny: LoadedModel, tmp_path: Path) -> None:
    """With tables that refuse every forecast, a bundle samples as plain reuse does."""
    keys: dict[str, Any] = {"cache": "taylor", "interval": 3, "steps": 8, "guard": "error"}
    bundle = Bundle.create(tmp_path / "guarded", describe(tiny, recipes.make(RECIPE | keys)))
    calibrate(bundle, tiny)
    held = of_target(bundle, "onnxruntime")
    assert held.reuse is not None
    save(held._replace(reuse=np.full_like(held.reuse, -1)), Fitted(), bundle.staged(FILE))
    assert bundle.manifest.cache is not None
    section = bundle.manifest.cache.model_copy(update={"held_back": 16})
    bundle.commit({"cache": section})
    to_onnx(bundle, tiny)
    guarded = Pipeline(bundle)
    host = guarded.sample(LABELS, seed=SEED)
    np.testing.assert_array_equal(guarded.sample(LABELS, seed=SEED, loop="graph"), host)
    plain = Pipeline(bundle).sample(LABELS, seed=SEED, cache=hold(guarded.plan().full, 4))
    assert largest(plain, host) < LIMIT
    with pytest.raises(ConfigError, match=r"its 8 steps; compile one with --steps 4"):
        guarded.sample(LABELS, steps=4)


def test_full_steps_are_where_calibration_put_them(
    tiny: LoadedModel, tmp_path: Path, cli: Cli
) -> None:
    """In both loops and in both precisions; no other number of steps is taken with that cache."""
    keys: dict[str, Any] = {"cache": "taylor", "interval": 4, "steps": 10, "placement": "fitted"}
    bundle = make_bundle(tiny, tmp_path / "placed", **keys)
    assert bundle.manifest.cache is not None
    places = bundle.manifest.cache.places
    assert places is not None
    even = make_plan("taylor", steps=10, interval=4, slots=4)
    assert places != tuple(np.flatnonzero(even.full))
    for target in ("onnxruntime", "reference"):
        pipeline, seen = Pipeline(bundle, target=target), list[Step]()
        host = pipeline.sample(LABELS, seed=SEED, callback=seen.append)
        assert tuple(step.index for step in seen if step.full) == places
        np.testing.assert_array_equal(pipeline.sample(LABELS, seed=SEED, loop="graph"), host)
        assert largest(pipeline.sample(LABELS, seed=SEED, cache=even), host) > LIMIT
        with pytest.raises(ConfigError, match=r"its 10 steps; compile one with --steps 4"):
            pipeline.sample(LABELS, steps=4)
        assert pipeline.sample(LABELS, steps=4, cache="none").shape == host.shape
    shown = cli("inspect", bundle.path).out
    assert re.search(rf"full steps +{' '.join(map(str, places))}\b", shown)


def test_deepcache_runs_in_both_loops(tiny: LoadedModel, tmp_path: Path, cli: Cli) -> None:
    """Non-uniform as its code places them; in other steps; any bundle can run the uniform one."""
    keys: dict[str, Any] = {"cache": "deepcache", "placement": "power", "interval": 5, "steps": 20}
    bundle = make_bundle(tiny, tmp_path / "deepcache", **keys)
    pipeline, seen = Pipeline(bundle), list[Step]()
    host = pipeline.sample(LABELS, seed=SEED, callback=seen.append)
    assert [step.index for step in seen if step.full] == [0, 5, 8, 13]
    np.testing.assert_array_equal(pipeline.sample(LABELS, seed=SEED, loop="graph"), host)
    assert pipeline.plan(10).full_steps == 2
    assert pipeline.plan(cache="fora").full_steps == 5
    assert pipeline.full_steps == 4
    out = tmp_path / "out.npy"
    command = ("sample", bundle.path, "-o", out, "--labels", 0, "--cache", "deepcache")
    assert cli(*command, "--loop", "graph", "--strict").code == 0


def test_every_bundle_runs_deepcache(shared_bundle: Bundle, cli: Cli, tmp_path: Path) -> None:
    """At the recipe's interval, from the command line: T=6, N=2 is full at 0, 2 and 4."""
    out, figures = tmp_path / "out.npy", tmp_path / "out.json"
    command = ("sample", shared_bundle.path, "-o", out, "--labels", 0, "--cache", "deepcache")
    assert cli(*command, "--json", figures).code == 0
    assert json.loads(figures.read_text())["full_steps"] == 3
    wanted = Pipeline(shared_bundle).sample([0], cache=hold(np.arange(6) % 2 == 0, 4))
    np.testing.assert_array_equal(np.load(out), wanted)


def test_graphs_of_other_tables_are_stale(tiny: LoadedModel, tmp_path: Path) -> None:
    """The graph loop holds them as constants."""
    bundle = make_bundle(tiny, tmp_path / "b", correction="moment", scheme="none")
    held = of_target(bundle, "onnxruntime")
    assert held.gain is not None
    save(held._replace(gain=held.gain * 2), Fitted(), bundle.staged(FILE))
    bundle.commit({})
    with pytest.raises(BundleError, match="was made from other calibration data"):
        Pipeline(bundle).sample(LABELS)


def test_a_correction_without_a_cache_takes_the_recipe_s_steps_only(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    """And does not advise what would not help."""
    bundle = make_bundle(tiny, tmp_path / "b", cache="none", correction="moment")
    with pytest.raises(ConfigError, match=r"compile one with --steps 4$"):
        Pipeline(bundle).sample(LABELS, steps=4, cache="none")


def test_bench_measures_the_corrected_sampler(tiny: LoadedModel, tmp_path: Path) -> None:
    """Of a bundle that does not quantize, too: its cached images are those it samples."""
    keys: dict[str, Any] = {"scheme": "none", "correction": "moment"}
    bundle = make_bundle(tiny, tmp_path / "b", **keys)
    report = bench(bundle, count=2, seed=SEED)
    rows = {row["name"]: row for row in report["variants"]}
    assert rows["cache"]["target"] == "onnxruntime"
    wanted = Pipeline(bundle).sample([0, 1], seed=SEED)
    np.testing.assert_array_equal(report["shown"]["cache"], wanted)


def test_a_caller_can_bring_a_plan(shared_bundle: Bundle) -> None:
    """The recipe's own gives the same images; another one does not; misfits are refused."""
    pipeline = Pipeline(shared_bundle)
    plan = pipeline.plan()
    found = pipeline.sample(LABELS, seed=SEED, cache=plan)
    np.testing.assert_array_equal(found, pipeline.sample(LABELS, seed=SEED))
    other = make_plan("taylor", steps=6, interval=3, slots=4)
    assert largest(pipeline.sample(LABELS, seed=SEED, cache=other), found) > LIMIT
    with pytest.raises(ConfigError, match="got a plan of 6 steps and 4 slots, expected one of 5"):
        pipeline.sample(LABELS, steps=5, cache=plan)
    with pytest.raises(ConfigError, match="6 steps and 3 slots, expected one of 6 and 4"):
        pipeline.sample(LABELS, cache=make_plan("fora", steps=6, interval=2, slots=3))
    with pytest.raises(ConfigError, match="loop graph: got a plan, but sampler.onnx holds the"):
        pipeline.sample(LABELS, loop="graph", cache=plan)
    unknown = dataclasses.replace(plan, form="guess")
    with pytest.raises(ConfigError, match="got a plan of form 'guess', expected one of forecast, "):
        pipeline.sample(LABELS, cache=unknown)
