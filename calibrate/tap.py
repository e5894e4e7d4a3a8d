"""Temporal-aware parallel clustering: the TAP of Q&C (arXiv 2503.02508).

Under a cache, consecutive inputs are near-duplicates, and uniform draws cover little. Random
subsets of the pool are clustered by an affinity of content and time, and the calibration set is
drawn from all clusters in turn.

The paper leaves open, and this is what is done here: content is the cosine of flattened inputs as
they are, cut at 0, since an affinity is not negative ((1 + cos) / 2, `shifted`, was measured to
part duplicates less from the rest); time is the number of the sampler's step; the
clusters of every subset are strata of their own, none is merged; a subset has a twentieth of the
pool, as in the paper, but no less than all subsets need to hold the set that is asked for.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ditcast.errors import optional

SUBSETS, SHARE, CLUSTERS, ALPHA = 3, 20, 100, 0.5  # the paper's settings


def select(
    inputs: Tensor,
    steps: Tensor,
    count: int,
    *,
    seed: int,
    alpha: float = ALPHA,
    shifted: bool = False,
    centered: bool = False,
) -> Tensor:
    """Numbers of `count` of the M inputs (M, ...) with their steps (M,), ascending.

    The last three are those of `cluster`.
    """
    how: dict[str, Any] = {"alpha": alpha, "shifted": shifted, "centered": centered}
    total = len(inputs)
    if count >= total:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed)
    size = min(total, max(total // SHARE, math.ceil(2 * count / SUBSETS)))
    strata: list[list[int]] = []
    for i in range(SUBSETS):
        subset = torch.randperm(total, generator=generator)[:size]
        clusters = max(1, min(CLUSTERS, size // 2))
        of = cluster(inputs[subset], steps[subset], clusters, seed=seed + i, **how)
        strata += [subset[of == label].tolist() for label in of.unique()]
    drawn: dict[int, None] = {}  # in the order of the draw, each once
    rank = 0
    while len(drawn) < count:
        left = [stratum[rank] for stratum in strata if rank < len(stratum)]
        drawn.update(dict.fromkeys(left[: count - len(drawn)]))
        rank += 1
        if not left:  # the subsets overlap: the rest comes from outside of them
            rest = [
                i for i in torch.randperm(total, generator=generator).tolist() if i not in drawn
            ]
            drawn.update(dict.fromkeys(rest[: count - len(drawn)]))
    return torch.tensor(sorted(drawn))


def cluster(
    inputs: Tensor,
    steps: Tensor,
    clusters: int,
    *,
    seed: int,
    alpha: float = ALPHA,
    shifted: bool = False,
    centered: bool = False,
) -> Tensor:
    """The cluster (M,) of each input, by spectral clustering of an affinity.

    It is `alpha * max(cos(x_k, x_h), 0) + (1 - alpha) * exp(-|t_k - t_h|)`; `shifted` has
    `(1 + cos) / 2` in place of the cut, and `centered` takes each input's mean from it before.

    Raises:
        MissingDependencyError: no scikit-learn.
    """
    spectral = optional("sklearn.cluster", "compile").SpectralClustering
    flat = inputs.flatten(start_dim=1).double()
    if centered:
        flat = flat - flat.mean(dim=1, keepdim=True)
    flat = functional.normalize(flat, dim=1)
    cosine = flat @ flat.T
    content = ((1 + cosine) / 2 if shifted else cosine).clamp(0, 1)
    time = torch.exp(-(steps[:, None] - steps[None]).abs().double())
    affinity = alpha * content + (1 - alpha) * time
    with warnings.catch_warnings(action="ignore"):  # of fewer distinct inputs than clusters
        method = spectral(clusters, affinity="precomputed", random_state=seed, n_init=1)
        found = method.fit_predict(affinity.numpy())
    return torch.from_numpy(found)
