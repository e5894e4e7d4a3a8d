"""The policy that predicts the network's output: both loops, all networks, placed full steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cache import make_plan
from ditcast.calibrate.trajectory import follow
from ditcast.errors import ConfigError
from ditcast.export import to_onnx
from ditcast.models import LoadedModel, load
from ditcast.runtime import Pipeline, Step
from ditcast.runtime.engineaudit import audit_engines
from ditcast.runtime.engines import build_engines, profile_of
from tests.conftest import Cli, make_bundle
from tests.runtime.test_trajectories import LABELS, LIMIT, SEED, largest
from tests.unets import CLASSES, CONDITIONAL, loaded

KEYS: dict[str, Any] = {"cache": "output", "steps": 10, "interval": 3}


@pytest.fixture(scope="module")
def made(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """W8A8, of order 2: outputs of three full steps are kept."""
    return make_bundle(tiny, tmp_path_factory.mktemp("output") / "b", order=2, **KEYS)


def in_both_loops(pipeline: Pipeline, labels: list[int], **options: Any) -> Any:
    """Samples, of the same bits in both loops, and not those of full steps alone."""
    found = pipeline.sample(labels, seed=SEED, **options)
    graph = pipeline.sample(labels, seed=SEED, loop="graph", **options)
    np.testing.assert_array_equal(graph, found)
    assert largest(pipeline.sample(labels, seed=SEED, cache="none", **options), found) > LIMIT
    return found


def test_both_loops_give_the_same_bits(made: Bundle) -> None:
    """In both precisions and two batch sizes, with guidance and without."""
    for target in ("onnxruntime", "reference"):
        pipeline = Pipeline(made, target=target)
        for labels, guidance in ((LABELS, 2.0), (LABELS[:1], 1.0)):
            in_both_loops(pipeline, labels, guidance=guidance)


@pytest.mark.parametrize("order", [0, 1, 4])
def test_other_orders(tiny: LoadedModel, tmp_path: Path, order: int) -> None:
    """From none of the older outputs to more of them than there are full steps."""
    keys = KEYS | {"scheme": "none", "order": order}
    in_both_loops(Pipeline(make_bundle(tiny, tmp_path / "b", **keys)), LABELS)


def test_reuse_steps_run_no_graph(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is asked for as often as there are full steps, and once for the features."""
    pipeline, asked, seen = Pipeline(made), list[str](), list[Step]()
    session = pipeline.session

    def watched(graph: str) -> Any:
        asked.append(graph)
        return session(graph)

    monkeypatch.setattr(pipeline, "session", watched)
    pipeline.sample(LABELS, callback=seen.append)
    full = [step.index for step in seen if step.full]
    assert full == [0, 1, 4, 7]
    assert asked == ["temporal", *["full"] * len(full)]


def test_the_torch_sampler_does_the_same(made: Bundle, tiny: LoadedModel) -> None:
    """Calibration follows the plan that is deployed."""
    pipeline = Pipeline(made, target="reference")
    recipe = made.manifest.recipe
    wanted = follow(tiny, recipe, range(len(LABELS)), LABELS, plan=pipeline.plan())
    found = pipeline.sample(LABELS, seed=recipe.seed)
    assert largest(found, wanted.numpy()) < LIMIT
    assert largest(pipeline.sample(LABELS, seed=recipe.seed, cache="none"), found) > LIMIT


def test_every_bundle_can_run_it(shared_bundle: Bundle, cli: Cli, tmp_path: Path) -> None:
    """It needs the full step only, in any number of steps."""
    out = tmp_path / "out.npy"
    command = ("sample", shared_bundle.path, "-o", out, "--labels", 0, "--steps", 12)
    assert cli(*command, "--cache", "output", "--strict").code == 0
    pipeline = Pipeline(shared_bundle)
    wanted = pipeline.sample([0], steps=12, cache="output")
    np.testing.assert_array_equal(np.load(out), wanted)
    assert pipeline.full_steps == 7
    assert largest(pipeline.sample([0], steps=12, cache="none"), wanted) > LIMIT


