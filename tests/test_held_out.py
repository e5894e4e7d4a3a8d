"""Files of real pictures: what is wrong with one is said in a line, before anything is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditcast.bundle import Bundle
from ditcast.held_out import choose, read
from ditcast.runtime import bench as measuring
from tests import realset
from tests.conftest import Cli

FEW = realset.arrays(8)
SIZE = (16, 16)

Write = Callable[[Path], object]


@pytest.fixture
def _not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring is a failure."""

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("it measures")

    monkeypatch.setattr(measuring, "bench", fail)


def changed(**arrays: Any) -> Write:
    """A file with other arrays in the place of good ones."""
    return lambda path: realset.write(path, **arrays)


def truncated(path: Path) -> None:
    """A file that ends in its middle."""
    content = realset.write(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def single(path: Path) -> None:
    """One array in a file that is no archive."""
    with path.open("wb") as file:
        np.save(file, FEW["images"])


FLOATS = np.full((80, 16, 16, 3), np.nan, np.float32)
BAD: dict[str, tuple[Write, str]] = {
    "none": (lambda path: None, "no file real.npz; give one such as tools/emoji_dataset.py writes"),
    "text": (lambda path: path.write_text("pictures"), "real.npz is no .npz of arrays ("),
    "empty": (lambda path: path.write_bytes(b""), "real.npz is no .npz of arrays ("),
    "truncated": (truncated, "real.npz is no .npz of arrays ("),
    "one array": (single, "real.npz is no .npz of arrays ("),
    "objects": (changed(labels=np.array([None] * 80)), "real.npz is no .npz of arrays ("),
    "no split": (changed(held_out=None), "real.npz has no array 'held_out', expected bool (n,)"),
    "NaN": (
        changed(images=FLOATS),
        "images in real.npz are float32 (80, 16, 16, 3), expected uint8",
    ),
    "grey": (changed(images=np.zeros((80, 16, 16), np.uint8)), "are uint8 (80, 16, 16), expected"),
    "latents": (
        changed(images=np.zeros((80, 16, 16, 4), np.uint8)),
        "16, 4), expected uint8 (n, H",
    ),
    "labels in words": (changed(labels=np.array(["cat"] * 80)), "are <U3 (80,), expected integers"),
    "another split": (changed(held_out=np.ones(80)), "held_out in real.npz are float64 (80,), exp"),
    "fewer labels": (
        changed(labels=FEW["labels"]),
        "80 images, 8 labels, 80 held_out; expected as",
    ),
    "another size": (
        changed(images=np.zeros((80, 32, 24, 3), np.uint8)),
        "those in real.npz have 32x24 pixels, the samples 16x16; give pictures of that size",
    ),
    "other classes": (
        changed(labels=np.arange(80) % 6),
        "real.npz has labels 0 to 5, the model 0 to 4; give pictures of its classes",
    ),
    "too few": (
        lambda path: np.savez(path, **FEW),  # type: ignore[arg-type]
        "real.npz has 4, expected at least 8, one per image; measure on fewer images",
    ),
}


@pytest.mark.usefixtures("_not_measured")
@pytest.mark.parametrize(("write", "line"), BAD.values(), ids=BAD.keys())
def test_a_file_that_cannot_be_used(
    cli: Cli,
    shared_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Write,
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("real.npz"))
    done = cli("bench", shared_bundle.path, "--images", 8, "--real", "real.npz")
    assert (done.code, done.out) == (2, "")
    (said,) = done.err.splitlines()
    assert said.startswith("ditcast: error: held-out pictures: ")
    assert line in said


@pytest.mark.usefixtures("_not_measured")
def test_a_bundle_without_such_pictures(
    cli: Cli, shared_bundle: Bundle, other_bundle: Bundle, tmp_path: Path
) -> None:
    real = realset.write(tmp_path / "real.npz")
    done = cli("bench", other_bundle.path, "--images", 8, "--real", real)
    assert (done.code, done.out) == (2, "")
    assert "the samples have 4 channels (latents without a decoder)" in done.err
    done = cli("bench", shared_bundle.path, "--images", 3, "--real", real)
    assert (done.code, done.out) == (2, "")
    assert "images: got 3, expected at least 4 to tell distances of" in done.err


@pytest.mark.usefixtures("_not_measured")
def test_random_weights_make_no_pictures(cli: Cli, bundle: Bundle, tmp_path: Path) -> None:
    info = bundle.manifest.model.model_copy(update={"source": "random:dit-s-2"})
    bundle.commit({"model": info})
    real = realset.write(tmp_path / "real.npz")
    done = cli("bench", bundle.path, "--images", 8, "--real", real)
    assert (done.code, done.out) == (2, "")
    assert "real: the weights are random, so distances mean nothing; leave it out" in done.err


@pytest.mark.usefixtures("_not_measured")
def test_a_package_that_is_missing(
    cli: Cli, shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = realset.write(tmp_path / "real.npz")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    done = cli("bench", shared_bundle.path, "--images", 8, "--real", real)
    assert (done.code, done.out) == (2, "")
    assert "Package 'torchmetrics' is needed here" in done.err
    assert "pip install 'ditcast[distances]'" in done.err


def test_held_out_pictures_alone_are_read(tmp_path: Path) -> None:
    """In [0, 1], channels first, with their own labels; the same order again."""
    path, data = realset.write(tmp_path / "real.npz"), realset.arrays()
    found = read(path, 8, SIZE, realset.CLASSES)
    assert found.images.shape == (40, 3, 16, 16)
    pairs = zip(data["images"][:40], data["labels"][:40], strict=True)
    wanted = {bytes(picture): label for picture, label in pairs}
    for image, label in zip(found.images, found.labels, strict=True):
        assert wanted[bytes(np.rint(image * 255).astype(np.uint8).transpose(1, 2, 0))] == label
    np.testing.assert_array_equal(read(path, 8, SIZE, realset.CLASSES).images, found.images)


def test_no_class_prevails_while_there_are_enough() -> None:
    """At most 40 pictures of each; all of them, where more are needed."""
    data = realset.arrays(200) | {"held_out": np.ones(200, bool), "labels": np.zeros(200, int)}
    data["labels"][:10] = 1
    images, labels = choose(data, held_out=True, least=50)
    assert (len(images), np.bincount(labels).tolist()) == (50, [40, 10])
    images, labels = choose(data, held_out=True, least=51)
    assert (len(images), np.bincount(labels).tolist()) == (200, [190, 10])
    assert len(choose(data, held_out=False)[0]) == 0
