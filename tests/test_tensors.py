"""Tensors on disk: what is damaged, or cannot be written, is one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from ditcast import tensors
from ditcast.errors import BundleError


def test_tensors_survive_the_disk(tmp_path: Path) -> None:
    """Values, types, shapes and metadata; equal tensors are equal bytes in any order."""
    held = {"b": np.arange(6.0).reshape(2, 3), "a": np.array(0.5, np.float32)}
    tensors.save(held, tmp_path / "one", {"done": "3"})
    tensors.save(dict(reversed(held.items())), tmp_path / "two", {"done": "3"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found, metadata = tensors.load(tmp_path / "one")
    assert metadata == {"done": "3"}
    assert found.keys() == held.keys()
    for name, array in held.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


def test_without_metadata(tmp_path: Path) -> None:
    """None was written, none is found."""
    tensors.save({"a": np.zeros(2)}, tmp_path / "one")
    assert tensors.load(tmp_path / "one")[1] == {}


@pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"\x80\x04\x95pickle"])
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    """Empty, garbage, a pickle."""
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(BundleError, match="bad is no safetensors file .*compile the bundle again"):
        tensors.load(tmp_path / "bad")


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's error becomes ours."""

    def full(*arguments: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(BundleError, match="cannot write .*No space left .*free some space and run"):
        tensors.save({"a": np.zeros(2)}, tmp_path / "one")
