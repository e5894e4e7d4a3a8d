"""Tracing is what takes long in an export: the suite traces equal modules once."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch

from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.simulate import QuantizedFeatures

Trace = Callable[..., Any]


def remembering(trace: Trace, folder: Path) -> Trace:
    """`trace`, but equal modules with inputs of equal shapes give the graph of the first one.

    The processes that share `folder` share their graphs, and wait for one that another traces.
    """

    def remembered(module: Any, arguments: Any, **options: Any) -> gs.Graph:
        if not _is_plain(module):
            return trace(module, arguments, **options)
        path = folder / f"{_identity(module, arguments, options)}.onnx"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _save(trace(module, arguments, **options), path)
        return gs.import_onnx(onnx.load(path))

    return remembered


def _save(graph: gs.Graph, path: Path) -> None:
    """All at once, with its large constants, which it had not while it was imported."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.data_location = None
    part = path.with_suffix(".part")
    onnx.save(gs.export_onnx(graph), part)
    part.rename(path)


def _identity(module: torch.nn.Module, arguments: Any, options: dict[str, Any]) -> str:
    """Equal for modules whose graphs differ at most in the weights that are quantized later."""
    shapes = [tuple(x.shape) for x in arguments]
    structure: list[Any] = [options["inputs"], options["outputs"], shapes]
    for name, layer in module.named_modules():
        structure += [name, type(layer).__qualname__, _settings(layer)]
        if isinstance(layer, QuantizedLayer):
            scale = None if layer.scale is None else layer.scale.tolist()
            clipped = scale if layer.bits < 8 else None  # its limits are in the graph
            structure += [scale is None, clipped, layer.rows is not None, layer.folded]
    digest = hashlib.sha256(repr(structure).encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _settings(layer: torch.nn.Module) -> list[Any]:
    """What a module is set to, such as its number of heads or the kind of its GELU."""
    plain = (bool, int, float, str, tuple)
    return sorted((k, v) for k, v in vars(layer).items() if k[0] != "_" and isinstance(v, plain))


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether these are no temporal features with something of calibration inside."""
    if not isinstance(module, QuantizedFeatures):
        return True
    held = module.qparams
    inside = any(name.startswith("temporal.") or s.stepwise for name, s in held.layers.items())
    return not (inside or held.balance or held.stored)
