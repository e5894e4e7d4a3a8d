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
QUANTIZED_LIMIT_DB = 40.0  # a flipped code moves the whole output a little


def measure(
    path: Path,
    feeds: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    quantized: bool,
) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
    """Run the graph on `feeds`; returns its differences to torch's outputs, and its outputs.

    Raises:
        ParityError: the difference is over the limit.
    """
    session = make_backend("onnxruntime").session(path)
    found = session.run({k: v.numpy() for k, v in feeds.items()}, list(expected))
    errors, loudness = [], []
    for name, tensor in expected.items():
        wanted, got = tensor.numpy().astype(np.float64), found[name]
        span = float(np.ptp(wanted)) or 1.0
        error = np.abs(got - wanted)
        errors.append(error.max() / span)
        loudness.append(-20 * np.log10(np.maximum(np.sqrt((error**2).mean()) / span, 1e-12)))
    worst, quietest = float(np.max(errors)), float(np.min(loudness))  # NaN if any of them is
    parity = {"max_abs_of_range": float(f"{worst:.3e}"), "psnr_db": round(quietest, 2)}
    if not (quietest >= QUANTIZED_LIMIT_DB if quantized else worst <= FLOAT_LIMIT):
        expectation = f"at least {QUANTIZED_LIMIT_DB} dB" if quantized else f"at most {FLOAT_LIMIT}"
        raise ParityError(
            f"export: {path.name} differs from torch: got {worst:.1e} of the range and "
            f"{quietest:.1f} dB, expected {expectation}; nothing was written to the bundle"
        )
    return parity, found
