"""Sessions over the engines that `ditcast build` has put into a bundle; they need a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditcast.errors import BundleError, ConfigError, UnsupportedError
from ditcast.runtime.backends.base import Array, Arrays, GraphFile, Memory, NodeTime, Session
from ditcast.runtime.backends.device import ALIGNMENT, CudaDevice, Device, DeviceArray
from ditcast.runtime.backends.gpu import find_gpu
from ditcast.runtime.backends.resident import DeviceMemory
from ditcast.runtime.backends.tensorrt import load, no_gpu
from ditcast.settings import Settings

Kind = tuple[tuple[int, ...], np.dtype[Any]]  # shape and type of a tensor


class TensorRtSession:
    """One engine with its context, and a buffer on the device for each tensor of the host."""

    def __init__(self, trt: Any, engine: Any, device: Device, graph: GraphFile) -> None:
        """Read the engine's tensors; buffers are allocated when the first inputs come."""
        self._buffers: dict[str, tuple[int, int]] = {}  # address and size
        self._shapes: dict[str, tuple[int, ...]] = {}  # as the context knows them
        self._engine, self._device, self._graph = engine, device, graph
        self._context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self._inputs = [n for n in names if modes[n] == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if modes[n] == trt.TensorIOMode.OUTPUT]
        self._types = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Compute the named outputs."""
        found = {name: np.empty(*kind) for name, kind in self.outputs(feeds, outputs).items()}
        self.run_into(feeds, found)
        return found

    def outputs(self, feeds: Arrays, names: Sequence[str]) -> dict[str, Kind]:
        """Shape and type of some outputs."""
        self._shape(feeds)
        return {name: self._kind(name) for name in names}

    def run_into(self, feeds: Arrays, buffers: Arrays) -> None:
        """Compute the outputs that `buffers` names into its arrays.

        Arrays of the device are read and written where they are, and not waited for.
        """
        self._shape(feeds)
        for name, held in buffers.items():
            self._check(name, held)
        for name in self._inputs:
            self._context.set_tensor_address(name, self._source(name, feeds[name]))
        for name in self._outputs:
            self._context.set_tensor_address(name, self._target(name, buffers.get(name)))
        if not self._context.execute_async_v3(self._device.stream):
            raise BundleError(
                f"{self._graph.path.name}: its engine fails; look at the lines above, and build it "
                "again with: ditcast build"
            )
        outside = {n: held for n, held in buffers.items() if not isinstance(held, DeviceArray)}
        for name, held in outside.items():
            self._device.download(self._buffers[name][0], held)
        if outside:
            self._device.wait()

    def _kind(self, output: str) -> Kind:
        """Shape and type of an output, for the shapes of the inputs."""
        return tuple(self._context.get_tensor_shape(output)), self._types[output]

    def _shape(self, feeds: Arrays) -> None:
        """Tell the shapes of all inputs, where they are others than before."""
        for name in self._inputs:
            if name not in feeds:
                raise ConfigError(f"{self._graph.path.name}: no value for its input {name}")
            shape = feeds[name].shape
            if shape == self._shapes.get(name):
                continue
            low = high = tuple(self._engine.get_tensor_shape(name))
            if -1 in low:
                low, _, high = map(tuple, self._engine.get_tensor_profile_shape(name, 0))
            fits = len(shape) == len(low) and all(
                a <= n <= b for a, n, b in zip(low, shape, high, strict=True)
            )
            if not fits:
                raise ConfigError(
                    f"{self._graph.path.name}: got {name} {list(shape)}, and its engine "
                    f"takes {list(low)} to {list(high)}; use a smaller batch, or compile a bundle "
                    "with a larger --batch"
                )
            self._context.set_input_shape(name, shape)
            self._shapes[name] = shape

    def _source(self, name: str, value: Array) -> int:
        """Where an input lies: an array of the host is uploaded, a part may have to be aligned."""
        if not isinstance(value, DeviceArray):
            array = np.asarray(value, self._types[name], order="C")
            address = self._buffer(name, array.nbytes)
            self._device.upload(array, address)
            return address
        if value.address % ALIGNMENT == 0:
            return value.address
        address = self._buffer(name, value.nbytes)
        self._device.copy(value.address, address, value.nbytes)
        return address

    def _target(self, name: str, held: Array | None) -> int:
        """Where an output goes, be it asked for or not."""
        if isinstance(held, DeviceArray):
            return held.address
        shape, dtype = self._kind(name)
        return self._buffer(name, prod(shape) * dtype.itemsize)

    def _check(self, name: str, held: Array) -> None:
        """Refuse an array that an output does not fit."""
        shape, dtype = self._kind(name)
        if held.shape != shape or held.dtype != dtype:
            raise ConfigError(
                f"{self._graph.path.name}: the buffer for {name} is {held.dtype} "
                f"{list(held.shape)}, expected {dtype} {list(shape)}"
            )
        if isinstance(held, DeviceArray):
            return
        if not (held.flags.c_contiguous and held.flags.writeable):
            raise ConfigError(
                f"{self._graph.path.name}: the buffer for {name} is not contiguous and "
                "writeable; give an array of its own"
            )

    def _buffer(self, name: str, size: int) -> int:
        """The address of a tensor's buffer, which only grows; an empty tensor has one too."""
        address, held = self._buffers.get(name, (0, 0))
        if held < max(size, 1):
            if held:
                self._device.wait()
                self._device.free(address)
            address = self._device.allocate(max(size, 1))
            self._buffers[name] = address, max(size, 1)
        return address

    def close(self) -> None:
        """Give the buffers back; a session that nobody holds does it by itself."""
        self._device.wait()  # for what it computes for others, too
        while self._buffers:
            self._device.free(self._buffers.popitem()[1][0])

    def __del__(self) -> None:
        """A bundle can be run part by part, so that memory has to come back."""
        self.close()


