"""What a backend gives to the loops: sessions over the graphs of its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.errors import BundleError
from ditcast.manifest import WEIGHTS, Layer
from ditcast.recipe import PRECISIONS
from ditcast.runtime.machine import available_memory_mib
from ditcast.sampling import Advance

# Of numpy, or of a `Memory`: with a shape, a length, and parts along the first axis.
Array = Any
Arrays = Mapping[str, Array]
# How runtimes say that an allocation failed; none of them raises MemoryError for its own.
OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate", "out of memory")


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """A graph on disk, and what a backend has to know before it loads it.

    `identity` names the bytes of the graph and its weights; without one, nothing that is
    compiled from it is kept. `weight_bits` is the widest integer weight, 0 for a float graph;
    with `e4m3` there are products of 8-bit floats inside.
    `size` is that of graph and weights in bytes. The weights of a float graph that runs `once`
    per request are better read in place than packed. `bundle` is where its engines are.
    """

    path: Path
    identity: str = ""
    weight_bits: int = 0
    e4m3: bool = False
    size: int = 0
    once: bool = False
    bundle: Bundle | None = None


def graph_file(bundle: Bundle, target: str, name: str) -> GraphFile:
    """A graph of a bundle.

    Raises:
        BundleError: the bundle has no such graph, or it is stale.
    """
    path = bundle.graph(target, name)
    manifest, folder = bundle.manifest, f"graphs/{target}/"
    entries = [manifest.files[f"{folder}{file}"] for file in (path.name, WEIGHTS)]
    inside = layers_of(bundle, target, name)
    bits = max((_integer_bits(layer.precision) for layer in inside), default=0)
    return GraphFile(
        path=path,
        identity=" ".join(entry.sha256 for entry in entries),
        weight_bits=bits,
        e4m3=any(PRECISIONS[layer.precision].e4m3 for layer in inside),
        size=sum(entry.size for entry in entries),
        once=name == "temporal" and not bits,
        bundle=bundle,
    )


def layers_of(bundle: Bundle, target: str, name: str) -> list[Layer]:
    """The quantized layers that a graph holds, as the manifest knows them."""
    manifest = bundle.manifest
    if manifest.quantization is None:
        return []
    graph = next(g for g in manifest.graphs if (g.target, g.name) == (target, name))
    return [layer for layer in manifest.quantization.layers if layer.name in set(graph.layers)]


def _integer_bits(precision: str) -> int:
    """Bits of a weight that is multiplied as an integer; 0 where the product is one of floats."""
    bits = PRECISIONS[precision]
    return bits.weight if bits.activation < 16 and not bits.e4m3 else 0


class NodeTime(NamedTuple):
    """One node of a profiled graph: its name, the kernel that ran it, and its median time."""

    node: str
    kernel: str
    ms: float


class Session(Protocol):
    """One loaded graph."""

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Compute the named outputs, on the host.

        Raises:
            BundleError: the runtime fails, as where memory runs out.
        """
        ...

    def run_into(self, feeds: Arrays, buffers: Arrays) -> None:
        """Compute the outputs that `buffers` names into its contiguous arrays, without copies.

        Arrays of the backend's `Memory` are read and written where they lie. Only where one of the
        host is written into is all of it done at the end; until then, arrays of the host that were
        given have to stay as they are.

        Raises:
            BundleError: as `run`.
        """
        ...


class Memory(Protocol):
    """Where a backend keeps what one step of a request leaves to the next.

    It is open for one request, `with` it: at the end, or where it fails, all arrays are given back.
    What is done to them is done in order.
    """

    def __enter__(self) -> Memory:
        """Begin a request."""
        ...

    def __exit__(self, *why: object) -> None:
        """Give all arrays back."""
        ...

    def array(self, values: NDArray[Any]) -> Array:
        """Values of the host, which stay as they are until something is read back."""
        ...

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Float32 zeros."""
        ...

    def get(self, array: Array) -> NDArray[Any]:
        """The values of an array, for the host to read."""
        ...

    def copy(self, source: Array, into: Array) -> None:
        """Copy values into an array, or a part of one, of their shape."""
        ...

    def add(self, part: Array, older: Array) -> None:
        """Add values to an array, or to a part of one."""
        ...

    def run(self, graph: str, feeds: Arrays, outputs: Sequence[str]) -> dict[str, Array]:
        """Run a graph of the bundle; its outputs stay here.

        Raises:
            BundleError: as `Session.run`, or as the session is opened.
        """
        ...

    def sampler(
        self, advance: Advance, shape: tuple[int, ...]
    ) -> Callable[[int, Array, Array], Array]:
        """What does `advance` here, on samples of a shape.

        What it gives is there until it has been called twice more.

        Raises:
            BundleError: it is done by a graph, which the bundle lacks.
        """
        ...


class HostMemory:
    """`Memory` of backends that compute where the host does: arrays of numpy."""

    def __init__(self, session: Callable[[str], Session]) -> None:
        """`session` opens a graph."""
        self._session = session

    def __enter__(self) -> HostMemory:
        """Nothing has to be taken."""
        return self

    def __exit__(self, *why: object) -> None:
        """Arrays go when nobody holds them."""

    def array(self, values: NDArray[Any]) -> Array:
        """The values themselves."""
        return values

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Float32 zeros."""
        return np.zeros(shape, np.float32)

    def get(self, array: Array) -> NDArray[Any]:
        """The array itself."""
        found: NDArray[Any] = array
        return found

    def copy(self, source: Array, into: Array) -> None:
        """Copy values into an array."""
        into[...] = source

    def add(self, part: Array, older: Array) -> None:
        """Add values to an array."""
        part += older

    def run(self, graph: str, feeds: Arrays, outputs: Sequence[str]) -> dict[str, Array]:
        """Run a graph of the bundle."""
        return self._session(graph).run(feeds, outputs)

    def sampler(
        self, advance: Advance, shape: tuple[int, ...]
    ) -> Callable[[int, Array, Array], Array]:
        """Numpy does it, and gives an array of its own each time."""
        del shape
        return advance


class Backend(Protocol):
    """A runtime, ready to load graphs; `target` is the encoding of the graphs it runs fastest."""

    name: str
    target: str
    loops: tuple[str, ...]  # the control loops it can run

    def session(self, graph: GraphFile) -> Session:
        """Load a graph.

        Raises:
            BundleError: the runtime cannot load it, as where memory runs out.
        """
        ...

    def memory(self, session: Callable[[str], Session]) -> Memory:
        """The memory of one request, whose graphs are opened by `session`."""
        ...

    def profile(self, graph: GraphFile, feeds: Arrays, runs: int) -> list[NodeTime]:
        """Run a graph `runs` times, after one to warm up, under the runtime's own profiler."""
        ...

    def is_integer(self, kernel: str) -> bool:
        """Whether that kernel multiplies integers."""
        ...

    def facts(self) -> dict[str, Any]:
        """Versions and settings for reports."""
        ...


def failure(backend: str, graph: GraphFile, action: str, err: Exception) -> BundleError:
    """What a runtime raised, as one line; where memory ran out, it says what was needed."""
    problem = str(err).strip() or type(err).__name__
    if isinstance(err, MemoryError) or any(sign in problem.lower() for sign in OUT_OF_MEMORY):
        return BundleError(
            f"backend {backend}: out of memory, {action} {graph.path}: its files are "
            f"{graph.size / 2**20:.0f} MiB, and {available_memory_mib():.0f} MiB are available; "
            "use --low-memory, a smaller batch, or a quantized target"
        )
    return BundleError(f"backend {backend}: {action} {graph.path} fails: {problem.splitlines()[0]}")
