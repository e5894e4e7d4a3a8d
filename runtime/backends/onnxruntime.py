"""ONNX Runtime on the CPU (MLAS kernels)."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ditcast.errors import BundleError, UnsupportedError
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
from ditcast.settings import Settings

PROVIDERS = ["CPUExecutionProvider"]
PROBE = Path(__file__).parent / "probe.onnx"
# Weights that are not packed are multiplied by other kernels, whose last bits differ from those
# of the graph loop, and a quantized trajectory amplifies them: only where packing takes long.
IN_PLACE_BYTES = 1 << 29
# Computes u8 x s8 through u8 x u8 kernels, which do not saturate on CPUs without VNNI. Weights
# of 7 bits cannot saturate, and ONNX Runtime leaves them to the faster kernels.
PRECISE = ("session.x64quantprecision", "1")
# ONNX Runtime has no products of 8-bit floats, but joins their Q/DQ nodes as if they were integers,
# into a graph that does not load. Left apart they are exact, and run in float.
APART = ("session.disable_quant_qdq", "1")
OPTIMIZED = "graph.onnx"
INLINE_BYTES = "1024"  # as in the graphs that export writes


class OnnxRuntimeSession:
    """One graph in an `InferenceSession` on the CPU provider."""

    def __init__(self, graph: GraphFile, path: Path, options: onnxruntime.SessionOptions) -> None:
        """Load `path`: the graph, or what ONNX Runtime made of it before.

        Raises:
            BundleError: ONNX Runtime cannot load it.
        """
        self._graph = graph
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
        except Exception as err:  # ONNX Runtime raises its own, undocumented classes
            raise failure("onnxruntime", graph, "loading", err) from err

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Compute the named outputs."""
        try:
            found = self._session.run(list(outputs), dict(feeds))
        except Exception as err:  # as above
            raise failure("onnxruntime", self._graph, "running", err) from err
        return dict(zip(outputs, found, strict=True))

    def run_into(self, feeds: Arrays, buffers: Arrays) -> None:
        """Compute the outputs that `buffers` names into its arrays, by I/O binding."""
        try:
            binding = self._session.io_binding()
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name, array in buffers.items():
                if not (array.flags.c_contiguous and array.flags.writeable):
                    raise ValueError(f"the buffer for {name} is not contiguous and writeable")
                place = array.__array_interface__["data"][0]
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, place)
            self._session.run_with_iobinding(binding)
        except Exception as err:  # as above
            raise failure("onnxruntime", self._graph, "running", err) from err

    def outputs(self) -> list[str]:
        """The names of all outputs."""
        return [output.name for output in self._session.get_outputs()]

    def end_profiling(self) -> Path:
        """Stop the profiler; returns the file it wrote."""
        return Path(self._session.end_profiling())


