"""Integer codes of weights, activations and features against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ditcast.calibrate.codes import (
    WEIGHT_POWER,
    affine,
    e4m3_scale,
    fake_quantize,
    feature_codes,
    grouped,
    to_e4m3,
    weight_codes,
    weight_limits,
    weight_scale,
)
from ditcast.recipe import E4M3_TOP, levels

BITS = (4, 6, 7, 8)
finite = st.floats(-1e4, 1e4, width=32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "limits"), [(4, (-8, 7)), (6, (-31, 31)), (7, (-63, 63)), (8, (-127, 127))]
)
def test_limits_of_weights(bits: int, limits: tuple[int, int]) -> None:
    """Symmetric, so that no kernel saturates; of the 16 codes of 4 bits none is given away."""
    assert weight_limits(bits) == limits
    assert levels(bits) == limits[1]
    far = torch.tensor([[-1e6, 1e6]])
    assert weight_codes(far, torch.ones(1), bits).tolist() == [list(limits)]


@pytest.mark.parametrize("bits", BITS)
def test_weights_take_their_largest_magnitude(bits: int) -> None:
    """Per output channel, and nothing of them is clipped."""
    weight = torch.tensor([[1.0, -2.54], [0.0, 0.5]])
    scale = weight_scale(weight, search=False, bits=bits)
    torch.testing.assert_close(scale, torch.tensor([2.54, 0.5]) / levels(bits))
    codes = weight_codes(weight, scale, bits)
    assert codes[0, 1] == -levels(bits)
    assert codes[1, 1] == levels(bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_search_has_the_least_error(bits: int) -> None:
    """Per channel, mean |w - Q(w)|^2.4 is the least of the 80 shrunk ranges."""
    weight = normal(6, 500) ** 3
    scale = weight_scale(weight, search=True, bits=bits)

    def error(scale: Tensor) -> Tensor:
        restored = weight_codes(weight, scale, bits) * scale[:, None]
        return (weight - restored).abs().pow(WEIGHT_POWER).mean(dim=1)

    largest = weight.abs().amax(dim=1) / levels(bits)
    tried = torch.stack([error(largest * (1 - 0.01 * i)) for i in range(80)])
    torch.testing.assert_close(error(scale), tried.amin(dim=0))
    assert (scale < largest).any()


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("inputs", [16, 32, 48])
def test_groups_are_quantized_by_themselves(search: bool, inputs: int) -> None:
    """16 inputs share a scale; codes are those of each piece alone."""
    weight = normal(5, inputs) * torch.linspace(0.1, 3, inputs)
    scale = weight_scale(weight, search=search, bits=4, group=16)
    assert scale.shape == (5, inputs // 16)
    codes = weight_codes(weight, scale, 4)
    for i, piece in enumerate(weight.split(16, dim=1)):
        alone = weight_scale(piece, search=search, bits=4)
        assert torch.equal(scale[:, i], alone)
        assert torch.equal(
            codes[:, 16 * i : 16 * i + piece.shape[1]], weight_codes(piece, alone, 4)
        )
    one = weight_scale(weight, search=search, bits=4)
    errors = [(weight - weight_codes(weight, s, 4) * grouped(weight, s)) for s in (scale, one)]
    assert errors[0].square().mean() <= (1 if inputs == 16 else 0.8) * errors[1].square().mean()


def test_a_convolution_is_one_row_per_output_channel() -> None:
    """Its inputs are all of a channel's taps."""
    weight = normal(4, 3, 2, 2)
    scale = weight_scale(weight, search=False, bits=8)
    torch.testing.assert_close(scale, weight.abs().amax(dim=(1, 2, 3)) / 127)
    codes = weight_codes(weight, scale, 8)
    assert torch.equal(codes, weight_codes(weight.reshape(4, 12), scale, 8))
    assert (codes * scale[:, None] - weight.reshape(4, 12)).abs().max() <= scale.max() / 2


