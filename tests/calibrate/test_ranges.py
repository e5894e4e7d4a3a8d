"""Range estimators against brute force over all values at once."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditcast.calibrate.codes import fake_quantize
from ditcast.calibrate.methods import METHODS
from ditcast.calibrate.ranges import BINS, CHANNELS, INPUTS, OBSERVERS, State, observe_histogram
from ditcast.recipe import Method

LEVELS = 127  # the largest code of 8 bits
# Sizes of successive tensors: the histogram starts at the first one's and doubles from there.
growing = st.lists(st.sampled_from([0.01, 0.3, 1.0, 2.5, 40.0]), min_size=1, max_size=5)


def tensors(sizes: list[float], seed: int = 0) -> list[Tensor]:
    """One normal tensor per size, off centre so that both signs differ."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(40, 25, generator=generator) + 0.4) * size for size in sizes]


def watch(method: str, values: list[Tensor], per_batch: int = 1) -> State:
    """The state of an observer after all values, in mini-batches of `per_batch` tensors."""
    observer, state = OBSERVERS[method], State()
    for i, x in enumerate(values):
        state = observer.observe(state, x)
        if (i + 1) % per_batch == 0:
            state = observer.end_batch(state)
    return state


def bound(
    method: str, values: list[Tensor], percentile: float = 99.99, levels: int = LEVELS
) -> float:
    """What an observer says of all values."""
    return OBSERVERS[method].bound(watch(method, values), percentile, levels)


def squared_error(values: list[Tensor], largest: float, levels: int = LEVELS) -> float:
    """Mean squared error of rounding all values with that range."""
    x = torch.cat([value.flatten() for value in values]).double()
    scale = torch.tensor(largest / levels, dtype=torch.float64)
    bits = levels.bit_length() + 1
    return float(((fake_quantize(x, scale, 0.0, bits) - x) ** 2).mean())


@given(sizes=growing)
@settings(deadline=None, max_examples=30)
def test_absmax_is_the_largest_magnitude(sizes: list[float]) -> None:
    """Over all tensors, in any order and any pieces."""
    values = tensors(sizes)
    assert bound("absmax", values) == float(torch.cat(values).abs().max())
    assert bound("absmax", values[::-1]) == bound("absmax", [torch.cat(values)])


def test_minmax_moves_once_per_batch() -> None:
    """Momentum 0.95 over the extremes of each mini-batch of two tensors, from the first on."""
    values = tensors([1.0, 3.0, 0.1, 0.2, 9.0, 1.0])
    pairs = [torch.cat(values[i : i + 2]) for i in (0, 2, 4)]
    low, high = float(pairs[0].min()), float(pairs[0].max())
    for pair in pairs[1:]:
        low = 0.95 * low + 0.05 * float(pair.min())
        high = 0.95 * high + 0.05 * float(pair.max())
    found = OBSERVERS["minmax"].bound(watch("minmax", values, per_batch=2), 0, LEVELS)
    assert found == pytest.approx(max(-low, high), rel=1e-9)


def test_minmax_takes_the_larger_side() -> None:
    """A symmetric range has to hold the negative side too."""
    assert bound("minmax", [torch.tensor([-4.0, 1.0])]) == 4
    assert bound("minmax", [torch.tensor([-1.0, 3.0])]) == 3


@given(sizes=growing)
@settings(deadline=None, max_examples=30)
def test_the_histogram_loses_no_value_when_it_widens(sizes: list[float]) -> None:
    """Piece by piece, the counts are those of one histogram of the final width.

    But for the largest value of a piece: it counts below its bin's edge, not above.
    """
    values = tensors(sizes)
    state = State()
    for x in values:
        state = observe_histogram(state, x)
    whole = torch.cat(values).abs()
    assert float(state["counts"].sum()) == whole.numel()
    assert float(state["width"]) >= float(whole.max())
    wanted = torch.histc(whole, BINS, 0, float(state["width"])).double()
    assert (state["counts"].cumsum(0) - wanted.cumsum(0)).abs().max() <= len(sizes)


@given(sizes=growing, percentile=st.floats(51, 100))
@settings(deadline=None, max_examples=40)
def test_percentile_is_that_of_the_sorted_magnitudes(sizes: list[float], percentile: float) -> None:
    """Within one bin above the exact one, and never below it."""
    values = tensors(sizes)
    found = bound("percentile", values, percentile)
    magnitudes = torch.cat(values).abs().numpy()
    exact = float(np.percentile(magnitudes, percentile, method="inverted_cdf"))
    bin_width = float(watch("percentile", values)["width"]) / BINS
    assert exact * (1 - 1e-6) <= found <= exact + bin_width * 1.001


