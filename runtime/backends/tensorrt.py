"""TensorRT and TensorRT for RTX: an engine from a graph of target `tensorrt`.

Every engine is built in a process of its own: both libraries keep the first logger that they are
given, and a builder that runs out of memory ends its process. They sort by address, so that two
plans of one graph are the same bytes only where memory is handed out alike: without randomization
of addresses, from the heap of a fresh thread, which has none of the holes that the environment and
Python's hash seed leave in the first, and on one processor, as the threads that they start take
memory in another order where they run beside each other: with three times more work than
processors 6 of 80 plans differed. On one processor 2 of 441 did, and one of about 290 where a
thread that wakes does not interrupt another either: other processes still can. TensorRT for RTX
needs no GPU to build; TensorRT does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ditcast.errors import ConfigError, MissingDependencyError, UnsupportedError
from ditcast.progress import say
from ditcast.runtime.backends.base import GraphFile
from ditcast.runtime.backends.enginelog import LAYERS, weights_bytes
from ditcast.runtime.backends.gpu import find_gpu
from ditcast.runtime.backends.refusals import WRONG_BLOCKS, explain, refused

Range = tuple[int, int, int]  # min, opt and max of a dimension
Profile = Mapping[str, Mapping[int, Range]]  # of every dynamic axis of every input
FLAGS = ("strongly-typed", "no-tf32")
NO_FLOAT32 = "7.5"  # TensorRT for RTX has no such products there, and every bundle has some
SAY_EVERY_S = 10.0
NO_RANDOM_ADDRESSES = 0x0040000  # of personality(2)


class Library(NamedTuple):
    """One of the two: its module, the extra that brings it, and what its package is called."""

    module: str
    extra: str
    package: str


LIBRARIES = {
    "tensorrt": Library("tensorrt", "tensorrt", "tensorrt-cu13"),
    "tensorrt-rtx": Library("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx-cu13"),
}


class Engine(NamedTuple):
    """What a build gives; `listing` is what the library says of its layers."""

    plan: bytes
    listing: str
    weights_bytes: int
    build_s: float


class EngineBuilder:
    """One library, for certain devices."""

    def __init__(self, name: str, capabilities: tuple[str, ...] = ()) -> None:
        """Check at once, before long work, that it can build here.

        `capabilities` are compute capabilities such as 8.9, for TensorRT for RTX only; without
        them an engine is for the GPU of this machine.

        Raises:
            ConfigError: no such library, or a device that it does not build for.
            MissingDependencyError: its package is not installed.
            UnsupportedError: it needs a GPU, and there is none.
        """
        if name not in LIBRARIES:
            raise ConfigError(
                f"backend: {name!r} builds no engines; expected one of {', '.join(LIBRARIES)}"
            )
        self.name, self.library = name, LIBRARIES[name]
        gpu = find_gpu()
        if name == "tensorrt":
            if capabilities:
                raise ConfigError(
                    "compute-capability: TensorRT builds for the GPU of this machine only; leave "
                    "it away, or use --backend tensorrt-rtx"
                )
            if gpu is None:
                raise UnsupportedError(no_gpu(name, "build an engine"))
        elif not capabilities and gpu is None:
            raise ConfigError(
                "compute-capability: got none, and this machine has no NVIDIA GPU; say for which "
                "to build: --compute-capability 8.9 12.0"
            )
        self._module = load(name)
        self.version = str(self._module.__version__)
        self.capabilities = capabilities or (() if gpu is None else (gpu.capability,))
        if name == "tensorrt-rtx":
            self._check_capabilities()
        self.device = "+".join(f"sm{c.replace('.', '')}" for c in self.capabilities)

    def _check_capabilities(self) -> None:
        members = self._module.ComputeCapability.__members__
        known = [f"{m[2:-1]}.{m[-1]}" for m in members if m.startswith("SM")]
        known.remove(NO_FLOAT32)
        for i, capability in enumerate(self.capabilities):
            if capability not in known:
                raise ConfigError(
                    f"compute-capability: got {capability}, expected one or more of "
                    f"{', '.join(known)}; TensorRT for RTX builds these graphs for no other GPU, "
                    "use --backend tensorrt on that machine"
                )
            if capability in self.capabilities[:i]:
                raise ConfigError(f"compute-capability: got {capability} twice, expected it once")

    def build(self, graph: GraphFile, profile: Profile, *, decompose: bool = False) -> Engine:
        """Build a graph in a process of its own; `decompose` takes attention in float32 apart.

        Raises:
            UnsupportedError: the library refuses it: the node, its operator, the reason, and what
                to do.
        """
        with tempfile.TemporaryDirectory(prefix="ditcast-build-") as temporary:
            folder = Path(temporary)
            job = {
                "name": self.name,
                "path": str(graph.path.resolve()),
                "capabilities": self.capabilities,
                "decompose": decompose,
                "profile": {x: {str(a): r for a, r in axes.items()} for x, axes in profile.items()},
            }
            (folder / "job.json").write_text(json.dumps(job))
            # With -P, no file of the current directory takes the place of a module.
            command = [sys.executable, "-P", "-m", __spec__.name, str(folder)]
            done = subprocess.run(command, check=False, preexec_fn=_keep_order)
            if not (folder / "result.json").is_file():
                raise UnsupportedError(
                    f"backend {self.name}: the process that built {graph.path} ended with code "
                    f"{done.returncode}; out of memory, if it was killed (-9): use a smaller batch"
                )
            result = json.loads((folder / "result.json").read_text())
            if "error" in result:
                raise UnsupportedError(f"backend {self.name}: {graph.path}: {result['error']}")
            plan = (folder / "engine.plan").read_bytes()
        return Engine(plan, result["listing"], result["weights_bytes"], result["build_s"])


def no_gpu(name: str, action: str) -> str:
    """The one line for a machine without a GPU."""
    return (
        f"backend {name}: needs an NVIDIA GPU to {action}, and no driver or device was found here; "
        "use a machine that has one, or build for one with: ditcast build BUNDLE --backend "
        "tensorrt-rtx --compute-capability 8.9"
    )


def load(name: str) -> Any:
    """The module of a library.

    Raises:
        MissingDependencyError: its package is not installed, or lacks its libraries.
    """
    library = LIBRARIES[name]
    try:
        return importlib.import_module(library.module)
    except (ImportError, OSError) as err:
        raise MissingDependencyError(
            f"backend {name!r}: package {library.package} is needed and cannot be loaded "
            f"({str(err).splitlines()[0]}). Install it with: pip install 'ditcast[{library.extra}]'"
        ) from err


def _keep_order() -> None:
    """In the new process, before it starts Python; where it is not allowed, plans may differ."""
    ctypes.CDLL(None).personality(NO_RANDOM_ADDRESSES)
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[os.getpid() % len(allowed)]})
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a thread that wakes waits


def _logger(trt: Any, messages: list[tuple[int, str]]) -> Any:
    """A logger that keeps what is read later."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            number = int(severity)
            if number <= int(trt.ILogger.ERROR) or message.startswith((LAYERS, "Total Weights")):
                messages.append((number, message))

    return Logger()


