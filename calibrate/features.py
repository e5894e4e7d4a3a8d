"""Temporal features as codes: cache-based maintenance and disturbance-aware selection.

Temporal Feature Matters (Huang et al. 2024, arXiv 2407.19547): the features of full precision
are stored with one scale and zero point per vector; per (step, part), the quantized TIB is used
where its error is smaller. A block of a DiT takes six vectors where the paper's U-Net takes one:
a pair for each of them, instead of one for all six, was measured to make a third less error.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ditcast.calibrate.codes import feature_codes
from ditcast.calibrate.qparams import QParams, StoredFeatures
from ditcast.calibrate.simulate import quantized
from ditcast.errors import ConfigError
from ditcast.models import Adapter, LoadedModel
from ditcast.models.base import count, vector_slices
from ditcast.recipe import TEMPORAL, Recipe
from ditcast.sampling import with_null

BYTES = {8: 1, 6: 1, 16: 2}  # of a code


def check_store(model: LoadedModel, recipe: Recipe) -> list[int]:
    """The labels whose features are stored, or equal to those, null last if there is one.

    Raises:
        ConfigError: a label that the model has not, or a store larger than the TIB in float,
            which it is there to replace.
    """
    adapter = model.adapter
    classes = adapter.num_classes
    for label in recipe.labels:
        if not 0 <= label < classes:
            raise ConfigError(f"labels: got {label}, expected 0 to {classes - 1}")
    by_label, asked = adapter.temporal.by_label, recipe.labels or range(classes)
    labels = with_null(sorted(set(asked if by_label else range(classes))), adapter.null_label)
    sets = len(_stored(adapter, labels))
    nulls = 1 if adapter.null_label is not None and by_label else 0
    each = recipe.steps * adapter.parts[-1].columns.stop * BYTES[recipe.feature_bits()]
    limit, null_counts = 4 * count(adapter.temporal), " (null is one)" * nulls
    if adapter.temporal.shared is not None:
        limit -= 4 * count(adapter.temporal.shared)  # which stays
    if each * sets > limit:
        raise ConfigError(
            f"labels: the features of {recipe.steps} steps and {sets} labels{null_counts} "
            f"take {each * sets / 2**20:.1f} MiB, expected at most the "
            f"{limit / 2**20:.1f} MiB of the modules that make them; store at most "
            f"{max(limit // each - nulls, 0)} labels with --labels, or use --temporal tib"
        )
    return labels


def _stored(adapter: Adapter, labels: list[int]) -> list[int]:
    """Those of the labels that have features of their own."""
    return labels if adapter.temporal.by_label else labels[:1]


@torch.no_grad()
def store(adapter: Adapter, timesteps: Tensor, labels: list[int], bits: int) -> StoredFeatures:
    """The codes of the parts' own features (T, L, ...), each vector with its own best scale."""
    held = torch.tensor(_stored(adapter, labels))
    kind = torch.int16 if bits == 16 else torch.int8
    codes, scales, zeros = [], [], []
    for t in timesteps:
        features = adapter.temporal.own(t[None], held)[0]
        found = [feature_codes(features[:, c], bits) for c in vector_slices(adapter.parts)]
        codes.append(torch.cat([vector[0] for vector in found], dim=-1).to(kind))
        scales.append(torch.stack([vector[1] for vector in found], dim=-1))
        zeros.append(torch.stack([vector[2] for vector in found], dim=-1))
    return StoredFeatures(
        timesteps=timesteps,
        labels=held,
        codes=torch.stack(codes),
        scale=torch.stack(scales),
        zero_point=torch.stack(zeros),
    )


@torch.no_grad()
def errors(adapter: Adapter, qparams: QParams, stored: StoredFeatures) -> Tensor:
    """Squared error (T, P) of the features of `qparams`, summed over the stored labels."""
    wanted = [adapter.temporal.own(t[None], stored.labels)[0] for t in stored.timesteps]
    alone = replace(
        qparams,
        balance={},
        layers={n: s for n, s in qparams.layers.items() if n.startswith(TEMPORAL)},
    )
    rows = []
    with quantized(adapter, alone):
        for t, target in zip(stored.timesteps, wanted, strict=True):
            error = (adapter.temporal.own(t[None], stored.labels)[0] - target).square()
            rows.append(torch.stack([error[:, p.columns].sum() for p in adapter.parts]))
    return torch.stack(rows)


def choose(adapter: Adapter, qparams: QParams, stored: StoredFeatures) -> StoredFeatures:
    """Disturbance-aware selection: the TIB where its error is the smaller one (tau < 1)."""
    module = errors(adapter, qparams, stored)
    cache = errors(adapter, QParams(stored=stored), stored)
    chosen = module < cache
    return replace(stored, module=chosen) if bool(chosen.any()) else stored
