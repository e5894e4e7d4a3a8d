"""The two loops: the same pictures from both, for any batch, with nothing left over."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.cache import StepPlan
from ditcast.errors import BundleError, ConfigError
from ditcast.runtime import Pipeline
from ditcast.runtime.backends import GraphFile, NodeTime, Session
from ditcast.runtime.backends.base import Arrays, HostMemory
from ditcast.runtime.backends.onnxruntime import OnnxRuntimeBackend
from ditcast.runtime.images import psnr_db, to_unit
from ditcast.runtime.pipeline import Cache, Step
from ditcast.settings import Settings
from tests.runtime.test_trajectories import psnr_db as psnr_of_range

FULL = [True, True, False, True, False, True]  # FORA with T=6, N=2: j = 5, 4, 2, 0


@pytest.fixture(scope="module")
def pipelines(shared_bundle: Bundle, other_bundle: Bundle) -> dict[tuple[str, str], Pipeline]:
    """One per bundle and target; their sessions serve all tests."""
    bundles = {"ddim": shared_bundle, "ddpm": other_bundle}
    return {
        (name, target): Pipeline(bundle, target=target)
        for name, bundle in bundles.items()
        for target in ("reference", "onnxruntime")
    }


@pytest.fixture(scope="module")
def exact(pipelines: dict[tuple[str, str], Pipeline]) -> Pipeline:
    """The tiny model in fp32."""
    return pipelines["ddim", "reference"]


@pytest.fixture(scope="module")
def quantized(pipelines: dict[tuple[str, str], Pipeline]) -> Pipeline:
    """The tiny model in W8A8."""
    return pipelines["ddim", "onnxruntime"]


@pytest.mark.parametrize("labels", [[2], [3, 3, 1], [4, 0, 2, 2, 1]])
@pytest.mark.parametrize("guidance", [2.5, 1.0, 0.0])
@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_both_loops_make_the_same_bits(
    pipelines: dict[tuple[str, str], Pipeline],
    name: str,
    target: str,
    guidance: float,
    labels: list[int],
) -> None:
    """With a cache, guided or not, odd batches, repeated labels; fp32 and W8A8."""
    pipeline = pipelines[name, target]
    host = pipeline.sample(labels, seed=1, guidance=guidance)
    graph = pipeline.sample(labels, seed=1, guidance=guidance, loop="graph")
    assert host.dtype == graph.dtype == np.float32
    assert host.shape == (len(labels), *pipeline.model.sample_shape)
    np.testing.assert_array_equal(host, graph)
    assert host.std() > 0.05


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(
    pipelines: dict[tuple[str, str], Pipeline], name: str
) -> None:
    """Image i of a seed alone and among five: equal but for the order of float32 sums."""
    pipeline = pipelines[name, "reference"]
    labels = [1, 0, 4, 1, 3]
    together = pipeline.sample(labels, seed=5)
    for i, label in enumerate(labels):
        alone = pipeline.sample([label], seed=5, first=i)
        assert psnr_of_range(alone, together[i : i + 1]) >= 60


def test_requests_differ_by_what_they_ask_for(quantized: Pipeline) -> None:
    """Seed, image number, label, guidance, steps and cache each change the picture."""
    base = quantized.sample([1], seed=0)
    np.testing.assert_array_equal(quantized.sample([1], seed=0), base)
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"first": 1},
        {"guidance": 3.0},
        {"steps": 5},
        {"cache": "none"},
        {"spacing": "trailing"},
    ]
    for other in others:
        assert not np.array_equal(quantized.sample([1], **other), base), other
    assert not np.array_equal(quantized.sample([2], seed=0), base)


def test_defaults_are_those_of_the_recipe(quantized: Pipeline) -> None:
    """Guidance 2, 6 steps, FORA."""
    spelt_out = quantized.sample([1], guidance=2.0, steps=6, cache="fora", spacing="leading")
    np.testing.assert_array_equal(quantized.sample([1]), spelt_out)


@pytest.mark.parametrize("between", [{"steps": 3}, {"cache": "none"}, {"guidance": 1.0}])
def test_nothing_leaks_into_the_next_request(
    shared_bundle: Bundle, quantized: Pipeline, between: dict[str, Any]
) -> None:
    """After another request, of another batch size, a pipeline is as good as new."""
    wanted = Pipeline(shared_bundle).sample([4, 2], seed=3)
    quantized.sample([0, 1, 2], seed=9, **between)
    np.testing.assert_array_equal(quantized.sample([4, 2], seed=3), wanted)


def test_the_callback_sees_every_step_in_order(quantized: Pipeline) -> None:
    """Its number, whether it was full, and the sample after it; the last is the result."""
    seen: list[Step] = []
    found = quantized.sample([1, 2], callback=seen.append)
    assert [step.index for step in seen] == list(range(6))
    assert [step.full for step in seen] == FULL
    np.testing.assert_array_equal(seen[-1].sample, found)
    assert not np.array_equal(seen[-2].sample, found)


def test_other_steps_run_on_the_host(exact: Pipeline) -> None:
    """Nothing in a W8A8 bundle with FORA is tied to the number of steps."""
    seen: list[Step] = []
    exact.sample([1], steps=4, callback=seen.append)
    assert [step.full for step in seen] == [True, True, False, True]


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"steps": 4}, r"got steps 4, but sampler.onnx holds .* steps 6; .* with --steps 4"),
        ({"cache": "none"}, "got cache none, but sampler.onnx holds the plan of cache fora"),
        ({"spacing": "trailing"}, "their spacing cannot be changed; use the host loop"),
        ({"callback": print}, "steps cannot be watched"),
    ],
)
def test_the_graph_loop_refuses_what_it_does_not_hold(
    quantized: Pipeline, request_: dict[str, Any], match: str
) -> None:
    """The plan and the schedule are constants of the graph."""
    with pytest.raises(ConfigError, match=match):
        quantized.sample([1], loop="graph", **request_)


@pytest.mark.parametrize(
    ("labels", "request_", "match"),
    [
        ([], {}, "labels: got none, expected at least one from 0 to 4"),
        ([0, 5], {}, "labels: got 5, expected 0 to 4"),
        ([-1], {}, "labels: got -1, expected 0 to 4"),
        ([0], {"steps": 0}, "steps: got 0, expected 1 to 1000"),
        ([0], {"steps": -2, "cache": "none"}, "steps: got -2, expected 1 to 1000"),
        ([0], {"steps": 10**9}, "steps: got 1000000000, expected 1 to 1000"),
        ([0], {"steps": 1}, "interval: got 2, expected at most the number of steps"),
        ([0], {"cache": "teacache"}, "cache: unknown policy 'teacache'; expected one of none, fo"),
        ([0], {"guidance": -1.0}, "guidance: got -1.0, expected a number from 0"),
        ([0], {"guidance": float("nan")}, "guidance: got nan, expected"),
        ([0], {"guidance": float("inf")}, "guidance: got inf, expected"),
        ([0], {"seed": -1}, "seed: got -1 with first 0, expected integers from 0"),
        ([0], {"first": -2}, "seed: got 0 with first -2, expected integers from 0"),
        ([0], {"spacing": "even"}, "spacing: got 'even', expected one of leading, linspace, trai"),
    ],
)
@pytest.mark.parametrize("loop", ["host", "graph"])
def test_bad_requests_are_refused(
    quantized: Pipeline, labels: list[int], request_: dict[str, Any], match: str, loop: Any
) -> None:
    """Each says what it got and what it expects, in both loops."""
    with pytest.raises(ConfigError, match=match):
        quantized.sample(labels, loop=loop, **request_)


def test_a_loop_that_is_not_there(quantized: Pipeline) -> None:
    """Not taken for the host loop."""
    with pytest.raises(ConfigError, match="loop: got 'device', expected one of host, graph"):
        quantized.sample([0], loop="device")  # type: ignore[arg-type] # what a user may type


def test_a_target_that_is_not_there(shared_bundle: Bundle) -> None:
    """The error lists what there is."""
    with pytest.raises(BundleError, match="for target 'tensorrt'; it has targets onnxruntime, ref"):
        Pipeline(shared_bundle, target="tensorrt").sample([0])


def test_quantization_and_cache_change_the_picture_a_little(
    exact: Pipeline, quantized: Pipeline
) -> None:
    """The fp32 picture without a cache is another, but not by much: the tiny model is smooth."""
    wanted = to_unit(exact.sample([0, 1], cache="none"))
    for pipeline, cache in ((exact, "fora"), (quantized, "none"), (quantized, "fora")):
        found = psnr_db(to_unit(pipeline.sample([0, 1], cache=cache)), wanted)
        assert (found < 99).all()
        assert (found > 15).all()


class Asked(NamedTuple):
    """One run of a graph: its inputs as they were, and the shapes of what it had to compute."""

    graph: str
    feeds: dict[str, NDArray[Any]]
    outputs: dict[str, tuple[int, ...]]


class Recorder:
    """A backend without numerics: it writes down which graph was asked for which outputs.

    Temporal features are all `10 * step + row`, and the forecasts of the k-th run of a full step
    are all `100 * k + r`, so that one sees which of them come where.
    """

    name, target = "null", "reference"
    loops: tuple[str, ...] = ("host", "graph")
    memory = HostMemory

    def __init__(self, features: int) -> None:
        """Nothing was asked yet; features have that many columns."""
        self.features = features
        self.asked: list[Asked] = []
        self.opened: list[str] = []

    def session(self, graph: GraphFile) -> Session:
        """Load nothing."""
        self.opened.append(graph.path.stem)
        return _RecorderSession(self, graph.path.stem)

    def profile(self, graph: GraphFile, feeds: Arrays, runs: int) -> list[NodeTime]:
        """Run nothing."""
        return []

    def is_integer(self, kernel: str) -> bool:
        """Have no kernels."""
        return False

    def facts(self) -> dict[str, Any]:
        """Know nothing."""
        return {}

    def of(self, graph: str) -> list[Asked]:
        """The runs of one graph."""
        return [asked for asked in self.asked if asked.graph == graph]


class _RecorderSession:
    def __init__(self, backend: Recorder, graph: str) -> None:
        self.backend, self.graph = backend, graph

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Temporal features; the other graphs run into buffers."""
        assert (self.graph, list(outputs)) == ("temporal", ["features"])
        steps, rows = len(feeds["timesteps"]), len(feeds["class_labels"])
        shape = (steps, rows, self.backend.features)
        self._record(feeds, {"features": shape})
        codes = 10 * np.arange(steps)[:, None] + np.arange(rows)
        return {"features": codes[..., None].repeat(shape[-1], axis=2).astype(np.float32)}

    def run_into(self, feeds: Arrays, buffers: Arrays) -> None:
        """Zeros, and marked forecasts."""
        self._record(feeds, {name: buffer.shape for name, buffer in buffers.items()})
        for name, buffer in buffers.items():
            buffer[...] = 0
            if name == "forecast":
                marks = 100 * len(self.backend.of("full")) + np.arange(len(buffer))
                buffer += marks[:, None, None, None]

    def _record(self, feeds: Arrays, outputs: dict[str, tuple[int, ...]]) -> None:
        held = {name: value.copy() for name, value in feeds.items()}
        self.backend.asked.append(Asked(self.graph, held, outputs))


