"""OpenVINO on the CPU (oneDNN kernels): whole graphs, compiled for fixed shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from ditcast.errors import UnsupportedError
from ditcast.progress import say
from ditcast.runtime.backends.base import (
    Arrays,
    GraphFile,
    HostMemory,
    NodeTime,
    Session,
    failure,
)
from ditcast.runtime.backends.loadcache import LoadCache, machine_facts
from ditcast.runtime.backends.onnxruntime import in_place
from ditcast.settings import Settings

DEVICE = "CPU"
PROBE = Path(__file__).parent / "probe.onnx"
BLOB = "graph.blob"
PRODUCTS = ("FullyConnected", "MatMul", "Convolution")  # kinds of nodes that can be in integers


class OpenVinoSession:
    """One graph: compiled when the first inputs of a shape come, and kept for that shape.

    An output that hangs on an empty input is left out, with all that only it needs.
    """

    def __init__(self, backend: OpenVinoBackend, graph: GraphFile) -> None:
        """Read the graph; its weights stay in their file until it is compiled.

        Raises:
            BundleError: OpenVINO cannot read it.
        """
        self._backend, self._graph = backend, graph
        self._compiled: dict[Any, Any] = {}
        try:
            self._model = backend.core.read_model(graph.path)
        except Exception as err:  # OpenVINO raises RuntimeError for everything
            raise failure(backend.name, graph, "loading", err) from err
        self._needs = {output.any_name: _inputs_of(output) for output in self._model.outputs}

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Compute the named outputs, but for those that hang on an empty input."""
        names = self._possible(feeds, outputs)
        try:
            # A request of its own: that of `run_into` writes into other arrays.
            request = self._network(feeds, names).create_infer_request()
            self._set(request, {name: feeds[name] for name in self._inputs(names)})
            request.infer()
            return {name: request.get_tensor(name).data.copy() for name in names}
        except Exception as err:  # as above
            raise failure(self._backend.name, self._graph, "running", err) from err

    def run_into(self, feeds: Arrays, buffers: Arrays) -> None:
        """Compute the outputs that `buffers` names into its arrays, which OpenVINO shares."""
        names = self._possible(feeds, list(buffers))
        try:
            network = self._network(feeds, names)
            key = id(network)
            if key not in self._compiled:
                self._compiled[key] = network.create_infer_request()
            request = self._compiled[key]
            self._set(request, {name: feeds[name] for name in self._inputs(names)})
            self._set(request, {name: buffers[name] for name in names})
            request.infer()
        except Exception as err:  # as above
            raise failure(self._backend.name, self._graph, "running", err) from err

    def profile(self, feeds: Arrays, runs: int) -> list[Any]:
        """OpenVINO's own counters of each run after the first."""
        names = self._possible(feeds, list(self._needs))
        request = self._network(feeds, names, profiled=True).create_infer_request()
        self._set(request, {name: feeds[name] for name in self._inputs(names)})
        found = []
        for _ in range(1 + runs):
            request.infer()
            found.append(request.profiling_info)
        return found[1:]

    def _possible(self, feeds: Arrays, outputs: Sequence[str]) -> tuple[str, ...]:
        empty = {name for name, array in feeds.items() if array.size == 0}
        return tuple(name for name in outputs if not self._needs.get(name, set()) & empty)

    def _inputs(self, outputs: Sequence[str]) -> list[str]:
        needed = set().union(*(self._needs[name] for name in outputs))
        return [x.any_name for x in self._model.inputs if x.any_name in needed]

    def _set(self, request: Any, arrays: Arrays) -> None:
        for name, array in arrays.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def _network(self, feeds: Arrays, outputs: tuple[str, ...], profiled: bool = False) -> Any:
        """The compiled graph for these shapes, cut down to these outputs."""
        shapes = {name: list(feeds[name].shape) for name in self._inputs(outputs)}
        key = (str(shapes), outputs, profiled)
        if key not in self._compiled:
            model = self._model.clone()
            results = [model.output(name).get_node() for name in outputs]
            inputs = [model.input(name).get_node() for name in shapes]
            cut = openvino.Model(results, inputs, self._graph.path.name)
            cut.reshape(shapes)
            self._compiled[key] = self._backend.compile(cut, self._graph, str(key), profiled)
        return self._compiled[key]


