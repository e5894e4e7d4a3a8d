"""Channel balancing: quantization difficulty moved between activations and weights.

The input of a layer is multiplied by factors per channel, its weight divided by them. The
factors cost nothing at run time: those of modulated layers are folded into the temporal
features, those of the attention's output Linear into the rows of qkv that make the values.
The MLP's second Linear, behind the GELU, cannot be balanced that way and is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditcast.calibrate.codes import SMALLEST
from ditcast.models import Adapter
from ditcast.models.base import Layer

SMOOTH = 0.5  # SmoothQuant's alpha


def balanced_layers(adapter: Adapter) -> list[str]:
    """The layers whose factors can be folded, in network order."""
    foldable = adapter.modulated().keys() | adapter.chained().keys()
    return [name for name in adapter.layers() if name in foldable]


def ptq4dit(activation: Tensor, weight: Tensor) -> Tensor:
    """PTQ4DiT (Wu et al. 2024, arXiv 2405.16005): salience a (T, I), w (I,) -> factors (I,).

    a is averaged over steps with the weights softmax(-rho_t), rho_t being Spearman's
    correlation of a_t with w: steps count whose salience complements the weights' (SSC). Both
    sides end at the geometric mean, x * sqrt(a w) / a (CSB).
    """
    correlation = torch.stack([_spearman(a, weight) for a in activation])
    share = torch.softmax(-correlation, dim=0).to(activation.dtype)
    salience = (share[:, None] * activation).sum(dim=0)
    return (salience * weight).sqrt() / salience


def smooth(activation: Tensor, weight: Tensor) -> Tensor:
    """SmoothQuant (Xiao et al. 2022, arXiv 2211.10438), eq. 4: w^(1 - alpha) / a^alpha."""
    largest = activation.amax(dim=0)
    return weight ** (1 - SMOOTH) / largest**SMOOTH


# name -> (largest inputs (T, I), largest weights (I,)) -> factors (I,)
BALANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"smooth": smooth, "ptq4dit": ptq4dit}


def factors(kind: str, linear: Layer, activation: Tensor) -> Tensor:
    """Factors (I,) float32 of a Linear whose input channels reach `activation` (T, I)."""
    weight = linear.weight.data.abs().amax(dim=0).clamp(min=SMALLEST)
    return BALANCES[kind](activation.clamp(min=SMALLEST), weight)


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of two vectors; 0 where one of them is constant."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    centered = ranks - ranks.mean(dim=1, keepdim=True)
    scale = centered.square().sum(dim=1).prod().sqrt()
    product = (centered[0] * centered[1]).sum()
    return torch.where(scale > 0, product / scale.clamp(min=SMALLEST), torch.zeros_like(product))


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0, equal values sharing their mean."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    found: Tensor = (counts.cumsum(0).double() - 1 - (counts - 1) / 2)[inverse]
    return found