def test_which_graphs_a_request_runs(shared_bundle: Bundle) -> None:
    """Temporal features once, then a full or a reuse step each, always for the same outputs."""
    recorder = Recorder(shared_bundle.manifest.model.features)
    pipeline = Pipeline(shared_bundle, backend=recorder)
    pipeline.sample([3, 3, 1])
    graphs = ["temporal", *("full" if full else "reuse" for full in FULL)]
    assert [asked.graph for asked in recorder.asked] == graphs
    image, slot = (6, 3, 16, 16), (6, 16, 64)  # three images with guidance
    for asked in recorder.of("full"):
        assert list(asked.feeds) == ["sample", "features", "ahead", "weights"]
        assert asked.outputs == {"output": image, "forecast": (1, *slot)}
    for asked in recorder.of("reuse"):
        assert list(asked.feeds) == ["sample", "features", "forecast"]
        assert asked.feeds["forecast"].shape == slot
        assert asked.outputs == {"output": image}
    for asked in recorder.asked[1:]:
        assert asked.feeds["sample"].shape == image
        assert asked.feeds["features"].shape == (6, shared_bundle.manifest.model.features)
        assert {value.dtype for value in asked.feeds.values()} == {np.dtype(np.float32)}
    recorder.asked.clear()
    pipeline.sample([3, 3, 1], guidance=1.0, cache="none")
    image, slot = (3, *image[1:]), (3, *slot[1:])  # no null rows
    outputs = {"output": image, "forecast": (0, *slot)}  # nothing is ahead
    assert [asked[::2] for asked in recorder.asked[1:]] == [("full", outputs)] * 6
    assert recorder.opened == ["temporal", "full", "reuse"]  # each once for both requests


