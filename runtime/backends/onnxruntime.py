"""ONNX Runtime on the CPU (MLAS kernels)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ditcast.errors import BundleError, ConfigError, UnsupportedError
from ditcast.runtime.backends.base import Arrays, Session
from ditcast.runtime.machine import cores

PROVIDERS = ["CPUExecutionProvider"]
PROBE = Path(__file__).parent / "probe.onnx"
# Computes u8 x s8 through u8 x u8 kernels, which do not saturate on CPUs without VNNI.
PRECISE = ("session.x64quantprecision", "1")


class OnnxRuntimeSession:
    """One graph in an `InferenceSession`; refuses to run anywhere but on the CPU provider."""

    def __init__(self, path: Path, options: onnxruntime.SessionOptions) -> None:
        """Load the graph.

        Raises:
            BundleError: ONNX Runtime cannot load it.
        """
        self._path = path
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
        except Exception as err:  # ONNX Runtime raises its own, undocumented classes
            problem = str(err).strip().splitlines()[0]
            raise BundleError(f"backend onnxruntime: cannot load {path}: {problem}") from err

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Compute the named outputs."""
        try:
            found = self._session.run(list(outputs), dict(feeds))
        except Exception as err:  # as above
            problem = str(err).strip().splitlines()[0]
            raise BundleError(f"backend onnxruntime: {self._path} fails: {problem}") from err
        return dict(zip(outputs, found, strict=True))

    def end_profiling(self) -> Path:
        """Stop the profiler; returns the file it wrote."""
        return Path(self._session.end_profiling())


class OnnxRuntimeBackend:
    """`Backend` over ONNX Runtime's CPU execution provider."""

    name = "onnxruntime"
    target = "onnxruntime"
    integer_kernels = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv"})

    def __init__(self, threads: int = 0) -> None:
        """Use `threads` threads, 0 for one per core; finds out how this CPU multiplies integers.

        Raises:
            ConfigError: more threads than cores, or fewer than none.
            UnsupportedError: integer products are wrong on this CPU in every mode.
        """
        if not 0 <= threads <= cores():
            raise ConfigError(
                f"threads: got {threads}, expected 1 to {cores()}, or 0 for one per core"
            )
        self.threads = threads or cores()
        self.precise = False
        if not self._multiplies_exactly():
            self.precise = True
            if not self._multiplies_exactly():
                raise UnsupportedError(
                    "backend onnxruntime: u8 x s8 products saturate on this CPU even in the "
                    "precise mode; int8 graphs give wrong images here, use --target reference"
                )

    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        if self.precise:
            options.add_session_config_entry(*PRECISE)
        return options

    def _multiplies_exactly(self) -> bool:
        """Whether the largest u8 and s8 codes give the exact product: `tools/make_probe.py`."""
        session = OnnxRuntimeSession(PROBE, self._options())
        found = session.run({"x": np.full((1, 32, 64), 255, np.float32)}, ["y"])["y"]
        return bool((found == 255 * 127 * 64).all())

    def session(self, path: Path) -> Session:
        """Load a graph with default optimizations."""
        return OnnxRuntimeSession(path, self._options())

    def profile(self, path: Path, feeds: Arrays) -> list[tuple[str, str, float]]:
        """Run once to warm up and once measured; (node name, operator, ms) per executed node."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = OnnxRuntimeSession(path, options)
            outputs = [output.name for output in session._session.get_outputs()]
            for _ in range(2):
                session.run(feeds, outputs)
            events = json.loads(session.end_profiling().read_text())
        kernels: dict[str, tuple[str, float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                node = event["name"].removesuffix("_kernel_time")
                kernels[node] = (event["args"]["op_name"], event["dur"] / 1000)  # the last run's
        return [(node, kernel, ms) for node, (kernel, ms) in kernels.items()]

    def facts(self) -> dict[str, Any]:
        """Version, threads and integer mode."""
        return {
            "backend": self.name,
            "onnxruntime": onnxruntime.__version__,
            "threads": self.threads,
            "integer_mode": "u8 x u8 (this CPU saturates u8 x s8)" if self.precise else "u8 x s8",
        }
