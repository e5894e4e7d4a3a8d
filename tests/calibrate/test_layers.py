"""The quantized layer against hand computation and against plain fake quantization."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ditcast.calibrate.codes import fake_quantize, grouped, weight_codes, weight_scale
from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.qparams import LayerScales
from ditcast.models.base import Layer
from ditcast.recipe import Bits

W8A8 = Bits(8, 8)


def linear(weight: list[list[float]], bias: list[float] | None) -> nn.Linear:
    """A Linear of given numbers."""
    found = nn.Linear(len(weight[0]), len(weight), bias=bias is not None).requires_grad_(False)
    found.weight.copy_(torch.tensor(weight))
    if bias is not None:
        found.bias.copy_(torch.tensor(bias))
    return found


def test_a_linear_computes_with_codes() -> None:
    """By hand: x = 0.6 has code 2 of scale 0.25, weights 0.32 and -1.0 code 3 and -10 of 0.1."""
    layer = linear([[0.32], [-1.0]], [1.0, 2.0])
    scales = LayerScales(bits=W8A8, weight=torch.tensor([0.1, 0.1]), activation=torch.tensor(0.25))
    found = QuantizedLayer(layer, scales)(torch.tensor([[0.6]]))
    torch.testing.assert_close(found, torch.tensor([[0.5 * 0.3 + 1, 0.5 * -1.0 + 2]]))
    torch.testing.assert_close(layer.weight, torch.tensor([[0.32], [-1.0]]))  # it stays


def test_a_linear_without_a_bias() -> None:
    scales = LayerScales(bits=W8A8, weight=torch.tensor([0.1]), activation=torch.tensor(0.25))
    found = QuantizedLayer(linear([[0.32]], None), scales)(torch.tensor([[[0.6]], [[-0.1]]]))
    torch.testing.assert_close(found, torch.tensor([[[0.15]], [[0.0]]]))


def test_learned_roundings_and_groups() -> None:
    """Weights 0.34 of scale 0.1 as 4 and 0.36 as 3; -1.0 clipped at -8 of 0.1."""
    layer = linear([[0.34, 0.36, -1.0, 0.5]], [0.0])
    codes = torch.tensor([[4, 3, -8, 6]], dtype=torch.int8)
    scales = LayerScales(bits=Bits(4, 16), weight=torch.tensor([[0.1, 0.1]]), codes=codes)
    found = QuantizedLayer(layer, scales)(torch.eye(4))
    torch.testing.assert_close(found, torch.tensor([[0.4], [0.3], [-0.8], [0.6]]))
    wider = replace(scales, weight=torch.tensor([[0.1, 0.2]]), codes=None)
    found = QuantizedLayer(layer, wider)(torch.eye(4))
    torch.testing.assert_close(found, torch.tensor([[0.3], [0.4], [-1.0], [0.4]]))


def test_an_input_in_float_stays_so() -> None:
    """W4A16: with no scale, only the weight is rounded."""
    layer = nn.Linear(8, 4)
    scales = LayerScales(
        bits=Bits(4, 16), weight=weight_scale(layer.weight.data, search=False, bits=4)
    )
    x = torch.randn(3, 5, 8)
    codes = weight_codes(layer.weight.data, scales.weight, 4)
    restored = codes * grouped(layer.weight.data, scales.weight)
    found = QuantizedLayer(layer, scales)(x)
    torch.testing.assert_close(found, functional.linear(x, restored, layer.bias))


@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}, {"bias": False}]
)
def test_a_convolution(geometry: dict[str, Any]) -> None:
    """Like the torch layer with rounded weight and input, whatever its geometry."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, **geometry)
    weight = weight_scale(layer.weight.data, search=False, bits=8)
    scales = LayerScales(bits=W8A8, weight=weight, activation=torch.tensor(0.05))
    x = torch.randn(2, 4, 9, 9)
    found = QuantizedLayer(layer, scales)(x)
    by_hand = nn.Conv2d(4, 6, 3, **geometry)
    by_hand.load_state_dict(layer.state_dict())
    rounded = torch.round(layer.weight.data / weight[:, None, None, None])
    by_hand.weight.data = rounded * weight[:, None, None, None]
    torch.testing.assert_close(found, by_hand(fake_quantize(x, torch.tensor(0.05), 0.0, 8)))
    assert (found - layer(x)).abs().max() > 1e-3  # and not like the layer itself


@pytest.mark.parametrize("stepwise", [False, True])
def test_8_bit_floats(stepwise: bool) -> None:
    """By hand: 330 and 17 lose what lies behind the third bit after the first, 4000 is clipped.

    With a scale per step the input is divided by it before, and the product multiplied after.
    """
    bits, scale = Bits(8, 8, e4m3=True), torch.tensor(0.25)
    layer = linear([[3.3, -0.02]], [1.0])
    rows = (lambda: (scale.expand(1), None)) if stepwise else None
    held = LayerScales(
        bits=bits, weight=torch.tensor([0.01]), activation=scale[None] if stepwise else scale
    )
    found = QuantizedLayer(layer, held, rows)(torch.tensor([[17 * 0.25, 1000.0]]))
    torch.testing.assert_close(found, torch.tensor([[16 * 0.25 * 3.2 - 448 * 0.25 * 0.02 + 1]]))
    simulated = QuantizedLayer(layer, held, rows)
    simulated.exact = True
    exact = simulated(torch.tensor([[17 * 0.25, 1000.0]]))
    torch.testing.assert_close(exact, torch.tensor([[17 * 0.25 * 3.2 - 20 + 1]]))


