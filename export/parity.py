"""Does an exported graph compute what the model computes? Measured at every export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditcast.errors import ParityError
from ditcast.runtime.backends import make_backend

FLOAT_LIMIT = 1e-4  # largest difference of a float graph, as a share of the output's range
# A quantized graph flips a few codes of its simulation. It has to be closer to the simulation
# than this share of what quantization itself changes, or its scales are others.
QUANTIZED_LIMIT = 0.5

Tensors = Mapping[str, torch.Tensor]


def measure(
    path: Path, feeds: Tensors, expected: Tensors, unquantized: Tensors | None = None
) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
    """Run a graph on `feeds`; returns its differences to torch's outputs, and its outputs.

    For a quantized graph `expected` is the simulation and `unquantized` the float model.

    Raises:
        ParityError: the difference is over the limit.
    """
    session = make_backend("onnxruntime").session(path)
    found = session.run({k: v.numpy() for k, v in feeds.items()}, list(expected))
    wanted = {name: tensor.numpy() for name, tensor in expected.items()}
    # `np.max` keeps a NaN wherever it comes; `max` would lose it behind a number.
    largest = np.max([np.abs(found[n] - wanted[n]).max() / _span(wanted[n]) for n in wanted])
    rms = np.max([_rms(found[n], wanted[n]) for n in wanted])
    parity = {
        "max_abs_of_range": float(f"{largest:.3e}"),
        "psnr_db": round(float(-20 * np.log10(max(rms, 1e-12))), 2),
    }
    limit, got = FLOAT_LIMIT, float(largest)
    if unquantized is not None:
        change = max(_rms(unquantized[n].numpy(), wanted[n]) for n in wanted)
        limit, got = QUANTIZED_LIMIT, float(rms / max(change, 1e-12))
        parity["share_of_quantization_error"] = float(f"{got:.3e}")
    if not got <= limit:  # NaN fails too
        unit = "of the range" if unquantized is None else "of the quantization error"
        raise ParityError(
            f"export: {path.name} differs from torch: got {got:.1e} {unit}, "
            f"expected at most {limit:.1e}; nothing was written to the bundle"
        )
    return parity, found


def _span(wanted: NDArray[Any]) -> float:
    return float(np.ptp(wanted)) or 1.0


def _rms(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Root mean square difference as a share of the range; NaN where there is one."""
    error = found.astype(np.float64) - wanted
    return float(np.sqrt(np.square(error).mean()) / _span(wanted))
