"""Small files of real pictures in the form that `tools/emoji_dataset.py` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reports import pictures

CLASSES = 5  # as many as the tiny model has


def arrays(count: int = 80, classes: int = CLASSES) -> dict[str, NDArray[Any]]:
    """Discs of 16x16 pixels, classes in turn; the first half is held out."""
    made = pictures(count)[:, :, ::2, ::2].transpose(0, 2, 3, 1)
    return {
        "images": np.rint((made + 1) * 127.5).astype(np.uint8),
        "labels": np.arange(count) % classes,
        "held_out": np.arange(count) < count // 2,
    }


def write(path: Path, **changes: Any) -> Path:
    """The same as a file, with other arrays in the place of some; None leaves one out."""
    found = {name: array for name, array in (arrays() | changes).items() if array is not None}
    np.savez(path, **found)
    return path