def test_other_padding_is_refused() -> None:
    """Reflected borders are no argument of the functional convolution."""
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    scales = LayerScales(bits=W8A8, weight=torch.ones(1), activation=torch.ones(()))
    with pytest.raises(ValueError, match="padding_mode 'reflect'"):
        QuantizedLayer(layer, scales)


def stepwise(bits: int, asymmetric: bool) -> tuple[nn.Linear, LayerScales, Tensor]:
    """A Linear with three bins, and the bins of the four rows at hand."""
    torch.manual_seed(1)
    layer = nn.Linear(8, 5)
    top = 2 ** (bits - 1) - 1
    scales = LayerScales(
        bits=Bits(8, bits),
        weight=weight_scale(layer.weight.data, search=False, bits=8),
        activation=torch.tensor([1.5, 2.0, 4.0]) / top,
        zero_point=torch.tensor([-9.0, 0.0, 4.0]) if asymmetric else None,
    )
    return layer, scales, torch.tensor([2, 0, 1, 0])


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 8)])
def test_every_row_has_the_scale_of_its_bin(
    bits: int, asymmetric: bool, shape: tuple[int, ...]
) -> None:
    """One integer product with constant scales, yet as if each row were quantized by itself."""
    layer, scales, bins = stepwise(bits, asymmetric)
    assert scales.activation is not None
    scale, zero = scales.activation[bins], None
    if scales.zero_point is not None:
        zero = scales.zero_point[bins]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2
    restored = weight_codes(layer.weight.data, scales.weight, 8) * scales.weight[:, None]
    wanted = [
        functional.linear(
            fake_quantize(row, scale[i], 0.0 if zero is None else zero[i], bits),
            restored,
            layer.bias,
        )
        for i, row in enumerate(x)
    ]
    found = QuantizedLayer(layer, scales, lambda: (scale, zero))(x)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=2e-5)
    alone = replace(scales, activation=scales.activation[0], zero_point=None)
    assert (QuantizedLayer(layer, alone)(x) - found).abs().max() > 0.01  # bins do matter


def test_a_folded_division_is_not_repeated() -> None:
    """What made the input has divided it by the row's scale already."""
    layer, scales, bins = stepwise(8, asymmetric=False)
    assert scales.activation is not None
    scale = scales.activation[bins]
    x = torch.randn(4, 8)
    plain = QuantizedLayer(layer, scales, lambda: (scale, None))(x)
    folded = QuantizedLayer(layer, scales, lambda: (scale, None), folded=True)
    torch.testing.assert_close(folded(x / scale[:, None]), plain)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_exact_layers_round_no_input(asymmetric: bool) -> None:
    """As export traces them: the weight is rounded, Q/DQ nodes come later."""
    layer, scales, bins = stepwise(8, asymmetric)
    assert scales.activation is not None
    scale, zero = scales.activation[bins], None
    if scales.zero_point is not None:
        zero = scales.zero_point[bins]
    x = torch.randn(4, 8) * 5
    restored = weight_codes(layer.weight.data, scales.weight, 8) * scales.weight[:, None]
    wanted = functional.linear(x, restored, layer.bias)
    exact = QuantizedLayer(layer, scales, lambda: (scale, zero))
    exact.exact = True
    torch.testing.assert_close(exact(x), wanted, rtol=0, atol=1e-4)
    whole = QuantizedLayer(layer, replace(scales, activation=scale[0], zero_point=None))
    whole.exact = True
    torch.testing.assert_close(whole(x), wanted)


@pytest.mark.parametrize("stepwise_", [False, True])
def test_exact_layers_of_few_bits_clip(stepwise_: bool) -> None:
    """QuantizeLinear knows 8 bits only: -32 and 31 steps are the ends of 6 bits in any graph."""
    layer = linear([[1.0]], [0.0])
    scale = torch.tensor(0.5)
    scales = LayerScales(bits=Bits(8, 6), weight=torch.ones(1), activation=scale)
    rows = scale.expand(4)
    found = QuantizedLayer(layer, scales, (lambda: (rows, None)) if stepwise_ else None)
    found.exact = True
    x = torch.tensor([[-100.0], [0.3], [7.1], [100.0]])
    torch.testing.assert_close(found(x), torch.tensor([[-16.0], [0.3], [7.1], [15.5]]))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_weights_can_be_trained(kind: type[Layer]) -> None:
    """Reconstruction puts its own weight and scale in, and gradients reach both."""
    layer = nn.Linear(4, 2) if kind is nn.Linear else nn.Conv2d(4, 2, 1)
    scales = LayerScales(bits=W8A8, weight=torch.ones(2), activation=torch.tensor(1.0))
    found = QuantizedLayer(layer, scales)
    trained = nn.Parameter(torch.randn_like(layer.weight))
    step = nn.Parameter(torch.tensor([0.3, 0.2]))
    found.weight = lambda: trained
    found.rows, found.scale = lambda: (step, None), step
    found(torch.randn(2, 4) if kind is nn.Linear else torch.randn(2, 4, 3, 3)).sum().backward()
    for parameter in (trained, step):
        assert parameter.grad is not None
        assert (parameter.grad != 0).any()