def codes(values: NDArray[Any]) -> NDArray[Any]:
    """The marks of arrays that are all alike along their last axis."""
    assert (values == values[..., :1]).all()
    found: NDArray[Any] = values[..., 0]
    return found


def test_full_steps_get_the_features_of_the_steps_that_read_them(other_bundle: Bundle) -> None:
    """T=6, N=3: full at 0, 2 and 5, ahead of which lie 1, then 3 and 4, then nothing."""
    recorder = Recorder(other_bundle.manifest.model.features)
    Pipeline(other_bundle, backend=recorder).sample([3, 1])
    rows = np.array([1, 0, 2, 2])  # of labels 1 and 3 and the null label
    temporal, *steps = recorder.asked
    assert temporal.feeds["class_labels"].tolist() == [1, 3, 5]
    assert [asked.graph for asked in steps] == ["full", "reuse", "full", "reuse", "reuse", "full"]
    for step, asked in enumerate(steps):
        assert (codes(asked.feeds["features"]) == 10 * step + rows).all()
    slots = len(other_bundle.manifest.model.slots)
    wanted = {0: [(1, 1), (0, 0)], 2: [(3, 1), (4, 1)], 5: [(5, 0), (5, 0)]}
    for step, ahead in wanted.items():
        feeds = steps[step].feeds
        assert feeds["weights"].tolist() == [[weight] * slots for _, weight in ahead]
        found = codes(feeds["ahead"])
        assert (found == [10 * later + rows for later, _ in ahead]).all()


