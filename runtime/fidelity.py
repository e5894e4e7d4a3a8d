"""How close samples are to their pairs, in figures that no bad picture passes.

PSNR alone is kind to blur, and to black pictures of dark scenes; so contrast and detail are
measured too, each relative to the pair's, and pictures that are plainly broken are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ditcast.runtime import images

FLAT = 0.2  # a picture with less of its pair's contrast is flat: black, white or grey
BLURRED, NOISY = 0.5, 2.0  # detail relative to the pair's, below and above
TINY = 1e-4  # contrast and detail that no 8-bit picture shows
DISTANCES = ("fd_to_fp", "kd_to_fp", "fd_to_real", "kd_to_real")
BASIS = ("extractor", "pca_dimensions", "real_sha256")  # of distances that can be compared

Samples = NDArray[np.float32]
Figures = NDArray[np.float64]
Intervals = dict[str, dict[str, float]]  # of each distance: value, low, high


class Distances(Protocol):
    """What measures sets of pictures: `ditcast.distances.Distances`, which needs torch."""

    def describe(self) -> dict[str, Any]:
        """What the figures stand on, as plain values; it has the keys of `BASIS`."""

    def features(self, images: Samples) -> Any:
        """What the other methods compare, of images (n, 3, H, W) in [0, 1]."""

    def judge(self, made: Any, full: Any, labels: Sequence[int]) -> Intervals:
        """All of `DISTANCES`, of the features of a set and of its pairs in full precision."""

    def to_real(self, made: Any, labels: Sequence[int]) -> Intervals:
        """Those to real pictures alone."""


def figures(made: Samples, wanted: Samples) -> dict[str, Any]:
    """PSNR, SSIM, contrast and detail over paired samples (n, C, H, W), and what is broken."""
    made, wanted = comparable(made, wanted)
    similarity = images.ssim(made, wanted)
    contrast = _relative(_contrast(made), _contrast(wanted))
    detail = _relative(_detail(made), _detail(wanted))
    flat = contrast < FLAT
    return {
        "psnr_db": spread(images.psnr_db(made, wanted)),
        "ssim": None if similarity is None else spread(similarity),
        "contrast": spread(contrast),
        "detail": spread(detail),
        "broken": {
            "flat": int(flat.sum()),
            "blurred": int((~flat & (detail < BLURRED)).sum()),
            "noisy": int((~flat & (detail > NOISY)).sum()),
        },
    }


def judged(
    sets: Sequence[Samples], labels: Sequence[int], distances: Distances | None
) -> list[dict[str, Any]]:
    """All of `DISTANCES` of sets of samples (n, 3, H, W), of which the first is full precision's.

    None where they are not measured: without `distances`, and from full precision to itself.
    """
    if distances is None:
        return [dict.fromkeys(DISTANCES) for _ in sets]
    full, *made = (distances.features(images.to_unit(samples)) for samples in sets)
    found = [dict.fromkeys(DISTANCES) | distances.to_real(full, labels)]
    return found + [distances.judge(features, full, labels) for features in made]


def unpaired(wanted: Samples) -> dict[str, float] | None:
    """PSNR of full precision's samples to one another; None of a single one.

    A variant whose samples are no closer than this to their pairs shows something else.
    """
    if len(wanted) < 2:
        return None
    wanted, others = comparable(wanted, np.roll(wanted, 1, axis=0))
    return spread(images.psnr_db(wanted, others))


def interaction(wanted: Samples, quantized: Samples, cached: Samples, both: Samples) -> Figures:
    """How many dB both together are above what the errors of each alone add up to, (n,).

    Errors that have nothing to do with each other add up in their squares: 0 dB.
    """
    errors = []
    for made in (quantized, cached, both):
        found, pair = comparable(made, wanted)
        errors.append(10 ** (-images.psnr_db(found, pair) / 10))
    result: Figures = 10 * np.log10((errors[0] + errors[1]) / errors[2])
    return result


def comparable(made: Samples, wanted: Samples) -> tuple[Samples, Samples]:
    """Pictures in [0, 1]; latents scaled by the pairs' own range, so that PSNR keeps its sense."""
    if made.shape[1] == 3:
        return images.to_unit(made), images.to_unit(wanted)
    low, span = wanted.min(), np.ptp(wanted)
    return (made - low) / span, (wanted - low) / span


def spread(values: Any) -> dict[str, float] | None:
    """10th percentile, median, 90th percentile; None of nothing."""
    if len(values) == 0:
        return None
    found = np.percentile(np.asarray(values, np.float64), (10, 50, 90))
    return dict(zip(("p10", "p50", "p90"), (float(f"{v:.5g}") for v in found), strict=True))


def _contrast(samples: Samples) -> Figures:
    """Standard deviation around each channel's mean, per sample."""
    found: Figures = samples.astype(np.float64).std(axis=(2, 3)).mean(axis=1)
    return found


def _detail(samples: Samples) -> Figures:
    """Root mean square of the Laplacian of each sample."""
    x = samples.astype(np.float64)
    inner = x[..., 1:-1, 1:-1]
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    found: Figures = np.sqrt(np.square(around - 4 * inner).mean(axis=(1, 2, 3)))
    return found


def _relative(made: Figures, wanted: Figures) -> Figures:
    """The ratio, which is one where there is nothing in either."""
    return (made + TINY) / (wanted + TINY)
