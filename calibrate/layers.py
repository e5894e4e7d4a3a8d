"""The quantized layer: what reconstruction trains, simulation runs, and export traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditcast.calibrate.codes import fake_quantize, grouped, to_e4m3
from ditcast.calibrate.qparams import LayerScales
from ditcast.models.base import Layer
from ditcast.recipe import levels

Rows = Callable[[], tuple[Tensor, Tensor | None]]  # scale and zero point of every row at hand


class QuantizedLayer(nn.Module):
    """A Linear or Conv2d with a quantized weight and, unless its scale is None, input.

    A layer with one scale per step, given by `rows`, divides its input by the row's scale,
    rounds to integers, multiplies, and scales the rows of the product: what one integer MatMul
    with constant scales can do (design.md 3.1). Where the division is `folded` into the temporal
    features, the input comes divided.

    With `exact` set inputs are not rounded: so export traces it, and adds the Q/DQ nodes around
    the product afterwards. `weight`, `rows` and `scale` are replaced while they are learned.
    """

    def __init__(
        self, layer: Layer, scales: LayerScales, rows: Rows | None = None, folded: bool = False
    ) -> None:
        """Round the weight of `layer`, which stays as it is."""
        super().__init__()
        weight = layer.weight.data
        codes = scales.weight_codes(weight)
        restored = (codes * grouped(weight, scales.weight)).view_as(weight)
        self.bits, self.rows, self.folded = scales.bits.activation, rows, folded
        self.e4m3 = scales.bits.e4m3
        self.weight: Callable[[], Tensor] = lambda: restored
        self.scale = scales.activation
        self.bias = layer.bias
        self.multiply = _multiplication(layer)
        self.exact = False

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it stands for."""
        if self.scale is None:
            return self._add_bias(self.multiply(x, self.weight()))
        if self.rows is None:
            return self._add_bias(self.multiply(self._round(x, self.scale), self.weight()))
        scale, zero = (None if t is None else _per_row(t, x) for t in self.rows())
        assert scale is not None
        steps = x if self.folded else x / scale
        if zero is None:
            product = self.multiply(self._round(steps, 1.0), self.weight())
            return self._add_bias(product * scale)
        # The kernel's codes hold the zero point, so that it has to leave the product again.
        product = self.multiply(self._round(steps + zero, 1.0), self.weight())
        surplus = zero * self.weight().sum(dim=1)
        return self._add_bias((product - surplus) * scale)

    def _round(self, x: Tensor, scale: Tensor | float) -> Tensor:
        if not self.exact and self.e4m3:
            return to_e4m3(x / scale) * scale
        if not self.exact:
            return fake_quantize(x, scale, 0.0, self.bits)
        if self.bits == 8:
            return x
        top = levels(self.bits)  # QuantizeLinear clips to 8 bits only
        return torch.clamp(x, (-top - 1) * float(scale), top * float(scale))

    def _add_bias(self, product: Tensor) -> Tensor:
        """Apart from the product, so that even a matrix becomes MatMul and Add, and no Gemm."""
        if self.bias is None:
            return product
        return product + self.bias.reshape(-1, *[1] * (product.dim() - 2 if self._conv else 0))

    @property
    def _conv(self) -> bool:
        return self.multiply is not _linear


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight)


def _multiplication(layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of an input and a weight."""
    if isinstance(layer, nn.Linear):
        return _linear
    if layer.padding_mode != "zeros":
        raise ValueError(f"padding_mode {layer.padding_mode!r}")
    geometry: dict[str, Any] = {
        key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")
    }

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(x, weight, **geometry)

    return convolve


def _per_row(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.dim() - 1))
