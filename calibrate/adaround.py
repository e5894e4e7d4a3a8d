"""Block-wise reconstruction: AdaRound (Nagel et al. 2020, arXiv 2004.10568) over units.

A unit is anything with quantized layers inside and one output: a Linear, a Conv2d, a whole
transformer block (BRECQ, Li et al. 2021, arXiv 2102.05426), or the TIB (TFMQ-DM's TIAR).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ditcast.calibrate.codes import grouped, weight_limits
from ditcast.calibrate.gptq import compensated
from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.qparams import LayerScales
from ditcast.models.base import Layer

GAMMA, ZETA = -0.1, 1.1  # stretch of the sigmoid, so that it reaches 0 and 1
REGULARIZER = 0.01  # weight of the sum that drives every rounding to 0 or 1
BETA = (20.0, 2.0)  # its exponent, falling linearly from the end of the warm-up
LEAN = 0.3  # from 1/2, of roundings that start at decisions (0.45 was measured to be worse)
WARM_UP = 0.2  # share of the iterations without it
RATE = 1e-3  # learning rate of the papers, for their 20000 iterations
PAPER_ITERATIONS = 20_000
LARGEST_RATE = 3e-2  # measured: beyond it, roundings swing


class Rounding(nn.Module):
    """The learned rounding of one weight: `floor(w / s) + r(v)`, r in [0, 1]."""

    def __init__(self, layer: Layer, scales: LayerScales, start: Tensor | None = None) -> None:
        """Start where r(v) is the fractional part of w / s: at the weight itself.

        Or from `start` (O, I), weights in steps of their scale that compensate each other's
        rounding (GPTQ). They do so only once they are rounded, so that r(v) leans to that code.
        """
        super().__init__()
        weight = layer.weight.data
        self.shape, self.limits = weight.shape, weight_limits(scales.bits.weight)
        self.step = grouped(weight, scales.weight)
        steps = weight.reshape(len(weight), -1) / self.step if start is None else start
        self.floor = torch.floor(steps)
        up = steps - self.floor
        if start is not None:
            up = 0.5 + torch.where(up < 0.5, -LEAN, LEAN)
        self.v = nn.Parameter(torch.logit((up - GAMMA) / (ZETA - GAMMA)))

    def up(self) -> Tensor:
        """r(v), (O, I)."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def soft(self) -> Tensor:
        """The weight with its rounding undecided."""
        codes = torch.clamp(self.floor + self.up(), *self.limits)
        return (codes * self.step).view(self.shape)

    def hard(self) -> Tensor:
        """The codes decided on, (O, I) int8."""
        return torch.clamp(self.floor + (self.v.data >= 0), *self.limits).to(torch.int8)

    def regularizer(self, beta: float) -> Tensor:
        """The sum over weights of 1 - |2 r - 1|^beta."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()


def start(
    layers: Mapping[str, Layer], scales: Mapping[str, LayerScales], grams: Mapping[str, Tensor]
) -> dict[str, Rounding]:
    """Where the roundings of some layers start: from GPTQ where there is a gram matrix."""
    found = {}
    for name, held in scales.items():
        weight = layers[name].weight.data
        steps = compensated(weight, held, grams[name]) if name in grams else None
        found[name] = Rounding(layers[name], held, steps)
    return found


def reconstruct(
    forward: Callable[[Tensor], Tensor],
    targets: Tensor,
    layers: Mapping[str, QuantizedLayer],
    roundings: Mapping[str, Rounding],
    scales: Mapping[str, nn.Parameter],
    *,
    iterations: int,
    batch: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> float:
    """Learn roundings, and the logarithms of activation scales, of one unit.

    `forward(rows)` gives the unit's output for some of its inputs, `targets[rows]` what full
    precision gave. Loss: squared error summed over channels, mean over the rest (TFMQ-DM code).
    `scales` are those that are read by the layers through their exponentials; each is learned
    with the gradient of LSQ (Esser et al. 2020, arXiv 1902.08153). Returns the last loss.
    """
    for name, rounding in roundings.items():
        layers[name].weight = rounding.soft
    # Fewer iterations go as far with larger steps.
    rate = min(RATE * PAPER_ITERATIONS / max(iterations, 1), LARGEST_RATE)
    groups = [
        {"params": [r.v for r in roundings.values()], "lr": rate},
        {"params": list(scales.values()), "lr": rate / 10},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
    generator = torch.Generator().manual_seed(seed)
    warm_up, value = WARM_UP * iterations, 0.0
    channels = 1 if targets.dim() == 4 else -1  # of images; elsewhere they come last
    for i in range(iterations):
        rows = torch.randint(len(targets), (batch,), generator=generator)
        with torch.enable_grad():
            error = (forward(rows) - targets[rows]).square().sum(dim=channels).mean()
            loss = error
            if i >= warm_up:
                done = (i - warm_up) / max(iterations - warm_up, 1)
                beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - done)
                loss = loss + REGULARIZER * sum(r.regularizer(beta) for r in roundings.values())
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        value = float(error.detach())
        advance()
    return value