def test_reuse_steps_get_the_forecasts_that_are_theirs(other_bundle: Bundle) -> None:
    """Step 1 that of the first full step, 3 and 4 the two of the second."""
    recorder = Recorder(other_bundle.manifest.model.features)
    pipeline = Pipeline(other_bundle, backend=recorder)
    pipeline.sample([3, 1])
    pipeline.sample([0, 4])
    found = [np.unique(asked.feeds["forecast"]).tolist() for asked in recorder.of("reuse")]
    assert found == [[100], [200], [201], [400], [500], [501]]


class TwoBack(Pipeline):
    """A pipeline whose reuse steps read two full steps: three of the newest minus the other."""

    def plan(self, steps: int | None = None, cache: Cache = None) -> StepPlan:
        """The usual full steps."""
        full = super().plan(steps, cache).full
        weights = np.zeros((len(full), 2, len(self.model.slots)), np.float32)
        weights[~full] = [[3], [-1]]
        return StepPlan(full=full, weights=weights)


def test_forecasts_of_several_full_steps_add_up(other_bundle: Bundle) -> None:
    """Full at 0, 2 and 5: steps 3 and 4 take parts that steps 0 and 2 made for them."""
    recorder = Recorder(other_bundle.manifest.model.features)
    TwoBack(other_bundle, backend=recorder).sample([3, 1])
    weights = [asked.feeds["weights"][:, 0].tolist() for asked in recorder.of("full")]
    assert weights == [[3, 0, -1, -1], [3, 3, 0, 0], [0, 0, 0, 0]]
    found = [np.unique(asked.feeds["forecast"]).tolist() for asked in recorder.of("reuse")]
    assert found == [[100], [102 + 200], [103 + 201]]


class Watched(OnnxRuntimeBackend):
    """A backend that knows which of the sessions that it opened are still in memory."""

    def __init__(self) -> None:
        """One thread."""
        super().__init__(Settings(threads=1))
        self.sessions: list[tuple[str, weakref.ref[Session]]] = []
        self.beside: list[tuple[str, list[str]]] = []  # each that was opened, and beside which

    def alive(self) -> list[str]:
        """Graphs in memory."""
        gc.collect()
        return [graph for graph, session in self.sessions if session() is not None]

    def session(self, graph: GraphFile) -> Session:
        """Load a graph."""
        self.beside.append((graph.path.stem, self.alive()))
        session = super().session(graph)
        self.sessions.append((graph.path.stem, weakref.ref(session)))
        return session


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_low_memory_makes_the_same_samples(shared_bundle: Bundle, target: str) -> None:
    """The temporal weights are gone before the steps' weights come; again for each request."""
    gc.freeze()  # collections look at what is made here, not at all that the suite holds
    usual, low = Watched(), Watched()
    wanted = Pipeline(shared_bundle, backend=usual, target=target)
    pipeline = Pipeline(shared_bundle, backend=low, target=target, low_memory=True)
    during: list[list[str]] = []
    for labels in ([1, 4], [2]):
        found = pipeline.sample(labels, callback=lambda step: during.append(low.alive()))
        np.testing.assert_array_equal(found, wanted.sample(labels))
    assert [beside for _, beside in usual.beside] == [[], ["temporal"], ["temporal", "full"]]
    steps = ["full", "reuse"]
    assert low.beside == [("temporal", []), ("full", []), ("reuse", ["full"]), ("temporal", steps)]
    assert during == [["full"]] * 2 + [steps] * 10  # the third step is the first reuse step
    del pipeline
    assert not low.alive()
