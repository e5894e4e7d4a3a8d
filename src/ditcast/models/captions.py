"""The captions of a text-conditioned model: a table beside it, whose row numbers are its labels.

Nothing but calibration and `temporal.onnx` knows that a label stands for a text. The embeddings are
made by the user, with the model's own text encoder; the last row is the null caption of guidance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ditcast.errors import ConfigError

CAPTIONS = "captions.safetensors"


class Captions(NamedTuple):
    """Embeddings (K + 1, L, C) float32, and which of their tokens count, (K + 1, L) bool."""

    embeds: Tensor
    mask: Tensor


def read_captions(path: Path, channels: int) -> Captions:
    """The captions of a model that takes so many channels of each token.

    Raises:
        ConfigError: no such file, or tensors that are no such table.
    """
    make = f"make {CAPTIONS} with the model's text encoder, as docs/guide.md shows"
    try:
        found = load_file(path)
    except FileNotFoundError as err:
        raise ConfigError(
            f"model: {path.parent} has no {CAPTIONS}; expected embeds (K + 1, L, {channels}) and "
            f"mask (K + 1, L) of K captions and the null caption; {make}"
        ) from err
    except (OSError, SafetensorError) as err:
        raise ConfigError(f"model: {path} is no safetensors file ({err}); {make}") from err
    problem = _names(found) or _table(found["embeds"], channels) or _mask(**found)
    if problem:
        raise ConfigError(f"model: {path} has {problem}; {make}")
    return Captions(found["embeds"], found["mask"] > 0)


def _names(found: dict[str, Tensor]) -> str:
    """What is wrong with the names of the file's tensors, if anything is."""
    if found.keys() == {"embeds", "mask"}:
        return ""
    return f"the tensors {', '.join(sorted(found)) or 'none'}, expected embeds and mask"


def _table(embeds: Tensor, channels: int) -> str:
    """The same of the embeddings."""
    shape = tuple(embeds.shape)
    if len(shape) != 3 or shape[0] < 2 or not shape[1] or shape[2] != channels:
        return (
            f"embeds of shape {shape}, expected (K + 1, L, {channels}): captions and the null "
            "caption, their tokens, and the caption_channels of the model's config"
        )
    if embeds.dtype != torch.float32:
        return f"embeds of {_name(embeds)}, expected float32"
    rows = (~torch.isfinite(embeds).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    return f"NaN or Inf in embeds of caption {rows[0]}, expected finite numbers" if rows else ""


def _mask(embeds: Tensor, mask: Tensor) -> str:
    """The same of the mask, beside embeddings that are as they should be."""
    if mask.shape != embeds.shape[:2]:
        wanted = tuple(embeds.shape[:2])
        return f"mask of shape {tuple(mask.shape)}, expected {wanted} as embeds have it"
    if not bool(((mask == 0) | (mask == 1)).all()):
        return "a mask with other values than 0 and 1, expected 1 for the tokens that count"
    empty = (mask == 0).all(dim=1).nonzero().flatten().tolist()
    if empty:
        return f"a mask without any token of caption {empty[0]}, expected at least one"
    return ""


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def random_captions(count: int, tokens: int, channels: int) -> Captions:
    """Captions with random embeddings from torch's generator, of which half the tokens count."""
    mask = torch.arange(tokens).expand(count, -1) < tokens // 2
    return Captions(torch.randn(count, tokens, channels), mask)


class CaptionFeatures(nn.Module):
    """What the network sees of captions: projected tokens, and which of them count."""

    def __init__(self, captions: Captions, projection: Any) -> None:
        """Share the parameters of a diffusers caption projection; the table is a buffer."""
        super().__init__()
        self.projection = projection
        self.register_buffer("embeds", captions.embeds)
        self.register_buffer("mask", captions.mask.float())
        self.embeds: Tensor
        self.mask: Tensor

    @property
    def tokens(self) -> int:
        """L, the length of all captions."""
        return self.mask.shape[1]

    def forward(self, class_labels: Tensor) -> Tensor:
        """(U,) int64 -> (U, L D + L): D features of each token, then 1 for those that count."""
        tokens = self.projection(self.embeds.index_select(0, class_labels))  # (U, L, D)
        return torch.cat([tokens.flatten(1), self.mask.index_select(0, class_labels)], dim=1)
