"""The two loops: the same pictures from both, for any batch, with nothing left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.errors import BundleError, ConfigError
from ditcast.runtime import Pipeline
from ditcast.runtime.images import psnr_db, to_unit
from ditcast.runtime.pipeline import Step
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
        (
            [0],
            {"cache": "teacache"},
            "cache: unknown policy 'teacache'; expected one of none, fora",
        ),
        ([0], {"guidance": -1.0}, "guidance: got -1.0, expected a number from 0"),
        ([0], {"guidance": float("nan")}, "guidance: got nan, expected"),
        ([0], {"guidance": float("inf")}, "guidance: got inf, expected"),
    ],
)
@pytest.mark.parametrize("loop", ["host", "graph"])
def test_bad_requests_are_refused(
    quantized: Pipeline, labels: list[int], request_: dict[str, Any], match: str, loop: Any
) -> None:
    """Each says what it got and what it expects, in both loops."""
    with pytest.raises(ConfigError, match=match):
        quantized.sample(labels, loop=loop, **request_)


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


class Recorder:
    """A backend without numerics: it writes down which graph was asked for which outputs."""

    name, target = "null", "reference"
    integer_kernels: frozenset[str] = frozenset()

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.asked: list[tuple[str, tuple[str, ...], int]] = []
        self.opened: list[str] = []

    def session(self, path: Path) -> Any:
        """Load nothing."""
        self.opened.append(path.stem)
        return _RecorderSession(self, path.stem)

    def profile(self, path: Path, feeds: Any) -> list[tuple[str, str, float]]:
        """Run nothing."""
        return []

    def facts(self) -> dict[str, Any]:
        """Know nothing."""
        return {}


class _RecorderSession:
    def __init__(self, backend: Recorder, graph: str) -> None:
        self.backend, self.graph = backend, graph

    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """Zeros of about the right shape."""
        first = next(iter(feeds.values()))
        self.backend.asked.append((self.graph, tuple(outputs), len(first)))
        if self.graph == "temporal":
            labels = len(feeds["class_labels"])
            return {"features": np.zeros((len(first), labels, 1), np.float32)}
        return {name: np.zeros(first.shape, np.float32) for name in outputs}


def test_which_graphs_a_request_runs(shared_bundle: Bundle) -> None:
    """Temporal features once; caches leave a full step only where a reuse step reads them."""
    recorder = Recorder()
    pipeline = Pipeline(shared_bundle, backend=recorder)
    pipeline.sample([3, 3, 1])
    slots = tuple(f"cache.{slot}" for slot in shared_bundle.manifest.model.slots)
    output = ("output",)
    assert recorder.asked == [
        ("temporal", ("features",), 6),
        ("full", output, 6),
        ("full", output + slots, 6),
        ("reuse", output, 6),
        ("full", output + slots, 6),
        ("reuse", output, 6),
        ("full", output, 6),
    ]
    recorder.asked.clear()
    pipeline.sample([3, 3, 1], guidance=1.0, cache="none")
    assert recorder.asked[1:] == [("full", output, 3)] * 6  # no null rows, no caches
    assert recorder.opened == ["temporal", "full", "reuse"]  # each once for both requests