def _inputs_of(output: Any) -> set[str]:
    """The names of the inputs that an output hangs on."""
    found, seen, todo = set(), set(), [output.get_node()]
    while todo:
        node = todo.pop()
        if (name := node.get_friendly_name()) in seen:
            continue
        seen.add(name)
        if node.get_type_name() == "Parameter":
            found.add(node.output(0).any_name)
        todo += [source.get_source_output().get_node() for source in node.inputs()]
    return found


class OpenVinoBackend:
    """`Backend` over OpenVINO's CPU plugin.

    Its native interface, not its execution provider for ONNX Runtime: that one (1.8.1) offers
    no device on processors of other makers, and shows a whole graph as one node, so that no
    audit could tell which layers lost their integers.
    """

    name = "openvino"
    target = "openvino"
    loops: tuple[str, ...] = ("host",)  # it runs a whole ONNX Loop many times slower than its steps
    memory = HostMemory

    def __init__(self, settings: Settings) -> None:
        """Find out how this CPU multiplies integers.

        Raises:
            ConfigError: more threads than cores.
        """
        self.threads = settings.thread_count()
        self.core = openvino.Core()
        version = openvino.get_version()
        self._cache = LoadCache(
            self.name, machine_facts(openvino=version, threads=str(self.threads))
        )
        probe = OpenVinoSession(self, GraphFile(path=PROBE))
        found = probe.run({"x": np.full((1, 32, 64), 255, np.float32)}, ["y"])["y"]
        self.exact = bool((found == 255 * 127 * 64).all())

    def session(self, graph: GraphFile) -> Session:
        """Load a graph; one that runs once per request into ONNX Runtime, which need not pack it.

        Raises:
            UnsupportedError: 8-bit weights on a CPU whose integer kernels saturate.
        """
        if graph.weight_bits > 7 and not self.exact:
            raise UnsupportedError(
                "backend openvino: its u8 x s8 products saturate on this CPU, and weights of "
                f"{graph.weight_bits} bits would give wrong images; compile with --scheme w7a8, "
                "or use --backend onnxruntime"
            )
        return in_place(graph, self.threads) if graph.once else OpenVinoSession(self, graph)

    def compile(self, model: Any, graph: GraphFile, variant: str, profiled: bool) -> Any:
        """Compile a graph of fixed shapes; a quantized one is kept for the next start.

        The float parts of a quantized graph run in OpenVINO's default precision, which is
        bfloat16 on CPUs with AMX; a graph without integers (weights of 0 bits) is full
        precision and stays so, and so do temporal features, on which every step hangs.
        """
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": profiled,
        }
        if graph.path.stem == "temporal" or not graph.weight_bits:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        if profiled or not graph.identity or not graph.weight_bits:
            return self.core.compile_model(model, DEVICE, settings)
        identity, label = f"{graph.identity} {variant}", f"backend openvino: {graph.path.name}"
        kept = self._cache.find(identity, label)
        if kept is not None:
            try:
                blob = openvino.tensor_from_file(kept / BLOB)
                return self.core.import_model(blob, DEVICE, settings)
            except RuntimeError as err:
                problem = str(err).strip().splitlines()[-1]
                say(f"{label}: {kept} cannot be read ({problem}); compiling it again")
        compiled = self.core.compile_model(model, DEVICE, settings)

        def write(folder: Path) -> None:
            with (folder / BLOB).open("wb") as file:
                file.write(compiled.export_model().read())

        self._cache.store(identity, label, write)
        return compiled

    def profile(self, graph: GraphFile, feeds: Arrays, runs: int) -> list[NodeTime]:
        """Median times of the nodes that ran; a kernel is named kind/implementation."""
        times = defaultdict(list)
        for nodes in OpenVinoSession(self, graph).profile(feeds, runs):
            for node in nodes:
                if ms := node.real_time.total_seconds() * 1000:
                    times[node.node_name, f"{node.node_type}/{node.exec_type}"].append(ms)
        return [NodeTime(*key, float(np.median(ms))) for key, ms in times.items()]

    def is_integer(self, kernel: str) -> bool:
        """Whether a kernel, as `profile` names it, multiplies integers."""
        kind, _, implementation = kernel.partition("/")
        return kind.startswith(PRODUCTS) and implementation.lower().endswith(("i8", "u8"))

    def facts(self) -> dict[str, Any]:
        """Version, threads, integer mode and the precision of the rest."""
        bf16 = "BF16" in self.core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        return {
            "backend": self.name,
            "openvino": openvino.get_version(),
            "threads": self.threads,
            "integer_mode": "u8 x s8" if self.exact else "u8 x s7 (this CPU saturates u8 x s8)",
            "float_mode": "bfloat16" if bf16 else "float32",
        }
