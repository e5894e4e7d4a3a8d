"""Samples as pictures: pixel values, PNG grids and paired fidelity."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ditcast.errors import ConfigError

PSNR_CAP = 100.0
WINDOW = 7  # pixels, of SSIM
GAP = 2  # pixels between the pictures of a grid

Pixels = NDArray[np.uint8]


def to_unit(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples of any shape in [-1, 1] as images clipped to [0, 1]."""
    return np.clip(samples / 2 + 0.5, 0, 1)


def to_pixels(samples: NDArray[np.float32]) -> Pixels:
    """Samples `(n, 3, H, W)` in [-1, 1] as pictures `(n, H, W, 3)` uint8."""
    found: Pixels = np.rint(to_unit(samples) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return found


def grid(pictures: Pixels, columns: int = 0) -> Image.Image:
    """One picture of all `(n, H, W, 3)`, row by row, two pixels apart on white."""
    n, height, width, _ = pictures.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    size = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    sheet = np.full(size, 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)


def cut(sheet: Image.Image, count: int, height: int, width: int) -> Pixels | None:
    """The pictures that `grid` put together, `(count, H, W, 3)`; None where they do not fit."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    if sheet.size != (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP):
        return None
    pixels = np.asarray(sheet.convert("RGB"))
    corners = [divmod(i, columns) for i in range(count)]
    found = [
        pixels[row * (height + GAP) :, column * (width + GAP) :][:height, :width]
        for row, column in corners
    ]
    return np.stack(found)


def check_output(path: Path, channels: int) -> None:
    """Refuse a file that `save` cannot write, before any work is done.

    Raises:
        ConfigError: another file type, a missing folder, or latents where pixels are needed.
    """
    if path.suffix not in (".png", ".npy"):
        raise ConfigError(f"output: got {path}, expected a name that ends in .png or .npy")
    if not path.parent.is_dir():
        raise ConfigError(f"output: no folder {path.parent}; create it first")
    if path.suffix == ".png" and channels != 3:
        raise ConfigError(
            f"output: samples have {channels} channels (latents without a decoder), a "
            f".png needs 3; write them with -o {path.with_suffix('.npy')}"
        )


def save(samples: NDArray[np.float32], path: Path, scale: int = 1, *, columns: int = 0) -> None:
    """Write a `.png` grid, enlarged `scale` times, or the samples themselves as `.npy`.

    Raises:
        ConfigError: another file type, a missing folder, or a `.png` of latents.
    """
    check_output(path, samples.shape[1])
    if path.suffix == ".npy":
        np.save(path, samples)
        return
    picture = grid(to_pixels(samples), columns)
    size = (picture.width * scale, picture.height * scale)
    picture.resize(size, Image.Resampling.NEAREST).save(path)


def psnr_db(images: NDArray[np.float32], paired: NDArray[np.float32]) -> NDArray[np.float64]:
    """PSNR `(n,)` of images `(n, C, H, W)` in [0, 1] against their pairs, capped at 100 dB."""
    error = np.square(images.astype(np.float64) - paired).mean(axis=(1, 2, 3))
    found: NDArray[np.float64] = -10 * np.log10(np.maximum(error, 10 ** (-PSNR_CAP / 10)))
    return found


def ssim(images: NDArray[np.float32], paired: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """SSIM `(n,)` of the same, window 7; None without the `report` extra and for smaller images."""
    if importlib.util.find_spec("skimage") is None or min(images.shape[2:]) < WINDOW:
        return None
    from skimage.metrics import structural_similarity

    pairs = zip(images, paired, strict=True)
    found = [
        structural_similarity(a, b, channel_axis=0, data_range=1.0, win_size=WINDOW)
        for a, b in pairs
    ]
    return np.asarray(found, np.float64)
