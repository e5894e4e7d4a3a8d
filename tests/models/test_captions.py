"""The captions beside a text-conditioned model, and what is said of a file that holds none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import save_file
from torch import Tensor

from ditcast.errors import ConfigError
from ditcast.models import load, source
from ditcast.models.captions import CAPTIONS, read_captions
from ditcast.models.pixart import PixArtAdapter
from ditcast.schedule import from_config
from tests.pixarts import CHANNELS, PROMPTS, TINY, TOKENS, captions, save, untrained
from tests.test_docs import blocks
from tests.test_docs_run import GUIDE

Tensors = dict[str, Tensor]
SHAPE = (PROMPTS + 1, TOKENS)


def edited(change: Callable[[Tensors], object], path: Path) -> Path:
    """The captions of the tiny model after a change, on disk."""
    tensors = dict(captions()._asdict())
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_of_all_kinds(tmp_path: Path, dtype: torch.dtype) -> None:
    """Tokenizers give integers."""
    path = edited(lambda t: t.update(mask=t["mask"].to(dtype)), tmp_path / CAPTIONS)
    found, wanted = read_captions(path, CHANNELS), captions()
    assert torch.equal(found.mask, wanted.mask)
    assert torch.equal(found.embeds, wanted.embeds)


BAD: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no mask": (lambda t: t.pop("mask"), "has the tensors embeds, expected embeds and mask; make"),
    "another tensor": (
        lambda t: t.update(x=torch.ones(1)),
        "has the tensors embeds, mask, x, expected embeds and mask",
    ),
    "a matrix": (
        lambda t: t.update(embeds=t["embeds"][0].clone()),
        rf"embeds of shape \(6, 24\), expected \(K \+ 1, L, {CHANNELS}\)",
    ),
    "other channels": (
        lambda t: t.update(embeds=t["embeds"][..., 1:].clone()),
        rf"embeds of shape \(5, 6, 23\), expected \(K \+ 1, L, {CHANNELS}\): captions and the null "
        "caption, their tokens, and the caption_channels of the model's config",
    ),
    "the null caption alone": (
        lambda t: t.update(embeds=t["embeds"][:1].clone(), mask=t["mask"][:1].clone()),
        r"embeds of shape \(1, 6, 24\), expected",
    ),
    "half precision": (
        lambda t: t.update(embeds=t["embeds"].bfloat16()),
        "embeds of bfloat16, expected float32",
    ),
    "NaN": (
        lambda t: t["embeds"][3, 1].fill_(torch.nan),
        "NaN or Inf in embeds of caption 3, expected finite numbers",
    ),
    "another length": (
        lambda t: t.update(mask=t["mask"][:, 1:].clone()),
        r"mask of shape \(5, 5\), expected \(5, 6\) as embeds have it",
    ),
    "a bias": (
        lambda t: t.update(mask=-10000.0 * t["mask"]),
        "a mask with other values than 0 and 1, expected 1 for the tokens that count",
    ),
    "nothing to attend to": (
        lambda t: t["mask"][2].fill_(False),
        "a mask without any token of caption 2, expected at least one",
    ),
}


@pytest.mark.parametrize(("change", "match"), BAD.values(), ids=BAD.keys())
def test_captions_that_are_none(
    tmp_path: Path, change: Callable[[Tensors], object], match: str
) -> None:
    """One line: the file, what it has, what is expected, and where to read on."""
    path = edited(change, tmp_path / CAPTIONS)
    with pytest.raises(ConfigError, match=match) as found:
        read_captions(path, CHANNELS)
    message = str(found.value)
    assert message.startswith(f"model: {path} has ")
    assert message.endswith(
        "make captions.safetensors with the model's text encoder, as docs/guide.md shows"
    )
    assert "\n" not in message


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / CAPTIONS).write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="captions.safetensors is no safetensors file"):
        read_captions(tmp_path / CAPTIONS, CHANNELS)


def test_a_directory(tmp_path: Path) -> None:
    """Its captions are asked for, and belong to its fingerprint; a label is a caption's number."""
    folder = save(tmp_path / "m", num_layers=1)
    first = load(str(folder))
    assert first.classes == tuple(f"prompt {i}" for i in range(PROMPTS))
    assert isinstance(first.adapter, PixArtAdapter)
    edited(lambda t: t["embeds"][0].add_(1), folder / CAPTIONS)
    second = load(str(folder))
    assert second.fingerprint != first.fingerprint
    found = [model.adapter.temporal(torch.ones(1), torch.arange(2)) for model in (first, second)]
    assert (found[0] != found[1]).any(dim=-1).tolist() == [[True, False]]
    (folder / CAPTIONS).unlink()
    match = rf"has no captions.safetensors; expected embeds \(K \+ 1, L, {CHANNELS}\) and mask \("
    with pytest.raises(ConfigError, match=match):
        load(str(folder))


class _Pipe:
    """What a diffusers pipeline with a text encoder has of what the guide's function asks for."""

    def __init__(self) -> None:
        self.transformer = untrained(num_layers=1)
        self.scheduler = DPMSolverMultistepScheduler()

    def encode_prompt(self, prompt: list[str], negative_prompt: str) -> tuple[Tensor, ...]:
        """Embeddings in half precision and integer masks, of each prompt one and one null."""
        assert (len(prompt), negative_prompt) == (PROMPTS, "")
        embeds, mask = captions()
        found = [embeds[:-1], mask[:-1], *(t[-1:].repeat(4, *[1] * t[0].dim()) for t in captions())]
        return tuple(t.half() if t.is_floating_point() else t.long() for t in found)


def test_the_function_of_the_guide(tmp_path: Path) -> None:
    """It writes a directory that is taken, from what a pipeline gives."""
    shown: dict[str, Any] = {}
    exec(next(t for t in blocks(GUIDE, "python") if "save_for_ditcast" in t), shown)
    prompts = [f"a photo, {i}" for i in range(PROMPTS)]
    shown["save_for_ditcast"](_Pipe(), prompts, tmp_path / "m")
    model = load(str(tmp_path / "m"))
    assert model.classes == tuple(prompts)
    assert from_config(model.scheduler).clip is None
    table = read_captions(tmp_path / "m" / CAPTIONS, CHANNELS)
    assert torch.equal(table.mask, captions().mask)
    torch.testing.assert_close(table.embeds, captions().embeds, rtol=1e-3, atol=1e-3)


def test_random_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With seeded captions, of which half the tokens count."""
    config = TINY | {"_class_name": PixArtAdapter.architecture, "num_layers": 1}
    monkeypatch.setitem(source.RANDOM, "tiny", config)
    monkeypatch.setattr(source, "RANDOM_CAPTIONS", (3, 8))
    first, second = load("random:tiny").adapter, load("random:tiny").adapter
    assert (first.num_classes, first.null_label) == (2, 2)
    found = [a.temporal(torch.ones(1), torch.arange(3))[0] for a in (first, second)]
    assert torch.equal(*found)
    assert found[0][:, -8:].tolist() == [[1.0] * 4 + [0.0] * 4] * 3
    assert config["_class_name"]  # it is not taken out of the table