def session_options(threads: int, spin: bool) -> onnxruntime.SessionOptions:
    """What every session is opened with."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Inputs of 4-bit weights stay in float; by default they would be rounded, by ranges found on
    # the way, to 8 bits that nobody has calibrated.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def in_place(graph: GraphFile, threads: int) -> OnnxRuntimeSession:
    """A float graph whose weights are read where they lie in the file, without packing them.

    It loads in no time and takes no memory of its own; its threads sleep when it is done.
    """
    options = session_options(threads, spin=False)
    options.add_session_config_entry("session.disable_prepacking", "1")
    return OnnxRuntimeSession(graph, graph.path, options)


class OnnxRuntimeBackend:
    """`Backend` over ONNX Runtime's CPU execution provider."""

    name = "onnxruntime"
    target = "onnxruntime"
    loops: tuple[str, ...] = ("host", "graph")
    memory = HostMemory
    integer_kernels = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv"})

    def __init__(self, settings: Settings) -> None:
        """Find out how this CPU multiplies integers.

        Raises:
            ConfigError: more threads than cores.
            UnsupportedError: integer products are wrong on this CPU in every mode.
        """
        self.threads, self.spin = settings.thread_count(), settings.spin
        self.precise = False
        if not self._multiplies_exactly():
            self.precise = True
            if not self._multiplies_exactly():
                raise UnsupportedError(
                    "backend onnxruntime: u8 x s8 products saturate on this CPU even in the "
                    "precise mode; int8 graphs give wrong images here, use --target reference"
                )
        facts = machine_facts(onnxruntime=onnxruntime.__version__, precise=str(self.precise))
        self._cache = LoadCache(self.name, facts)

    def _options(self, graph: GraphFile | None = None) -> onnxruntime.SessionOptions:
        options = session_options(self.threads, self.spin)
        if self.precise:
            options.add_session_config_entry(*PRECISE)
        if graph is not None and graph.e4m3:
            options.add_session_config_entry(*APART)
        return options

    def _multiplies_exactly(self) -> bool:
        """Whether the largest u8 and s8 codes give the exact product: `tools/make_probe.py`."""
        session = OnnxRuntimeSession(GraphFile(path=PROBE), PROBE, self._options())
        found = session.run({"x": np.full((1, 32, 64), 255, np.float32)}, ["y"])["y"]
        return bool((found == 255 * 127 * 64).all())

    def session(self, graph: GraphFile) -> Session:
        """Load a graph with default optimizations.

        A quantized one is kept as ONNX Runtime optimized it: that takes most of its loading. A
        float graph would only be copied, its weights are mapped from the bundle.
        """
        if graph.once and graph.size > IN_PLACE_BYTES:
            return in_place(graph, self.threads)
        if not graph.identity or not graph.weight_bits:
            return OnnxRuntimeSession(graph, graph.path, self._options(graph))
        label = f"backend onnxruntime: {graph.path.name}"
        kept = self._cache.find(graph.identity, label)
        if kept is not None:
            options = self._options(graph)
            off = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # all of it is in the file
            options.graph_optimization_level = off
            try:
                return OnnxRuntimeSession(graph, kept / OPTIMIZED, options)
            except BundleError as err:
                say(f"{label}: {kept} cannot be read ({err}); compiling it again")
        found: list[Session] = []

        def write(folder: Path) -> None:
            options = self._options(graph)
            options.optimized_model_filepath = str(folder / OPTIMIZED)
            key = "session.optimized_model_external_initializers"
            options.add_session_config_entry(f"{key}_file_name", "weights.data")
            options.add_session_config_entry(f"{key}_min_size_in_bytes", INLINE_BYTES)
            found.append(OnnxRuntimeSession(graph, graph.path, options))

        self._cache.store(graph.identity, label, write)
        return found[0] if found else OnnxRuntimeSession(graph, graph.path, self._options(graph))

    def profile(self, graph: GraphFile, feeds: Arrays, runs: int) -> list[NodeTime]:
        """Median times per executed node; a node of a `Loop` runs many times in one run."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options(graph)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = OnnxRuntimeSession(graph, graph.path, options)
            for _ in range(1 + runs):
                session.run(feeds, session.outputs())
            events = json.loads(session.end_profiling().read_text())
        kernels: dict[str, str] = {}
        times = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                node = event["name"].removesuffix("_kernel_time")
                kernels[node] = event["args"]["op_name"]
                times[node].append(event["dur"] / 1000)
        return [
            NodeTime(node, kernels[node], float(np.median(ms[len(ms) // (1 + runs) :])))
            for node, ms in times.items()
        ]

    def is_integer(self, kernel: str) -> bool:
        """Whether that kernel multiplies integers."""
        return kernel in self.integer_kernels

    def facts(self) -> dict[str, Any]:
        """Version, threads and integer mode."""
        return {
            "backend": self.name,
            "onnxruntime": onnxruntime.__version__,
            "threads": self.threads,
            "spin": self.spin,
            "integer_mode": "u8 x u8 (this CPU saturates u8 x s8)" if self.precise else "u8 x s8",
        }
