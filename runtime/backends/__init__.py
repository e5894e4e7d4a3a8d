"""Backends by name. To add one: a file with a `Backend`, and a line in `BACKENDS`."""

from __future__ import annotations

import importlib

from ditcast.errors import ConfigError, MissingDependencyError
from ditcast.runtime.backends.base import (
    Backend,
    GraphFile,
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


def make_backend(name: str, settings: Settings | None = None) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: no such backend.
        MissingDependencyError: its package is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend: unknown {name!r}; expected one of {', '.join(BACKENDS)}, auto")
    module, kind, extra = BACKENDS[name]
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
    "Backend",
    "GraphFile",
    "NodeTime",
    "Session",
    "graph_file",
    "layers_of",
    "make_backend",
]