@given(
    values=st.lists(finite, min_size=1, max_size=20),
    scale=st.floats(1e-3, 10),
    bits=st.sampled_from(BITS),
)
def test_the_nearest_code_is_the_best_within_the_limits(
    values: list[float], scale: float, bits: int
) -> None:
    """No other code has a smaller error."""
    weight = torch.tensor([values], dtype=torch.float64)
    held = torch.tensor([scale], dtype=torch.float64)
    low, high = weight_limits(bits)
    every = torch.arange(low, high + 1)[:, None] * held
    found = weight_codes(weight, held, bits) * held
    best = (every - weight).abs().amin(dim=0)
    torch.testing.assert_close((found - weight).abs()[0], best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("group", [0, 2])
def test_a_dead_channel_is_no_division_by_zero(search: bool, group: int) -> None:
    """A row of zeros gets a scale above zero and codes of zero."""
    scale = weight_scale(torch.zeros(2, 4), search=search, bits=8, group=group)
    assert (scale > 0).all()
    assert (weight_codes(torch.zeros(2, 4), scale, 8) == 0).all()


@given(
    values=st.lists(finite, min_size=1),
    scale=st.floats(1e-3, 10),
    zero=st.integers(-31, 31),
    bits=st.sampled_from(BITS),
)
def test_rounding_stays_on_the_grid(
    values: list[float], scale: float, zero: int, bits: int
) -> None:
    """Codes lie in the signed range; inside it, a value moves by half a step at most."""
    x, step = torch.tensor(values, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    restored = fake_quantize(x, step, float(zero), bits)
    codes = restored / step + zero
    top = levels(bits)
    assert torch.equal((codes.round().clamp(-top - 1, top) - zero) * step, restored)
    inside = (x / scale + zero).abs() <= top
    assert ((restored - x).abs()[inside] <= scale / 2 * (1 + 1e-9)).all()


def test_ties_go_to_the_even_code() -> None:
    """As QuantizeLinear rounds."""
    x = torch.tensor([0.5, 1.5, 2.5, -0.5])
    assert fake_quantize(x, torch.ones(()), 0.0, 8).tolist() == [0, 2, 2, 0]


def test_gradients_pass_rounding_and_end_at_clipping() -> None:
    """Straight through; of the scale as LSQ has it: Q(x)/s - x/s inside, the limit outside."""
    x = torch.tensor([0.3, 1.0, 50.0, -50.0], requires_grad=True)
    scale = torch.tensor(0.25, requires_grad=True)
    fake_quantize(x, scale, 0.0, 4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx((1 - 0.3 / 0.25) + 0 + 7 - 8)


def e4m3_numbers() -> NDArray[np.float64]:
    """All numbers of float8 e4m3 that are not negative, ascending, by their definition.

    4 bits of exponent with bias 7, 3 of mantissa, no infinity; all bits set is NaN.
    """
    exponent, mantissa = (np.arange(127) >> 3).astype(float), np.arange(127) & 7
    normal = 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return np.where(exponent == 0, 2.0**-6 * mantissa / 8, normal)


@given(
    values=st.lists(st.floats(-600, 600, width=32) | st.floats(-0.125, 0.125, width=32), min_size=1)
)
def test_e4m3_is_the_nearest_number(values: list[float]) -> None:
    """Of all of them, by brute force: the nearest, of two the one with an even mantissa."""
    numbers = e4m3_numbers()
    assert numbers[-1] == E4M3_TOP
    x = np.array(values, np.float32)
    distance = np.abs(np.abs(x.astype(np.float64))[:, None] - numbers)
    tied = distance == distance.min(axis=1, keepdims=True)
    even = np.arange(127) % 2 == 0
    chosen = np.argmax(tied * (1 + even), axis=1)
    wanted = np.copysign(numbers[chosen], x)
    np.testing.assert_array_equal(to_e4m3(torch.from_numpy(x)).numpy(), wanted)


def test_e4m3_saturates_and_keeps_nan() -> None:
    """As QuantizeLinear does, where a cast of torch's gives NaN from 465 on."""
    far = torch.tensor([448.0, 464.1, 1e30, -1e30, float("inf"), float("nan")])
    assert to_e4m3(far)[:5].tolist() == [448, 448, 448, -448, 448]
    assert to_e4m3(far)[5].isnan()


def test_e4m3_weights_take_their_largest_magnitude() -> None:
    """Per output channel, whatever the shape; a row of zeros stays zeros."""
    weight = torch.stack([normal(3, 2, 2), torch.zeros(3, 2, 2)])
    scale = e4m3_scale(weight)
    torch.testing.assert_close(scale[0] * 448, weight[0].abs().max())
    codes = to_e4m3(weight.reshape(2, -1) / scale[:, None])
    assert codes[0].abs().max() == 448
    assert (codes[1] == 0).all()


@given(
    low=st.floats(-100, 100, width=32),
    width=st.floats(0, 100, width=32),
    bits=st.sampled_from((6, 8, 16)),
)
def test_affine_ranges_hold_zero_and_both_ends(low: float, width: float, bits: int) -> None:
    """Zero has a code of its own, and both ends lie within half a step of the last codes."""
    ends = torch.tensor([low, low + width])
    scale, zero = affine(ends[0], ends[1], bits)
    top = levels(bits)
    assert zero == zero.round()
    assert -top - 1 <= zero <= top
    restored = fake_quantize(torch.cat([ends, torch.zeros(1)]), scale, zero, bits)
    # A quotient of 16 bits has its own rounding error in float32.
    slack = scale * (0.5 + 2.0**bits * 2**-22) + 1e-11
    assert ((restored[:2] - ends).abs() <= slack).all()
    assert restored[2] == 0


@pytest.mark.parametrize("bits", [6, 8, 16])
def test_features_have_the_best_of_80_ranges(bits: int) -> None:
    """One pair per vector: the least squared error of both ends shrunk together."""
    x = normal(3, 4, 500) ** 3 + 0.5
    codes, scale, zero = feature_codes(x, bits)
    assert codes.shape == x.shape
    assert scale.shape == zero.shape == (3, 4)
    restored = (codes - zero[..., None]) * scale[..., None]
    top = levels(bits)
    assert codes.min() >= -top - 1
    assert codes.max() <= top
    assert torch.equal(codes, codes.round())
    tried = []
    for k in range(80):
        low, high = ((1 - 0.01 * k) * end for end in (x.amin(dim=-1), x.amax(dim=-1)))
        s, z = (t[..., None] for t in affine(low, high, bits))
        tried.append((fake_quantize(x, s, z, bits) - x).square().sum(dim=-1))
    found = (restored - x).square().sum(dim=-1)
    best = torch.stack(tried).amin(dim=0)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=0)
    assert bits > 6 or (best < 0.98 * tried[0]).any()  # with few codes clipping is worth it


@given(values=st.lists(finite, min_size=1, max_size=30))
def test_16_bits_give_features_to_rounding(values: list[float]) -> None:
    """Half a step of 1/65535 of the range, and what float32 loses of codes that long."""
    x = torch.tensor([values])
    codes, scale, zero = feature_codes(x, 16)
    restored = (codes - zero[:, None]) * scale[:, None]
    span = max(0.0, max(values)) - min(0.0, min(values))
    assert (restored - x).abs().max() <= span / 65535 * 0.51 + 1e-7 * span + 1e-11
