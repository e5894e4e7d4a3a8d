"""Pictures and fidelity: figures that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ditcast.errors import ConfigError
from ditcast.runtime.images import check_output, cut, grid, psnr_db, save, ssim, to_pixels, to_unit


def picture() -> NDArray[np.float32]:
    """One smooth 16x16 picture in [0, 1]."""
    y, x = np.mgrid[0:16, 0:16] / 15
    return np.stack([x, y, (x + y) / 2]).astype(np.float32)[None]


def blurred(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of 4x4 patches."""
    means = image.reshape(1, 3, 4, 4, 4, 4).mean(axis=(3, 5), keepdims=True)
    return np.broadcast_to(means, (1, 3, 4, 4, 4, 4)).reshape(1, 3, 16, 16)


def test_pixels_are_clipped() -> None:
    """[-1, 1] becomes [0, 1]; what is outside goes to the edge."""
    found = to_unit(np.array([-3, -1, 0, 0.5, 1, 3], np.float32))
    assert found.tolist() == [0, 0, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("error", "expected"),
    # -20 log10(error); 1e-9 would be 180 dB, which means nothing, so it is capped.
    [(0.1, 20), (0.01, 40), (1.0, 0), (1e-9, 100), (0.0, 100)],
)
def test_psnr_of_a_constant_error(error: float, expected: float) -> None:
    """Per image, in dB of a range of one."""
    zeros = np.zeros((2, 3, 4, 4), np.float32)
    paired = np.stack([zeros[0], zeros[0] + np.float32(error)])
    assert psnr_db(zeros, paired) == pytest.approx([100, expected], abs=1e-4)


def test_bad_pictures_score_badly() -> None:
    """Black, noise and blur; an equal picture scores the most there is."""
    good = picture()
    noise = np.random.default_rng(0).random(good.shape, np.float32)
    equal = ssim(good, good)
    assert equal is not None
    assert equal[0] == pytest.approx(1)
    for bad, psnr_limit, ssim_limit in (
        (np.zeros_like(good), 10, 0.2),
        (noise, 12, 0.3),
        (blurred(good), 30, 0.95),
    ):
        found = ssim(bad, good)
        assert found is not None
        assert psnr_db(bad, good)[0] < psnr_limit
        assert found[0] < ssim_limit


def test_a_grid_is_square_with_white_gaps() -> None:
    """Three black 4x4 pictures: two columns and rows, two pixels apart, the last cell white."""
    sheet = np.asarray(grid(to_pixels(np.full((3, 3, 4, 4), -1, np.float32))))
    assert sheet.shape == (10, 10, 3)
    assert (sheet[:4, :4] == 0).all()
    assert (sheet[:4, 6:] == 0).all()
    assert (sheet[6:, :4] == 0).all()
    assert (sheet[6:, 6:] == 255).all()
    assert (sheet[4:6] == 255).all()


@pytest.mark.parametrize(("columns", "size"), [(1, (4, 16)), (3, (16, 4)), (2, (10, 10))])
def test_a_grid_of_so_many_columns(columns: int, size: tuple[int, int]) -> None:
    """Width and height."""
    assert grid(np.zeros((3, 4, 4, 3), np.uint8), columns).size == size


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_grid_can_be_cut_again(count: int) -> None:
    """Into the very pictures; a sheet of another size is not cut."""
    pictures = np.random.default_rng(0).integers(0, 256, (count, 5, 4, 3), np.uint8)
    found = cut(grid(pictures), count, 5, 4)
    assert found is not None
    np.testing.assert_array_equal(found, pictures)
    assert cut(grid(pictures), count, 4, 5) is None


def test_saved_pictures_are_what_was_sampled(tmp_path: Path) -> None:
    """PNG: rounded to 8 bits, enlarged without smoothing; NPY: every bit."""
    samples = (picture() * 2 - 1).astype(np.float32)
    save(samples, tmp_path / "x.png", scale=3)
    found = np.asarray(Image.open(tmp_path / "x.png"))
    assert found.shape == (48, 48, 3)
    expected = np.rint(to_unit(samples)[0] * 255).transpose(1, 2, 0)
    np.testing.assert_array_equal(found[1::3, 1::3], expected)
    save(samples, tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), samples)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("x.jpg", r"output: got .*x.jpg, expected a name that ends in .png or .npy"),
        ("x", "expected a name that ends in .png or .npy"),
        ("no/such/x.png", "output: no folder .*no/such; create it first"),
    ],
)
def test_other_outputs_are_refused(tmp_path: Path, name: str, match: str) -> None:
    """Before any work is done."""
    with pytest.raises(ConfigError, match=match):
        check_output(tmp_path / name, 3)


def test_latents_are_no_picture(tmp_path: Path) -> None:
    """Four channels cannot be shown without a decoder; the message says how to keep them."""
    latents = np.zeros((1, 4, 8, 8), np.float32)
    with pytest.raises(ConfigError, match=r"4 channels .*write them with -o .*x.npy"):
        save(latents, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
    save(latents, tmp_path / "x.npy")
