"""Small real PixArt transformers for tests: seeded, untrained, with captions beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from ditcast.models import LoadedModel, load
from ditcast.models.captions import Captions

PROMPTS = 4  # and the null caption
TOKENS, CHANNELS = 6, 24
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "sample_size": 8,
    "caption_channels": CHANNELS,
    "cross_attention_dim": 32,
    "use_additional_conditions": False,
}
# What the tiny model is not: told its size (36 is a multiple of 3), with an exact GELU, no biases.
OTHER: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "cross_attention_dim": 36,
    "num_layers": 1,
    "use_additional_conditions": True,
    "activation_fn": "gelu",
    "attention_bias": False,
    "interpolation_scale": 2,
}


def captions(tokens: int = TOKENS) -> Captions:
    """Seeded captions of different lengths, the longest of all tokens."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([tokens, 1, tokens - 1, 3, 2])[: PROMPTS + 1]
    embeds = torch.randn(PROMPTS + 1, tokens, CHANNELS, generator=generator)
    return Captions(embeds, torch.arange(tokens)[None] < lengths[:, None])


def untrained(**changes: Any) -> PixArtTransformer2DModel:
    """A model that is the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return PixArtTransformer2DModel(**(TINY | changes)).eval().requires_grad_(False)


def predict(model: PixArtTransformer2DModel, x: Tensor, t: int, labels: list[int]) -> Tensor:
    """What diffusers computes for rows of noise and the numbers of their captions."""
    table, n, edge = captions(), len(labels), 8.0 * model.config.sample_size
    size = {
        "resolution": torch.tensor([edge, edge]).repeat(n, 1),
        "aspect_ratio": torch.ones(n, 1),
    }
    found: Tensor = model(
        x,
        encoder_hidden_states=table.embeds[labels],
        timestep=torch.full((n,), t),
        added_cond_kwargs=size if model.use_additional_conditions else None,
        encoder_attention_mask=table.mask[labels],
    ).sample
    return found


def save(folder: Path, *, named: bool = True, **changes: Any) -> Path:
    """A diffusers directory with captions; v prediction, as for the small U-Nets."""
    untrained(**changes).save_pretrained(folder / "transformer")
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    scheduler.save_pretrained(folder / "scheduler")
    save_file(captions()._asdict(), folder / "captions.safetensors")
    if named:
        names = [f"prompt {i}" for i in range(PROMPTS)]
        (folder / "classes.json").write_text(json.dumps(names))
    return folder


def loaded(folder: Path, **changes: Any) -> LoadedModel:
    """The same, loaded."""
    return load(str(save(folder, **changes)))
