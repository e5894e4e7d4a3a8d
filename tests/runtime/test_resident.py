"""What stays on a device between steps: what is copied and when, for how long, and the same bits.

The device of `fake_gpu` does nothing before somebody waits for it. What the bits are compared with
is the loop that copies everything: the same engines over arrays of numpy.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from ditcast.bundle import Bundle
from ditcast.errors import BundleError, ConfigError
from ditcast.models import LoadedModel
from ditcast.runtime import Pipeline
from ditcast.runtime.backends import graph_file
from ditcast.runtime.backends.base import HostMemory
from ditcast.runtime.backends.resident import DeviceMemory
from ditcast.runtime.pipeline import Step
from tests.conftest import make_bundle
from tests.fake_gpu import Done, FakeBackend, FakeDevice

pytestmark = pytest.mark.tensorrt
STEPS, FULL = 6, 4  # of FORA at an interval of 2


class Copying(FakeBackend):
    """The same engines, whose inputs and outputs all are on the host."""

    memory: Any = HostMemory


@pytest.fixture(scope="module")
def summing(other: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """TaylorSeer, whose forecasts are sums, with fresh noise at every step and a correction."""
    keys: dict[str, Any] = {"sampler": "ddpm", "steps": 9, "interval": 3, "guidance": 1.5}
    keys |= {"cache": "taylor", "order": 2, "correction": "moment"}
    path = tmp_path_factory.mktemp("summing") / "b"
    return make_bundle(other, path, ("tensorrt",), **keys)


def over(bundle: Bundle, kind: type[FakeBackend] = FakeBackend, **options: Any) -> Any:
    """A pipeline, its backend and its device."""
    device = FakeDevice()
    backend = kind(bundle, device)
    return Pipeline(bundle, backend=backend, **options), backend, device


def test_the_bits_of_copying(typed_bundle: Bundle) -> None:
    """For batches of one and two, with and without guidance, every step."""
    check_bits(typed_bundle, {}, {"guidance": 1.0}, {"cache": "none"}, {"spacing": "trailing"})


def test_outputs_come_down_where_they_are_forecast(typed_bundle: Bundle) -> None:
    """The host sums them up: those of two branches per full step, beside the last sample."""
    check_bits(typed_bundle, {"cache": "output"}, {"cache": "output", "guidance": 1.0})
    pipeline, _, device = over(typed_bundle)
    pipeline.sample([3, 1], cache="output")
    sample, full = 4 * 2 * 3 * 16 * 16, pipeline.full_steps
    assert of_kind(device, "download") == [*[2 * sample] * full, sample]


def test_the_bits_of_sums(summing: Bundle) -> None:
    """Forecasts from several full steps, step noise and a correction, which others go without."""
    check_bits(summing, {}, {"guidance": 1.0}, {"cache": "fora"})


def check_bits(bundle: Bundle, *requests: dict[str, Any]) -> None:
    """Of all samples, by both memories."""
    (resident, _, device), (copying, _, _) = over(bundle), over(bundle, Copying)
    for request in requests:
        for labels in ([3], [1, 2]):
            paths: list[list[Any]] = [[], []]
            for pipeline, path in zip((resident, copying), paths, strict=True):
                path.append(pipeline.sample(labels, seed=2, callback=path.append, **request))
            for found, wanted in zip(*paths, strict=True):
                if isinstance(found, Step):
                    assert (found.index, found.full) == (wanted.index, wanted.full)
                    found, wanted = found.sample, wanted.sample
                np.testing.assert_array_equal(found, wanted)
            assert np.isfinite(paths[0][-1]).all()
            assert not device.queue


def test_what_a_request_copies(typed_bundle: Bundle) -> None:
    """No sample, features or forecasts between host and device, but the first and last sample."""
    pipeline, _, device = over(typed_bundle)
    pipeline.sample([3, 1])
    runs = [done.graph for done in device.done if done.kind == "run"]
    assert Counter(runs) == {"temporal": 1, "full": FULL, "reuse": STEPS - FULL, "update": STEPS}
    model, sample = typed_bundle.manifest.model, 4 * 2 * 3 * 16 * 16
    assert of_kind(device, "download") == [sample]
    assert device.waits == 1
    begun = device.done.index(Done("run", graph="temporal"))
    first = device.done.index(Done("run", graph="full"))
    # Timesteps and three labels, then noise, step numbers, the scale of guidance, the sampler's
    # five columns, a correction of three channels; later a row of weights with every full step.
    assert of_kind(device, "upload", until=begun) == [4 * STEPS, 8 * 3]
    known = [sample, 8 * STEPS, 4, *[4 * STEPS] * 5, *[4 * STEPS * 3] * 2]
    weights = 4 * len(model.slots)
    found = of_kind(device, "upload", begun, first)
    assert Counter(found) == Counter([*known, weights])
    assert of_kind(device, "upload", first) == [weights] * (FULL - 1)
    # On the device: the sample twice and four rows of features per step, as many for the step
    # ahead of each full one, and the number of the step, where it does not lie as engines take it.
    row = 4 * model.features
    copies = Counter(of_kind(device, "copy"))
    assert copies == {sample: 2 * STEPS, row: 4 * (STEPS + FULL), 8: STEPS - 1}


def of_kind(device: FakeDevice, kind: str, start: int = 0, until: int | None = None) -> list[int]:
    """The sizes of what was put on the stream, in order."""
    return [done.size for done in device.done[start:until] if done.kind == kind]


def test_a_callback_takes_a_sample_per_step(typed_bundle: Bundle) -> None:
    pipeline, _, device = over(typed_bundle)
    seen: list[Step] = []
    found = pipeline.sample([3], callback=seen.append)
    assert of_kind(device, "download") == [found.nbytes] * (STEPS + 1)
    assert len({step.sample.tobytes() for step in seen}) == STEPS  # none is written over
    np.testing.assert_array_equal(seen[-1].sample, found)


def test_memory_of_a_request_goes_with_it(summing: Bundle) -> None:
    """As much is held after every request: what sessions upload small inputs into."""
    pipeline, _, device = over(summing, low_memory=True)
    held = []
    for labels in ([3, 1], [2], [3, 1]):
        pipeline.sample(labels)
        held.append(device.used())
    assert len(set(held)) == 1
    assert held[0] < 4 * summing.manifest.model.features
    pipeline.features([3], pipeline.schedule.timesteps(9), guided=True)
    assert device.used() == held[0]
    del pipeline
    assert device.memory == {}


@pytest.mark.parametrize("graph", ["temporal", "full", "reuse", "add", "update"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_request_that_fails(summing: Bundle, graph: str, after: int) -> None:
    """At the first run of an engine or a later one: all is given back, and the next is right."""
    pipeline, backend, device = over(summing)
    wanted = pipeline.sample([3, 1])
    held = device.used()
    backend.engines[graph].runs_left = 0 if graph == "temporal" else after
    with pytest.raises(BundleError, match=f"{graph}.onnx: its engine fails; .*ditcast build"):
        pipeline.sample([3, 1])
    assert (device.used(), device.queue) == (held, [])
    np.testing.assert_array_equal(pipeline.sample([3, 1]), wanted)


def test_a_callback_that_fails(typed_bundle: Bundle) -> None:
    pipeline, _, device = over(typed_bundle)
    wanted, held = pipeline.sample([3]), device.used()

    def stop(step: Step) -> None:
        if step.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.sample([3], callback=stop)
    assert (device.used(), device.queue) == (held, [])
    np.testing.assert_array_equal(pipeline.sample([3]), wanted)


def test_arrays_of_a_device(typed_bundle: Bundle) -> None:
    """Parts by number and by range, inputs that have to be aligned, outputs that do not fit."""
    _, backend, device = over(typed_bundle)
    session = backend.session(graph_file(typed_bundle, "tensorrt", "add"))
    values = np.arange(3 * 16 * 64 + 1, dtype=np.float32)[1:].reshape(3, 16, 64)
    with DeviceMemory(device, lambda _: session) as memory:
        whole = memory.array(values)
        assert [part.shape for part in whole] == [(16, 64)] * 3
        np.testing.assert_array_equal(memory.get(whole[2]), values[2])
        np.testing.assert_array_equal(memory.get(whole[1:]), values[1:])
        assert whole[3:].shape == (0, 16, 64)
        shifted = memory.array(np.append(np.float32(7), values[0]))[1:]
        shifted = type(shifted)(shifted.address, (1, 16, 64), shifted.dtype)
        total = memory.zeros((1, 16, 64))
        feeds = {"part": shifted, "older": whole[:1]}
        session.run_into(feeds, {"sum": total})
        np.testing.assert_array_equal(memory.get(total)[0], 2 * values[0])
        message = r"add.onnx: the buffer for sum is float32 \[3, 16, 64\], expected float32 \[1, 16"
        with pytest.raises(ConfigError, match=message):
            session.run_into(feeds, {"sum": whole})
    session.close()
    assert device.memory == {}
