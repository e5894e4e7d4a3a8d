"""Sessions of every backend: the same values by both ways to run, and errors that name a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.errors import BundleError, MissingDependencyError
from ditcast.runtime.backends import BACKENDS, Session, graph_file, make_backend
from ditcast.settings import Settings

Feeds = dict[str, NDArray[Any]]
OUTPUTS = {"temporal": ("features",), "full": ("output", "forecast"), "reuse": ("output",)}
EVERY = [
    *(
        ("onnxruntime", target, graph)
        for target in ("reference", "onnxruntime")
        for graph in OUTPUTS
    ),
    *(
        (name, "reference", graph)
        for name in sorted(BACKENDS)
        if name != "onnxruntime"
        for graph in OUTPUTS
    ),
]


def open_session(bundle: Bundle, backend: str, target: str, graph: str) -> Session:
    """A graph in a backend, if that is installed."""
    try:
        found = make_backend(backend, Settings(threads=1))
    except MissingDependencyError as err:
        pytest.skip(str(err))
    return found.session(graph_file(bundle, target, graph))


def inputs(bundle: Bundle, graph: str, rows: int = 3, ahead: int = 2, seed: int = 0) -> Feeds:
    """Random values of the right shapes."""
    model, rng = bundle.manifest.model, np.random.default_rng(seed)
    if graph == "temporal":
        labels = np.arange(rows, dtype=np.int64)
        return {"timesteps": np.array([980.0, 5.0], np.float32), "class_labels": labels}
    shapes: dict[str, tuple[int, ...]] = {
        "sample": (rows, *model.sample_shape),
        "features": (rows, model.features),
    }
    if graph == "full":
        shapes["ahead"] = (ahead, rows, model.features)
        shapes["weights"] = (ahead, len(model.slots))
    else:
        shapes["forecast"] = (rows, *model.slot_shape)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def blank(like: Feeds) -> Feeds:
    """Buffers in which nothing was computed yet."""
    return {name: np.full(value.shape, np.nan, value.dtype) for name, value in like.items()}


@pytest.mark.parametrize(("backend", "target", "graph"), EVERY)
def test_both_ways_to_run_give_the_same_values(
    shared_bundle: Bundle, backend: str, target: str, graph: str
) -> None:
    """To the last bit, whatever the buffers held, and again with other values and shapes."""
    session = open_session(shared_bundle, backend, target, graph)
    buffers: Feeds = {}
    for rows, seed in ((3, 0), (3, 1), (2, 2)):
        feeds = inputs(shared_bundle, graph, rows, seed=seed)
        before = {name: value.copy() for name, value in feeds.items()}
        wanted = session.run(feeds, OUTPUTS[graph])
        assert list(wanted) == list(OUTPUTS[graph])
        if seed != 1:  # the second run is into the buffers of the first
            buffers = blank(wanted)
        session.run_into(feeds, buffers)
        for name, value in wanted.items():
            assert np.isfinite(value).all()
            np.testing.assert_array_equal(buffers[name], value)
        for name, value in feeds.items():
            np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_results_of_a_run_are_not_overwritten(shared_bundle: Bundle, backend: str) -> None:
    """Neither by the next run nor by one into buffers."""
    session = open_session(shared_bundle, backend, "reference", "full")
    feeds = inputs(shared_bundle, "full")
    found = session.run(feeds, ["output"])["output"]
    before = found.copy()
    buffers = blank(session.run(feeds, ["output", "forecast"]))
    session.run_into(feeds, buffers)
    kept = buffers["output"].copy()
    session.run(inputs(shared_bundle, "full", seed=1), ["output"])
    session.run_into(inputs(shared_bundle, "full", seed=1), blank(buffers))
    np.testing.assert_array_equal(found, before)
    np.testing.assert_array_equal(buffers["output"], kept)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_only_buffers_that_are_given_are_filled(shared_bundle: Bundle, backend: str) -> None:
    """One output of two, and parts of a larger array, beside which nothing is written."""
    session = open_session(shared_bundle, backend, "reference", "full")
    feeds = inputs(shared_bundle, "full")
    wanted = session.run(feeds, ["output", "forecast"])
    for name, value in wanted.items():
        larger = np.full((len(value) + 2, *value.shape[1:]), np.nan, np.float32)
        session.run_into(feeds, {name: larger[1:-1]})
        np.testing.assert_array_equal(larger[1:-1], value)
        assert np.isnan(larger[[0, -1]]).all()


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_nothing_ahead_is_run_too(shared_bundle: Bundle, backend: str) -> None:
    """R = 0: the forecast's buffer holds nothing, the output is that of any other R."""
    session = open_session(shared_bundle, backend, "reference", "full")
    feeds = inputs(shared_bundle, "full")
    wanted = session.run(feeds, ["output", "forecast"])
    none = feeds | {name: feeds[name][:0] for name in ("ahead", "weights")}
    buffers = blank(wanted)
    buffers["forecast"] = buffers["forecast"][:0]
    session.run_into(none, buffers)
    np.testing.assert_allclose(buffers["output"], wanted["output"], rtol=0, atol=1e-5)
    found = session.run(none, ["output"])["output"]
    np.testing.assert_array_equal(found, buffers["output"])


def renamed_input(feeds: Feeds, buffers: Feeds) -> None:
    """A name that the graph does not have, in place of one that it has."""
    feeds["samples"] = feeds.pop("sample")


def missing_input(feeds: Feeds, buffers: Feeds) -> None:
    """One input too few."""
    del feeds["sample"]


def renamed_output(feeds: Feeds, buffers: Feeds) -> None:
    """An output that the graph does not have."""
    buffers["outputs"] = buffers.pop("output")


def narrow_features(feeds: Feeds, buffers: Feeds) -> None:
    """Inputs of another shape."""
    feeds["features"] = feeds["features"][:, 1:].copy()


def small_buffer(feeds: Feeds, buffers: Feeds) -> None:
    """A buffer for fewer rows."""
    buffers["output"] = buffers["output"][1:]


def double_buffer(feeds: Feeds, buffers: Feeds) -> None:
    """A buffer of another type."""
    buffers["output"] = buffers["output"].astype(np.float64)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(
    "mistake",
    [
        renamed_input,
        missing_input,
        renamed_output,
        narrow_features,
        small_buffer,
        double_buffer,
    ],
)
def test_a_wrong_run_is_an_error_of_ours(shared_bundle: Bundle, backend: str, mistake: Any) -> None:
    """It names backend and graph, and the session still runs afterwards."""
    session = open_session(shared_bundle, backend, "reference", "full")
    feeds = inputs(shared_bundle, "full")
    buffers = blank(session.run(feeds, OUTPUTS["full"]))
    wrong, into = dict(feeds), dict(buffers)
    mistake(wrong, into)
    path = shared_bundle.graph("reference", "full")
    with pytest.raises(BundleError, match=f"backend {backend}: .*{path}") as caught:
        session.run_into(wrong, into)
    assert "\n" not in str(caught.value)
    session.run_into(feeds, buffers)
    wanted = session.run(feeds, OUTPUTS["full"])
    np.testing.assert_array_equal(buffers["output"], wanted["output"])