def test_percentile_cuts_outliers() -> None:
    """One value in 10001 is above the 99.9th percentile."""
    values = [torch.cat([torch.linspace(0, 1, 10_000), torch.tensor([50.0])])]
    assert bound("percentile", values, 99.9) == pytest.approx(1, abs=50 / BINS)
    assert bound("percentile", values, 100) == 50


@given(sizes=growing, outlier=st.floats(1, 30))
@settings(deadline=None, max_examples=20)
def test_mse_is_the_best_of_its_candidates(sizes: list[float], outlier: float) -> None:
    """No worse than absmax, and as good as trying all 80 ranges on the values themselves."""
    values = [*tensors(sizes), torch.tensor([max(sizes) * outlier])]
    found, largest = bound("mse", values), bound("absmax", values)
    assert found <= largest * (1 + 2 / BINS)  # the range ends at a bin's edge
    assert squared_error(values, found) <= squared_error(values, largest) * 1.01
    best = min(squared_error(values, largest * (1 - 0.01 * i)) for i in range(80))
    assert squared_error(values, found) <= best * 1.05  # bins are counted at their centres


@pytest.mark.parametrize("levels", [127, 255])
def test_mse_shrinks_the_range_of_an_outlier(levels: int) -> None:
    """One value of 30 among N normal ones: N (b/127)^2 / 12 + (30 - b)^2 is least at b = 14.7.

    With more levels it shrinks less; 255 of them are no activation's, but the same sum.
    """
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    values = [normal, torch.tensor([30.0])]
    found = bound("mse", values, levels=levels)
    assert found == pytest.approx(30 / (1 + 200_000 / (12 * levels**2)), rel=0.02)
    assert squared_error(values, found, levels) < 0.85 * squared_error(values, 30, levels)


@pytest.mark.parametrize(("levels", "step"), [(31, 0.1041), (127, 0.03076)])
def test_mse_of_normal_values_is_that_of_the_books(levels: int, step: float) -> None:
    """Max (1960): the best steps for unit variance and 64 or 256 codes; here one is missing."""
    values = [torch.randn(200_000, generator=torch.Generator().manual_seed(0))]
    assert bound("mse", values, levels=levels) == pytest.approx(levels * step, rel=0.03)


@pytest.mark.parametrize("method", OBSERVERS)
def test_states_are_bounded_float64_tensors(method: str) -> None:
    """They are written down after every batch: no value is kept, none loses digits."""
    state = watch(method, tensors([1.0, 2.0, 3.0]))
    assert {tensor.dtype for tensor in state.values()} == {torch.float64}
    assert sum(tensor.numel() for tensor in state.values()) <= BINS + 1


@pytest.mark.parametrize("method", OBSERVERS)
def test_states_can_be_taken_up_again(method: str) -> None:
    """Copied between two tensors, as a resumed run does, the state gives the same bound."""
    values = tensors([0.5, 3.0, 1.0])
    observer, state = OBSERVERS[method], State()
    for x in values:
        state = observer.end_batch(observer.observe(state, x))
        state = {key: tensor.clone() for key, tensor in state.items()}
    assert observer.bound(state, 99, LEVELS) == bound(method, values, 99)


def test_every_method_can_be_asked_for() -> None:
    """The recipe and the table of methods name the same ones, and each has its observer."""
    assert get_args(Method) == tuple(METHODS)
    assert {method.observer for method in METHODS.values()} == set(OBSERVERS)


def test_a_histogram_counts_more_values_than_float32_can() -> None:
    """`torch.histc` stops at 2**24 in a bin and thread; one batch of a large MLP holds more."""
    values = (1 << 24) + 1000
    state = OBSERVERS["percentile"].observe({}, torch.zeros(values))
    assert int(state["counts"].sum()) == values


def test_channels_keep_their_largest_magnitude() -> None:
    """Of every channel by itself, over all rows and tokens of all tensors."""
    pieces = [torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    state = State()
    for x in pieces:
        state = CHANNELS.end_batch(CHANNELS.observe(state, x))
    wanted = torch.cat(pieces).abs().flatten(0, 1).amax(dim=0)
    assert torch.equal(state["channels"], wanted)
    assert wanted.shape == (5,)


def test_inputs_are_kept_in_order() -> None:
    """A copy: the network may write into its inputs afterwards."""
    first, second = torch.ones(2, 3), torch.zeros(1, 3)
    state = INPUTS.observe(INPUTS.observe(State(), first), second)
    first.fill_(7)
    assert state["inputs"].tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
