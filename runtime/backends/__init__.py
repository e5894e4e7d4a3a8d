"""Backends by name. To add one: a file with a `Backend`, and a line in `BACKENDS`."""

from __future__ import annotations

import importlib

from ditcast.errors import ConfigError, MissingDependencyError
from ditcast.runtime.backends.base import (
    Array,
    Backend,
    GraphFile,
    Memory,
    NodeTime,
    Session,
    graph_file,
    layers_of,
)
from ditcast.settings import Settings

# name -> (module, class, extra that brings its packages)
BACKENDS = {
    "onnxruntime": ("ditcast.runtime.backends.onnxruntime", "OnnxRuntimeBackend", ""),
    "openvino": ("ditcast.runtime.backends.openvino", "OpenVinoBackend", "openvino"),
}

# The same; they run engines that were built before, so `auto` has nothing of theirs to measure.
ENGINES = {
    "tensorrt": ("ditcast.runtime.backends.tensorrt_session", "TensorRtBackend", "tensorrt"),
    "tensorrt-rtx": (
        "ditcast.runtime.backends.tensorrt_session",
        "TensorRtRtxBackend",
        "tensorrt-rtx",
    ),
}


def make_backend(name: str, settings: Settings | None = None) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: no such backend, or more threads than cores.
        MissingDependencyError: its package is not installed.
        UnsupportedError: there is no GPU for it, or this CPU's integer products are wrong.
    """
    known = BACKENDS | ENGINES
    if name not in known:
        raise ConfigError(f"backend: unknown {name!r}; expected one of {', '.join(known)}, auto")
    module, kind, extra = known[name]
    try:
        found: Backend = getattr(importlib.import_module(module), kind)(settings or Settings())
    except ImportError as err:
        raise MissingDependencyError(
            f"backend {name!r} cannot be loaded ({err}). "
            f"Install it with: pip install 'ditcast{f'[{extra}]' if extra else ''}'"
        ) from err
    return found


__all__ = [
    "BACKENDS",
    "ENGINES",
    "Array",
    "Backend",
    "GraphFile",
    "Memory",
    "NodeTime",
    "Session",
    "graph_file",
    "layers_of",
    "make_backend",
]
