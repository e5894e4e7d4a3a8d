"""Fidelity that no bad picture passes: figures that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ditcast.runtime import fidelity
from tests.reports import blurred, pictures


def noise(like: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pictures of nothing."""
    return np.random.default_rng(1).uniform(-1, 1, like.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("flat", lambda x: np.full_like(x, -1)),
        ("flat", lambda x: np.ones_like(x)),
        ("flat", lambda x: x * np.float32(0.1)),
        ("noisy", noise),
        ("noisy", lambda x: x + noise(x) * np.float32(0.5)),
        ("blurred", blurred),
    ],
    ids=["black", "white", "grey", "noise", "noise on top", "blur"],
)
def test_broken_pictures_are_counted(kind: str, spoil: object) -> None:
    """Each under what it is, and under nothing else."""
    assert callable(spoil)
    good = pictures()
    found = fidelity.figures(spoil(good), good)
    assert found["broken"] == {"flat": 0, "blurred": 0, "noisy": 0} | {kind: len(good)}


def test_good_pictures_are_not_broken() -> None:
    """An error that is seen, but leaves a picture what it is."""
    good = pictures()
    rough = good + np.float32(0.03) * noise(good)
    found = fidelity.figures(rough.astype(np.float32), good)
    assert found["broken"] == {"flat": 0, "blurred": 0, "noisy": 0}
    assert found["psnr_db"]["p50"] == pytest.approx(41, abs=1)
    equal = fidelity.figures(good, good)
    for key, most in (("psnr_db", 100), ("ssim", 1), ("contrast", 1), ("detail", 1)):
        assert equal[key] == pytest.approx({"p10": most, "p50": most, "p90": most})


def test_black_pairs_of_black_are_fine() -> None:
    """Where full precision is black there is no contrast to lose."""
    black = np.full((2, 3, 8, 8), -1, np.float32)
    found = fidelity.figures(black, black)
    assert found["contrast"]["p50"] == 1
    assert found["broken"] == {"flat": 0, "blurred": 0, "noisy": 0}


def test_unpaired_pictures() -> None:
    """By hand: two pictures that differ by half of the range everywhere are at 6 dB."""
    two = np.stack([np.full((3, 4, 4), value, np.float32) for value in (-0.5, 0.5)])
    found = fidelity.unpaired(two)
    assert found is not None
    assert found["p50"] == pytest.approx(-20 * np.log10(0.5), rel=1e-4)
    assert fidelity.unpaired(two[:1]) is None


@pytest.mark.parametrize(("both", "expected"), [(0.05, 0.0), (0.025, 6.02), (0.1, -6.02)])
def test_interaction_by_hand(both: float, expected: float) -> None:
    """Errors of 0.03 and 0.04 add up to 0.05 (of a range of one) where they are independent."""
    wanted = np.zeros((1, 3, 4, 4), np.float32)
    made = [wanted + np.float32(2 * error) for error in (0.03, 0.04, both)]
    assert fidelity.interaction(wanted, *made)[0] == pytest.approx(expected, abs=0.01)


def test_latents_are_scaled_by_their_pairs() -> None:
    """A tenth of the range is 20 dB, whatever the range."""
    wanted = np.zeros((1, 4, 4, 4), np.float32)
    wanted[:, :, :2] = 50
    found = fidelity.figures(wanted + np.float32(5), wanted)
    assert found["psnr_db"]["p50"] == pytest.approx(20, abs=1e-3)
    assert found["ssim"] is None  # they are smaller than its window


def test_a_spread_of_nothing_is_none() -> None:
    """And of one value it is that value."""
    assert fidelity.spread([]) is None
    assert fidelity.spread([2.0]) == {"p10": 2, "p50": 2, "p90": 2}
