"""What a backend gives to the loops: sessions over the graphs of its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


class Session(Protocol):
    """One loaded graph."""

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Compute the named outputs."""
        ...


class Backend(Protocol):
    """A runtime, ready to load graphs.

    `target` is the encoding of the graphs it runs fastest; `integer_kernels` are the operators
    that prove a layer ran in integers.
    """

    name: str
    target: str
    integer_kernels: frozenset[str]

    def session(self, path: Path) -> Session:
        """Load a graph."""
        ...

    def profile(self, path: Path, feeds: Arrays) -> list[tuple[str, str, float]]:
        """Run a graph under the runtime's own profiler: (node name, kernel, ms) per node."""
        ...

    def facts(self) -> dict[str, Any]:
        """Versions and settings for reports."""
        ...
