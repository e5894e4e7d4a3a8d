"""What stays on a device between the steps of a request, and what is done to it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditcast.runtime.backends.base import Arrays
from ditcast.runtime.backends.device import Device, DeviceArray
from ditcast.sampling import Advance, Coefficients

Follow = Callable[[int, DeviceArray, DeviceArray], DeviceArray]


class DeviceMemory:
    """`Memory` on a device; sums and the sampler are graphs of the bundle, `add` and `update`."""

    def __init__(self, device: Device, session: Callable[[str], Any]) -> None:
        """`session` opens an engine."""
        self._device, self._session = device, session
        self._held: list[int] = []
        self._sums: dict[tuple[int, ...], DeviceArray] = {}

    def __enter__(self) -> DeviceMemory:
        """Nothing is taken yet."""
        return self

    def __exit__(self, *why: object) -> None:
        """Free all of it, once nothing runs that could use it."""
        self._device.wait()
        while self._held:
            self._device.free(self._held.pop())

    def array(self, values: NDArray[Any]) -> DeviceArray:
        """Upload values."""
        found = self.empty(values.shape, values.dtype)
        self._device.upload(np.ascontiguousarray(values), found.address)
        return found

    def zeros(self, shape: tuple[int, ...]) -> DeviceArray:
        """Float32 zeros."""
        found = self.empty(shape, np.dtype(np.float32))
        self._device.clear(found.address, found.nbytes)
        return found

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """An array of its own, of any values; an empty one has an address too."""
        found = DeviceArray(0, shape, dtype)
        self._held.append(self._device.allocate(max(found.nbytes, 1)))
        return DeviceArray(self._held[-1], shape, dtype)

    def get(self, array: DeviceArray) -> NDArray[Any]:
        """Download an array, and wait for it."""
        found = np.empty(array.shape, array.dtype)
        self._device.download(array.address, found)
        self._device.wait()
        return found

    def copy(self, source: DeviceArray, into: DeviceArray) -> None:
        """Copy values into an array."""
        self._device.copy(source.address, into.address, into.nbytes)

    def add(self, part: DeviceArray, older: DeviceArray) -> None:
        """Add values to an array, by way of another one: an engine reads what it must not write."""
        if part.shape not in self._sums:
            self._sums[part.shape] = self.empty(part.shape, part.dtype)
        total = self._sums[part.shape]
        self._session("add").run_into({"part": part, "older": older}, {"sum": total})
        self.copy(total, part)

    def run(self, graph: str, feeds: Arrays, outputs: Sequence[str]) -> dict[str, DeviceArray]:
        """Run an engine; its outputs stay here."""
        session = self._session(graph)
        found = {
            name: self.empty(shape, dtype)
            for name, (shape, dtype) in session.outputs(feeds, outputs).items()
        }
        session.run_into(feeds, found)
        return found

    def sampler(self, advance: Advance, shape: tuple[int, ...]) -> Follow:
        """What `update` does; it gives one of two arrays in turn."""
        session, (steps, _) = self._session("update"), advance.table.shape
        channels = (steps, shape[1], 1, 1)
        known = dict(zip(Coefficients._fields, advance.table.T, strict=True))
        known["guidance_scale"] = np.array(advance.guidance, np.float32)
        nothing = {"gain": np.ones(channels, np.float32), "offset": np.zeros(channels, np.float32)}
        for name, none in nothing.items():  # the engine corrects by these in any case
            table = getattr(advance, name)
            known[name] = none if table is None else table.reshape(channels)
        if advance.noise is None:
            del known["k_z"]
        else:
            known["step_noise"] = advance.noise
        held = {name: self.array(values) for name, values in known.items()}
        numbers = self.array(np.arange(steps))
        places = cycle([self.zeros(shape) for _ in range(2)])

        def follow(step: int, x: DeviceArray, output: DeviceArray) -> DeviceArray:
            after = next(places)
            given = {"step": numbers[step], "x": x, "output": output}
            session.run_into({**held, **given}, {"after": after})
            return after

        return follow
