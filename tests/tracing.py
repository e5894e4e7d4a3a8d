"""Tracing is what takes long in an export: the suite traces equal modules once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.simulate import QuantizedFeatures

Trace = Callable[..., Any]


def remembering(trace: Trace) -> Trace:
    """`trace`, but equal modules with inputs of equal shapes give the graph of the first one.

    The stage copies what it writes to.
    """
    known: dict[str, Any] = {}

    def remembered(module: Any, arguments: Any, **options: Any) -> Any:
        if not _is_plain(module):
            return trace(module, arguments, **options)
        key = _identity(module, arguments, options)
        if key not in known:
            known[key] = trace(module, arguments, **options)
        return known[key]

    return remembered


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
