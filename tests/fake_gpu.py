"""A GPU that is made of host memory and computes with ONNX Runtime.

It puts off all that is on its stream until somebody waits, as a slow device would: what was
changed, freed or read too early shows. An access outside an allocation, or at an address that an
engine does not take, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.runtime.backends import GraphFile, Session
from ditcast.runtime.backends import tensorrt_session as sessions
from ditcast.runtime.backends.device import ALIGNMENT
from ditcast.runtime.backends.gpu import Gpu
from ditcast.runtime.engines import profile_of

trt = pytest.importorskip("tensorrt_rtx")
TYPES = {"tensor(float)": trt.DataType.FLOAT, "tensor(int64)": trt.DataType.INT64}


class Done(NamedTuple):
    """One thing that was put on the stream: an upload, download, copy, clear, or a graph's run."""

    kind: str
    size: int = 0
    graph: str = ""


class FakeDevice:
    """Host memory by address, and a stream."""

    stream = 7

    def __init__(self) -> None:
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.next = 1 << 20
        self.queue: list[Callable[[], None]] = []
        self.done: list[Done] = []
        self.waits = self.allocated = 0

    def allocate(self, size: int) -> int:
        assert size > 0
        self.next += 1 << 30
        self.memory[self.next] = np.full(size, 0xA5, np.uint8)
        self.allocated += 1
        return self.next

    def free(self, address: int) -> None:
        assert not self.queue  # something could still use it
        del self.memory[address]

    def at(self, address: int, size: int) -> NDArray[np.uint8]:
        """The bytes there, all of one allocation that is not freed."""
        start = address >> 30 << 30 | 1 << 20
        assert address - start + size <= self.memory[start].size
        return self.memory[start][address - start :][:size]

    def put(self, done: Done, action: Callable[[], None]) -> None:
        """Behind all that is on the stream."""
        self.done.append(done)
        self.queue.append(action)

    def upload(self, array: NDArray[Any], address: int) -> None:
        assert array.flags.c_contiguous
        target, raw = self.at(address, array.nbytes), array.reshape(-1).view(np.uint8)
        self.put(Done("upload", array.nbytes), lambda: np.copyto(target, raw))

    def download(self, address: int, array: NDArray[Any]) -> None:
        source, raw = self.at(address, array.nbytes), array.reshape(-1).view(np.uint8)
        array.fill(0)  # nothing is there before it was waited for
        self.put(Done("download", array.nbytes), lambda: np.copyto(raw, source))

    def copy(self, source: int, target: int, size: int) -> None:
        assert source + size <= target or target + size <= source
        a, b = self.at(source, size), self.at(target, size)
        self.put(Done("copy", size), lambda: np.copyto(b, a))

    def clear(self, address: int, size: int) -> None:
        target = self.at(address, size)
        self.put(Done("clear", size), lambda: target.fill(0))

    def wait(self) -> None:
        queue, self.queue = self.queue, []
        for action in queue:
            action()
        self.waits += bool(queue)

    def used(self) -> int:
        return sum(held.size for held in self.memory.values())


class FakeEngine:
    """A graph in ONNX Runtime behind the interface of an engine; profiles are the bundle's."""

    def __init__(self, path: Path, profile: Mapping[str, Any], device: FakeDevice) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.graph, self.profile, self.device = path.stem, profile, device
        self.inputs = {x.name: x for x in self.session.get_inputs()}
        self.tensors = self.inputs | {x.name: x for x in self.session.get_outputs()}
        self.names: list[str] = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.runs_left = -1  # before one that fails

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return TYPES[self.tensors[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(n, str) else n for n in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert index == 0
        axes = self.profile.get(name, {})
        return [
            tuple(axes[str(i)][k] if isinstance(n, str) else n for i, n in enumerate(shape))
            for k, shape in enumerate([self.tensors[name].shape] * 3)
        ]

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


class FakeContext:
    """Computes on the device's memory once it is its turn."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert name in self.engine.inputs
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address % ALIGNMENT == 0
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[Any, int] = {}
        for key, shape in self.shapes.items():
            sizes |= dict(zip(self.engine.tensors[key].shape, shape, strict=True))
        return tuple(sizes.get(n, n) for n in self.engine.tensors[name].shape)

    def place(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor where it lies."""
        dtype = np.dtype(trt.nptype(self.engine.get_tensor_dtype(name)))
        size = int(np.prod(shape)) * dtype.itemsize
        raw = self.engine.device.at(self.addresses[name], size)
        found: NDArray[Any] = raw.view(dtype).reshape(shape)
        return found

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == FakeDevice.stream
        engine = self.engine
        engine.runs_left -= 1
        if engine.runs_left == -1:
            return False
        feeds = {name: self.place(name, self.shapes[name]) for name in engine.inputs}
        names = [x.name for x in engine.session.get_outputs()]
        places = [self.place(name, self.get_tensor_shape(name)) for name in names]
        for place in places:
            assert not any(np.shares_memory(place, feed) for feed in feeds.values())

        def compute() -> None:
            found = engine.session.run(names, {name: x.copy() for name, x in feeds.items()})
            for place, array in zip(places, found, strict=True):
                place[...] = array

        engine.device.put(Done("run", graph=engine.graph), compute)
        return True


class FakeBackend(sessions.TensorRtRtxBackend):
    """Engines of the graphs of a bundle that nobody has built."""

    device: FakeDevice

    def __init__(self, bundle: Bundle, device: FakeDevice) -> None:
        self.bundle, self.device = bundle, device
        self.engines: dict[str, FakeEngine] = {}

    def session(self, graph: GraphFile) -> Session:
        name = graph.path.stem
        axes = profile_of(self.bundle.manifest, name).items()
        profile = {key: {str(i): range_ for i, range_ in held.items()} for key, held in axes}
        self.engines[name] = FakeEngine(graph.path, profile, self.device)
        return sessions.TensorRtSession(trt, self.engines[name], self.device, graph)


def plug_in(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """A machine that has an Ada GPU, as far as the backend can see."""
    device, plans = FakeDevice(), {}
    for entry in built.manifest.engines:
        plans[built.file(entry.path).read_bytes()] = entry

    def deserialize(plan: bytes) -> FakeEngine:
        if plan in plans:
            entry = plans[plan]
            return FakeEngine(built.graph("tensorrt", entry.graph), entry.profile, device)
        (full,) = (entry for entry in plans.values() if entry.graph == "full")
        return FakeEngine(built.graph("reference", "full"), full.profile, device)

    runtime = SimpleNamespace(deserialize_cuda_engine=deserialize)
    monkeypatch.setattr(sessions, "find_gpu", lambda: Gpu("a GPU", "8.9", 1000))
    monkeypatch.setattr(sessions, "CudaDevice", lambda: device)
    monkeypatch.setattr(trt, "Runtime", lambda logger: runtime)
    return device