class TensorRtBackend:
    """`Backend` over TensorRT, on the first GPU of this machine."""

    name = "tensorrt"
    target = "tensorrt"
    loops: tuple[str, ...] = ("host", "graph")

    def __init__(self, settings: Settings) -> None:
        """Find the GPU and the library.

        Raises:
            UnsupportedError: there is no GPU.
            MissingDependencyError: the package is not installed.
        """
        gpu = find_gpu()
        if gpu is None:
            raise UnsupportedError(no_gpu(self.name, "run"))
        self.gpu, self._trust = gpu, settings.trust_engines
        self._trt = load(self.name)
        self.device: Device = CudaDevice()
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))

    def session(self, graph: GraphFile) -> Session:
        """Load the engine of a graph.

        Raises:
            BundleError: there is none that fits and that is signed.
            UnsupportedError: the graph is of another target.
        """
        from ditcast.runtime.engines import TARGET, find_engine, load_plan

        if graph.bundle is None or graph.path.parent.name != TARGET:
            raise UnsupportedError(
                f"backend {self.name}: runs the engines of target {TARGET}, got {graph.path}; use "
                "another backend for it (tools/gpu_check.py compares them)"
            )
        device = f"sm{self.gpu.capability.replace('.', '')}"
        entry = find_engine(graph.bundle, self.name, graph.path.stem, device)
        version = str(self._trt.__version__)
        return self.over(load_plan(graph.bundle, entry, version, trust=self._trust), graph)

    def over(self, plan: bytes, graph: GraphFile) -> TensorRtSession:
        """A session over a plan of a graph, which is code: that of `load_plan`, or one just built.

        Raises:
            BundleError: the library cannot load it.
        """
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(
                f"engine: that of {graph.path} cannot be loaded on {self.gpu.name}; run: ditcast "
                f"build {graph.bundle.path if graph.bundle else 'BUNDLE'} --backend {self.name}"
            )
        return TensorRtSession(self._trt, engine, self.device, graph)

    def memory(self, session: Callable[[str], Session]) -> Memory:
        """Arrays of the device, which its sessions read and write in place."""
        return DeviceMemory(self.device, session)

    def profile(self, graph: GraphFile, feeds: Arrays, runs: int) -> list[NodeTime]:
        """Engines are audited by what their builder said.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"backend {self.name}: its nodes are not timed one by one; see ditcast audit BUNDLE "
            f"--backend {self.name}"
        )

    def is_integer(self, kernel: str) -> bool:
        """Whether a kernel, as the audit names it, multiplies integers."""
        return kernel.startswith("INT8")

    def facts(self) -> dict[str, Any]:
        """Version and GPU."""
        return {
            "backend": self.name,
            self.name: str(self._trt.__version__),
            "gpu": self.gpu.name,
            "compute_capability": self.gpu.capability,
            "gpu_memory_mib": self.gpu.memory_mib,
        }


class TensorRtRtxBackend(TensorRtBackend):
    """The same over TensorRT for RTX."""

    name = "tensorrt-rtx"
