"""Error-compensated rounding: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

Columns of a weight are rounded one after the other, and what a column's rounding does to the
output is made up for by those that are still to come. Reconstruction starts from there (recipe
key `init`): in the TIB, whose inputs span few dimensions, seconds of it go further than minutes
of AdaRound from the nearest codes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditcast.calibrate.codes import SMALLEST, grouped, weight_limits
from ditcast.calibrate.qparams import LayerScales

DAMPING = 0.001  # share of the mean diagonal that is added to it; GPTQ's code has 0.01
BLOCK = 128  # columns whose errors reach those behind them at once


def compensated(weight: Tensor, scales: LayerScales, gram: Tensor) -> Tensor:
    """Every weight (O, I) in steps of its scale as it stands when its turn to be rounded comes.

    That of a convolution is (O, C, kh, kw), with the inputs of a window for columns. `gram` (I, I)
    is the sum over inputs of x x^T. The codes are these values to the nearest. Columns go in the
    order of falling diagonal ("act-order" of the GPTQ code).
    """
    step = grouped(weight, scales.weight).double()
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    damping = DAMPING * diagonal.double().mean().clamp(min=SMALLEST)
    damped = gram.double() + damping * torch.eye(len(gram)).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, step = weight.flatten(start_dim=1).double()[:, order], step[:, order]
    limits, turned = weight_limits(scales.bits.weight), torch.empty_like(left)
    for first in range(0, len(gram), BLOCK):
        block = slice(first, min(first + BLOCK, len(gram)))
        errors = torch.empty_like(left[:, block])
        for i in range(block.start, block.stop):
            turned[:, i] = left[:, i] / step[:, i]
            rounded = torch.clamp(torch.round(turned[:, i]), *limits) * step[:, i]
            error = (left[:, i] - rounded) / upper[i, i]
            left[:, i + 1 : block.stop] -= error[:, None] * upper[i, i + 1 : block.stop]
            errors[:, i - first] = error
        left[:, block.stop :] -= errors @ upper[block, block.stop :]
    return turned[:, torch.argsort(order)].float()


@contextlib.contextmanager
def grams(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While active, the sum of x x^T of every layer's inputs, (I, I), is kept.

    Those of a convolution are its windows, one for every pixel of its output.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = _rows(module, args[0].detach())
            found[name] = found.get(name, torch.zeros(())) + rows.T @ rows

        return layers[name].register_forward_pre_hook(hook)

    hooks = [watch(name) for name in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies by its weight, (rows, I)."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(end_dim=-2)
    padding: Any = layer.padding  # a string only where the paddings of both sides may differ
    windows = functional.unfold(
        x, layer.kernel_size, layer.dilation, padding, layer.stride
    )  # (N, C * kh * kw, L)
    return windows.transpose(1, 2).flatten(end_dim=1)