def _monitor(trt: Any, name: str) -> Any:
    """Progress of a build in plain lines: it takes from a second to many minutes."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.started = self.shown = time.monotonic()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            del parent
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            now = time.monotonic()
            if now - self.shown >= SAY_EVERY_S:
                self.shown = now
                count = f"{step + 1} of {self.steps.get(phase, 0)}"
                say(f"building {name}: {phase}, {count}, {now - self.started:.0f} s")
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _network(trt: Any, builder: Any, logger: Any, path: str) -> tuple[Any, Any]:
    """The parsed network and its parser, which has to live as long."""
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise UnsupportedError(refused(errors))
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.DEQUANTIZE:
            weight, scale = layer.get_input(0), layer.get_input(1)
            if weight.dtype == trt.DataType.INT8 and sum(n > 1 for n in scale.shape) > 1:
                raise UnsupportedError(f"node {layer.name} (DequantizeLinear): {WRONG_BLOCKS}")
    return network, parser


def _decompose(trt: Any, network: Any) -> None:
    """Let attention run as products and softmax: in float32 it has no kernel of its own."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _configure(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt, Path(job["path"]).name)
    config.clear_flag(trt.BuilderFlag.TF32)  # what the graph has in float32 stays so
    if job["name"] == "tensorrt-rtx":
        config.num_compute_capabilities = len(job["capabilities"])
        for i, capability in enumerate(job["capabilities"]):
            member = trt.ComputeCapability.__members__[f"SM{capability.replace('.', '')}"]
            if not config.set_compute_capability(member, i):
                raise UnsupportedError(f"compute capability {capability} is refused")
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        axes = job["profile"].get(tensor.name, {})
        if -1 not in tensor.shape:
            continue
        shapes = [
            [axes[str(axis)][k] if n == -1 else n for axis, n in enumerate(tensor.shape)]
            for k in range(3)
        ]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    return config


def build_here(job: dict[str, Any], plan: Path) -> dict[str, Any]:
    """Build in this process, write the plan, and return what the log said.

    Raises:
        UnsupportedError: the library refuses the graph.
    """
    trt = load(job["name"])
    messages: list[tuple[int, str]] = []
    logger = _logger(trt, messages)
    builder = trt.Builder(logger)
    builder.max_threads = 1  # the default, but 5 of 70 plans differed where it was not set
    started = time.perf_counter()
    network, parser = _network(trt, builder, logger, job["path"])
    if job["decompose"]:  # no loop over layers without need: it moves memory, and so the plan
        _decompose(trt, network)
    serialized = builder.build_serialized_network(network, _configure(trt, builder, network, job))
    texts = [text for _, text in messages]
    if serialized is None:
        errors = [text for number, text in messages if number <= int(trt.ILogger.ERROR)]
        raise UnsupportedError(explain(errors[-1] if errors else "the builder gave no reason"))
    del parser
    plan.write_bytes(serialized)
    listed = [text for text in texts if text.startswith(LAYERS)]
    return {
        "listing": listed[-1] if listed else _inspect(trt, logger, plan),
        "weights_bytes": weights_bytes(texts),
        "build_s": round(time.perf_counter() - started, 3),
    }


def _inspect(trt: Any, logger: Any, plan: Path) -> str:
    """The layers by the library's own inspector, where its log does not list them: with a GPU."""
    if find_gpu() is None:
        return ""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan.read_bytes())
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))


def main(folder: Path) -> None:
    """Do the job in a folder: `job.json` becomes `engine.plan` and `result.json`."""
    job = json.loads((folder / "job.json").read_text())
    path = Path(job["path"])
    os.chdir(path.parent)  # its length would be that of an allocation
    job["path"] = path.name
    load(job["name"])
    try:
        with ThreadPoolExecutor(1) as fresh:
            result = fresh.submit(build_here, job, folder / "engine.plan").result()
    except UnsupportedError as err:
        result = {"error": str(err)}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
