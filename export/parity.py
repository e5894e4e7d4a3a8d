"""Does an exported graph compute what the model computes? Measured at every export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditcast.errors import ParityError
from ditcast.runtime.backends import GraphFile, make_backend

FLOAT_LIMIT = 1e-4  # largest difference of a float graph, as a share of the output's range
# The same where float products and attention are in half precision, whose last bits flip codes of
# the layer behind them: more of them, but never as many as quantization itself changes.
HALF_LIMIT = 1e-2
HALF_QUANTIZED_LIMIT = 1.0
# Given the same input, a quantized layer flips a few codes of its simulation at most: it has to
# be closer to it than this share of what quantization itself changes, or its scales are others.
QUANTIZED_LIMIT = 0.5
# Each flip moves all later inputs a little, so that deep networks drift as far from their
# simulation as quantization moved them: after many layers only this can be asked, or where even
# that is too much (untrained U-Nets at their first steps), that runtime and simulation are no
# further apart than two independent roundings of the same network.
DRIFT_LIMIT_DB = 40.0
CHAOS_LIMIT = 2**0.5

Tensors = Mapping[str, torch.Tensor]


def measure(
    graph: GraphFile,
    feeds: Tensors,
    expected: Tensors,
    unquantized: Tensors | None = None,
    whole: Callable[[], Tensors] | None = None,
    *,
    half: bool = False,
) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
    """Run a graph on `feeds`; returns its differences to torch's outputs, and its outputs.

    For a quantized graph `expected` is the simulation, and `unquantized` holds, of the float
    model, those outputs that lie behind the first quantized layers only. `whole` gives all of its
    outputs, where they lie behind many. With `half`, float products are in half precision.

    Raises:
        ParityError: the difference is over the limit.
    """
    session = make_backend("onnxruntime").session(graph)
    found = session.run({k: v.numpy() for k, v in feeds.items()}, list(expected))
    wanted = {name: tensor.numpy() for name, tensor in expected.items()}
    # `np.max` keeps a NaN wherever it comes; `max` would lose it behind a number.
    largest = np.max([np.abs(found[n] - wanted[n]).max() / _span(wanted[n]) for n in wanted])
    rms = np.max([_rms(found[n], wanted[n]) for n in wanted])
    quietest = -20 * np.log10(np.maximum(rms, 1e-12))
    most = HALF_LIMIT if half else FLOAT_LIMIT
    parity = {
        "max_abs_of_range": float(f"{largest:.3e}"),
        "psnr_db": round(float(quietest), 2),
    }
    if unquantized is None:
        _check(graph, largest <= most, f"{largest:.1e}", f"at most {most} of the range")
        return parity, found
    if quietest < DRIFT_LIMIT_DB and whole is not None:
        exact = whole()
        share = np.max([_share(found[n], wanted[n], exact[n]) for n in wanted])
        parity["share_of_quantization_error"] = float(f"{share:.3e}")
        got = f"{quietest:.1f} dB, {share:.2f} of the quantization error"
        limit = f"at least {DRIFT_LIMIT_DB} dB, or at most {CHAOS_LIMIT:.2f} of it"
        _check(graph, share <= CHAOS_LIMIT, got, limit)
        return parity, found
    _check(graph, quietest >= DRIFT_LIMIT_DB, f"{quietest:.1f} dB", f"at least {DRIFT_LIMIT_DB} dB")
    for name, tensor in unquantized.items():
        if np.array_equal(tensor.numpy(), wanted[name]):  # all layers before it stay in float
            difference = np.abs(found[name] - wanted[name]).max() / _span(wanted[name])
            limit = f"at most {most} of the range of {name}, before which nothing is quantized"
            _check(graph, difference <= most, f"{difference:.1e}", limit)
            continue
        share = _share(found[name], wanted[name], tensor)
        parity["share_of_quantization_error"] = float(f"{share:.3e}")
        allowed = HALF_QUANTIZED_LIMIT if half else QUANTIZED_LIMIT
        limit = f"at most {allowed} of the quantization error"
        _check(graph, share <= allowed, f"{share:.1e}", limit)
    return parity, found


def _check(graph: GraphFile, passed: bool, got: str, expected: str) -> None:
    """Raise the one message of this module; a comparison with NaN has not passed."""
    if not passed:
        raise ParityError(
            f"export: {graph.path.name} differs from torch: got {got}, expected {expected}; "
            "nothing was written to the bundle"
        )


def _span(wanted: NDArray[Any]) -> float:
    return float(np.ptp(wanted)) or 1.0


def _share(found: NDArray[Any], wanted: NDArray[Any], exact: torch.Tensor) -> float:
    """The difference to the simulation as a share of what quantization changes."""
    return _rms(found, wanted) / max(_rms(exact.numpy(), wanted), 1e-12)


def _rms(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Root mean square difference as a share of the range; NaN where there is one."""
    error = found.astype(np.float64) - wanted
    return float(np.sqrt(np.square(error).mean()) / _span(wanted))
