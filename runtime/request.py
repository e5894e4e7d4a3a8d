"""One request of the host loop: sessions over buffers that every step uses again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditcast.cache.stepping import GRAPHS
from ditcast.manifest import ModelInfo
from ditcast.runtime.backends import Session

Array = NDArray[np.float32]
# What is read while the graph that gives it runs again.
KEPT = {"forecast", "gauge", "stream", "y_now", "a_now", "slope", "kept"}


class HostRequest:
    """`cache.stepping.Request` over the sessions of a backend."""

    def __init__(
        self,
        session: Callable[[str], Session],
        model: ModelInfo,
        features: Array,
        rows: NDArray[np.int64],
    ) -> None:
        """`features` are (T, U, F); `rows` (N,) says which of U each row of the batch takes."""
        self.session, self.model, self.slots = session, model, len(model.slots)
        self.all_features, self.row_index = features, rows
        width, columns = len(rows), features.shape[-1]
        self.held = {
            "sample": np.empty((width, *model.sample_shape), np.float32),
            "features": np.empty((width, columns), np.float32),
        }
        self.ahead = np.empty((0, width, columns), np.float32)
        self.buffers: dict[str, Iterator[Array]] = {}

    def begin(self, step: int, x: Array) -> None:
        """Take the sample (n, C, H, W) and the features of a step."""
        self.held["sample"].reshape(-1, *x.shape)[:] = x
        np.take(self.all_features[step], self.row_index, axis=0, out=self.held["features"])

    def features(self, steps: Sequence[int]) -> Array:
        """(R, N, F), until the next call."""
        if len(self.ahead) != len(steps):
            self.ahead = np.empty((len(steps), *self.ahead.shape[1:]), np.float32)
        for r, step in enumerate(steps):
            np.take(self.all_features[step], self.row_index, axis=0, out=self.ahead[r])
        return self.ahead

    def run(self, graph: str, **inputs: Array) -> dict[str, Array]:
        """Run a step graph."""
        (needed, names), given = GRAPHS[graph].names(self.slots), self.held | inputs
        found = {name: self._buffer(name, inputs) for name in names}
        self.session(graph).run_into({name: given[name] for name in needed}, found)
        return found

    def array(self, values: Any) -> Array:
        """Float32 numbers as an array."""
        return np.asarray(values, np.float32)

    def keep(self, output: Array) -> Array:
        """A copy that lasts."""
        return output.copy()

    def rows(self, history: int, slots: int = 0) -> Array:
        """Zeros, (history, [slots,] N, *slot_shape)."""
        many = (slots,) if slots else ()
        return np.zeros((history, *many, len(self.row_index), *self.model.slot_shape), np.float32)

    def join(self, newest: Array, older: Array) -> Array:
        """The newest in front of older ones, as many as before."""
        return np.concatenate([newest[None], older[:-1]])

    def _buffer(self, output: str, inputs: dict[str, Array]) -> Array:
        """Where an output goes; what outlives the next run of its graph has two places in turn."""
        if output not in self.buffers:
            shape, kept = self._shape(output, inputs), output.partition(".")[0] in KEPT
            count = 2 if kept else 1
            self.buffers[output] = cycle([np.empty(shape, np.float32) for _ in range(count)])
        return next(self.buffers[output])

    def _shape(self, output: str, inputs: dict[str, Array]) -> tuple[int, ...]:
        """Of an output of a step graph that is given these inputs."""
        model, width = self.model, len(self.row_index)
        slots = (self.slots, width, *model.slot_shape)
        shapes = {
            "output": (width, model.output_channels, *model.sample_shape[1:]),
            "drift": (),
            "a_now": slots,
            "slope": slots[:2],
        }
        if output == "forecast":
            return (len(inputs["weights"]), *slots[1:])
        if output == "y_now":
            return (len(inputs["y"]), *slots)
        return shapes.get(output, slots[1:])
