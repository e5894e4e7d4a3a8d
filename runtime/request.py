"""One request of the host loop: sessions over arrays that every step uses again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditcast.cache.stepping import GRAPHS
from ditcast.manifest import ModelInfo
from ditcast.runtime.backends import Array, Memory, Session

# What is read while the graph that gives it runs again.
KEPT = {"forecast", "gauge", "stream", "y_now", "a_now", "slope", "kept"}
DECIDES = "drift"  # what the host reads at every step


class HostRequest:
    """`cache.stepping.Request` over the sessions of a backend, and its memory of one request."""

    def __init__(
        self,
        session: Callable[[str], Session],
        memory: Memory,
        model: ModelInfo,
        features: Array,
        rows: NDArray[np.int64],
    ) -> None:
        """`features` are (T, U, F); `rows` (N,) says which of U each row of the batch takes."""
        self.session, self.memory, self.model, self.slots = session, memory, model, len(model.slots)
        self.all_features, self.row_index = features, rows.tolist()
        width, columns = len(rows), features.shape[-1]
        self.held = {
            "sample": memory.zeros((width, *model.sample_shape)),
            "features": memory.zeros((width, columns)),
        }
        self.ahead = memory.zeros((0, width, columns))
        self.buffers: dict[str, Iterator[Array]] = {}

    def begin(self, step: int, x: Array) -> None:
        """Take the sample (n, C, H, W) and the features of a step."""
        for start in range(0, len(self.row_index), len(x)):
            self.memory.copy(x, self.held["sample"][start : start + len(x)])
        self._take(step, self.held["features"])

    def features(self, steps: Sequence[int]) -> Array:
        """(R, N, F), until the next call."""
        if len(self.ahead) != len(steps):
            self.ahead = self.memory.zeros((len(steps), *self.ahead.shape[1:]))
        for step, rows in zip(steps, self.ahead, strict=True):
            self._take(step, rows)
        return self.ahead

    def _take(self, step: int, into: Array) -> None:
        """The features of a step, (N, F)."""
        for row, place in zip(self.row_index, into, strict=True):
            self.memory.copy(self.all_features[step][row], place)

    def run(self, graph: str, **inputs: Array) -> dict[str, Array]:
        """Run a step graph."""
        (needed, names), given = GRAPHS[graph].names(self.slots), self.held | inputs
        found = {name: self._buffer(name, inputs) for name in names}
        self.session(graph).run_into({name: given[name] for name in needed}, found)
        return found

    def array(self, values: Any) -> Array:
        """Float32 numbers, which the host knows and no run changes."""
        return np.asarray(values, np.float32)

    def keep(self, output: Array) -> Array:
        """A copy that lasts."""
        return np.array(self.memory.get(output))

    def rows(self, history: int, slots: int = 0) -> Array:
        """Zeros, (history, [slots,] N, *slot_shape)."""
        many = (slots,) if slots else ()
        width = len(self.row_index)
        return self.memory.zeros((history, *many, width, *self.model.slot_shape))

    def join(self, newest: Array, older: Array) -> Array:
        """The newest in front of older ones, as many as before."""
        found = self.memory.zeros(older.shape)
        for source, place in zip([newest, *older][:-1], found, strict=True):
            self.memory.copy(source, place)
        return found

    def add(self, part: Array, older: Array) -> None:
        """Add older values to a part of an output, where that lies."""
        self.memory.add(part, older)

    def _buffer(self, output: str, inputs: dict[str, Array]) -> Array:
        """Where an output goes; what outlives the next run of its graph has two places in turn."""
        if output not in self.buffers:
            shape, kept = self._shape(output, inputs), output.partition(".")[0] in KEPT
            if output == DECIDES:
                self.buffers[output] = cycle([np.zeros(shape, np.float32)])
            else:
                self.buffers[output] = cycle([self.memory.zeros(shape) for _ in range(1 + kept)])
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
