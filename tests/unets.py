"""Small real U-Nets for tests: seeded, untrained, on disk as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from ditcast.models import LoadedModel, load

CLASSES = 4
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
CONDITIONAL: dict[str, Any] = {"num_class_embeds": CLASSES + 1}  # its last row is the null label
# What the tiny model is not: scale and shift, resizing inside residual blocks, attention in levels.
OTHER: dict[str, Any] = {
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}


def untrained(**changes: Any) -> UNet2DModel:
    """A model that is the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return UNet2DModel(**(TINY | changes)).eval().requires_grad_(False)


def save(folder: Path, named: int = 0, **changes: Any) -> Path:
    """A diffusers directory; v prediction, since an untrained model's noise would be amplified."""
    untrained(**changes).save_pretrained(folder / "unet")
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    scheduler.save_pretrained(folder / "scheduler")
    if named:
        (folder / "classes.json").write_text(json.dumps([f"class-{i}" for i in range(named)]))
    return folder


def loaded(folder: Path, named: int = 0, **changes: Any) -> LoadedModel:
    """The same, loaded."""
    return load(str(save(folder, named, **changes)))
