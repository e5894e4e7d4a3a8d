"""Tensors on disk, always safetensors; a damaged file, or another kind, is one clear line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ditcast.errors import BundleError


def save(
    tensors: Mapping[str, NDArray[Any]], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors; equal tensors give equal bytes.

    Raises:
        BundleError: the file cannot be written, as on a full disk.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as err:
        raise BundleError(
            f"bundle: cannot write {path}: {err}; free some space and run again"
        ) from err


def load(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a file, or those whose names are wanted, and its metadata.

    Raises:
        BundleError: the file is damaged, or is no safetensors file.
    """
    try:
        with safe_open(path, "numpy") as file:
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118 - no mapping
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as err:
        raise BundleError(
            f"bundle: {path} is no safetensors file ({err}); compile the bundle again"
        ) from err