def test_fresh_noise_is_refused(other_bundle: Bundle) -> None:
    """DDPM adds noise that only the network could take away again: 8 dB instead of 38."""
    match = (
        "cache: got output with sampler ddpm, whose fresh noise earlier outputs do not know; exp"
    )
    with pytest.raises(ConfigError, match=match):
        recipes.make({"cache": "output", "sampler": "ddpm"})
    pipeline = Pipeline(other_bundle)
    with pytest.raises(ConfigError, match=match):
        pipeline.sample([0], cache="output")
    slots = len(other_bundle.manifest.model.slots)
    plan = make_plan("output", steps=6, interval=2, slots=slots)
    with pytest.raises(ConfigError, match=match):
        pipeline.sample([0], steps=6, cache=plan)


def test_full_steps_are_placed(tiny: LoadedModel, tmp_path: Path) -> None:
    """Where calibration finds them, in both loops."""
    keys = KEYS | {"interval": 4, "placement": "fitted", "scheme": "none"}
    bundle = make_bundle(tiny, tmp_path / "b", **keys)
    assert bundle.manifest.cache is not None
    pipeline, seen = Pipeline(bundle), list[Step]()
    host = pipeline.sample(LABELS, seed=SEED, callback=seen.append)
    assert tuple(step.index for step in seen if step.full) == bundle.manifest.cache.places
    assert pipeline.plan().form == "output"
    np.testing.assert_array_equal(in_both_loops(pipeline, LABELS), host)


def test_a_unet_is_forecast_too(tmp_path: Path) -> None:
    """Nothing is asked of the network but its output."""
    model = loaded(tmp_path / "model", CLASSES, **CONDITIONAL)
    pipeline = Pipeline(make_bundle(model, tmp_path / "b", **KEYS, guidance=1.0))
    assert pipeline.plan().form == "output"
    in_both_loops(pipeline, [0, 1])


@pytest.mark.tensorrt
def test_the_loop_becomes_an_engine(
    made: Bundle, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of full steps are carried inside it; no step has forecasts to sum up."""
    pytest.importorskip("tensorrt_rtx")
    from ditcast.runtime.backends.tensorrt import EngineBuilder

    monkeypatch.setenv("DITCAST_KEY", str(tmp_path / "engine.key"))
    path = tmp_path / "b"
    shutil.copytree(made.path, path)
    to_onnx(Bundle.open(path), tiny, ["tensorrt"])
    bundle = Bundle.open(path)
    assert profile_of(bundle.manifest, "full")["weights"] == {0: (0, 0, 0)}
    build_engines(bundle, EngineBuilder("tensorrt-rtx", ("8.9",)), ["full", "sampler"])
    for loop, graph in (("host", "full"), ("graph", "sampler")):
        (found,) = audit_engines(Bundle.open(path), "tensorrt-rtx", loop)
        assert (found.graph, found.lost, len(found.layers)) == (graph, (), 8)


def test_it_is_closer_than_repeated_slots() -> None:
    """The embedded model, 14 full steps of 50: measured 38, 30 and 24 dB (docs/caching.md)."""
    emoji, labels = load("emoji"), [0, 3, 5]
    recipe = recipes.make({"scheme": "none", "seed": SEED})
    slots = len(emoji.adapter.slots)

    def samples(policy: str, order: int) -> Tensor:
        plan = make_plan(policy, steps=50, interval=4, slots=slots, order=order)
        found: Tensor = follow(emoji, recipe, range(len(labels)), labels, plan=plan).clamp(-1, 1)
        return found

    wanted = samples("none", 0)
    output, repeated, held = (
        10 * float((4 / (samples(policy, order) - wanted).square().mean()).log10())
        for policy, order in (("output", 2), ("output", 0), ("fora", 0))
    )
    assert output > repeated + 4
    assert repeated > held + 2
