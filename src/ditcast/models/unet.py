"""Adapter for diffusers' `UNet2DModel` (Ho et al. 2020, arXiv 2006.11239), with or without classes.

The network is taken apart at the timestep, as a DiT is: the TIB is the time embedding, the class
embedding and every residual block's projection of both (TFMQ-DM, arXiv 2311.16503). What remains
is a row of parts (residual blocks, attentions, resizing convolutions) with a stack of skips.

The one slot is the branch of DeepCache (Ma et al. 2023, arXiv 2312.00858): a reuse step runs the
first layers down and the last layers up, and takes the forecast for everything in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from ditcast.errors import UnsupportedError
from ditcast.models.base import (
    Layer,
    Modulated,
    Temporal,
    check_names,
    first_skips,
    frequencies,
    linears_of,
    run_parts,
    sinusoid,
)
from ditcast.models.unet_parts import (
    AttentionBlock,
    FinalLayer,
    Stem,
    Unit,
    make_parts,
    units_of,
)
from ditcast.recipe import TEMPORAL

# What can be taken apart; the first value is what diffusers has where a config lacks the key.
CONFIG: dict[str, tuple[str | None, ...]] = {
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}
BLOCKS: dict[str, tuple[str, ...]] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
SKIP = 1  # the skip at which a reuse step turns round: that of the first layer down


class TemporalFeatures(Temporal):
    """The TIB: time and class embedding, and one projection for each residual block.

    F is block-major: the projection's outputs, which are a shift, or a scale and a shift.
    """

    def __init__(self, model: UNet2DModel, resnets: list[Any]) -> None:
        """Share the parameters of `model`; `resnets` holds each part's residual block, or None."""
        super().__init__()
        self.time, self.label = model.time_embedding, model.class_embedding
        projections = [resnet.time_emb_proj for resnet in resnets if resnet is not None]
        self.projections = nn.ModuleList(projections)
        has = torch.tensor([resnet is not None for resnet in resnets])
        self.owner = [int(n) if h else None for n, h in zip(has.cumsum(0) - 1, has, strict=True)]
        self.register_buffer("frequencies", frequencies(model.time_proj))
        self.frequencies: Tensor
        self.cosine_first = model.time_proj.flip_sin_to_cos

    def own(self, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """(T,) float32 and (U,) int64 -> features (T, U, F); equal for all U without classes."""
        condition = self._time(timesteps)[:, None]
        if self.label is not None:
            condition = condition + self.label(class_labels)[None]
        condition = functional.silu(condition)
        features = torch.cat([project(condition) for project in self.projections], dim=-1)
        return features.expand(-1, class_labels.shape[0], -1)

    def part(self, index: int, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """The features of one part for pairs (N,) and (N,); (N, 0) where it has none."""
        owner = self.owner[index]
        if owner is None:
            return timesteps.new_zeros(len(timesteps), 0)
        condition = self._time(timesteps)
        if self.label is not None:
            condition = condition + self.label(class_labels)
        found: Tensor = self.projections[owner](functional.silu(condition))
        return found

    def _time(self, timesteps: Tensor) -> Tensor:
        """The time embedding, (T, E)."""
        waves = sinusoid(timesteps, self.frequencies, cosine_first=self.cosine_first)
        found: Tensor = self.time(waves)
        return found


class Denoiser(nn.Module):
    """A full step, and how much of the deep branch later reuse steps take."""

    def __init__(self, model: UNet2DModel, units: list[Unit]) -> None:
        """Share the parameters of `model` (q, k, v are copied into one Linear)."""
        super().__init__()
        self.stem, self.final = Stem(model), FinalLayer(model)
        self.blocks = nn.ModuleList([unit.module for unit in units])
        self.parts = make_parts(units, self.final)
        left = [i for i, unit in enumerate(units) if unit.leaves_skip]
        taken = [i for i, unit in enumerate(units) if unit.takes_skip]
        # The stem leaves skip 0. Skips are taken in the opposite order.
        self.down = left[SKIP - 1] + 1  # parts that lead to the skip
        self.up = taken[-SKIP - 1]  # the part that takes it, and the forecast

    def forward(
        self, sample: Tensor, features: Tensor, ahead: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output (N, C', H, W) and forecast (R, N, D, H, W) of a sample (N, C, H, W).

        `features` (N, F) are those of this step. `weights` (R, 1) says how much of the deep
        branch h each of R later reuse steps takes: `forecast[r] = weights[r] * h`. Their own
        features, `ahead` (R, N, F), act on the layers that they run themselves.
        """
        del ahead
        h = self.stem(sample)
        skips = first_skips(self.parts, h)
        deep = run_parts(self.parts[: self.up], h, features, skips)
        output = run_parts(self.parts[self.up :], deep, features, skips)
        return output, weights[:, 0].reshape(-1, 1, 1, 1, 1) * deep


class Reuse(nn.Module):
    """A reuse step: the layers around the deep branch, whose output is the forecast."""

    def __init__(self, denoiser: Denoiser) -> None:
        """Share the modules of `denoiser`, under the same names."""
        super().__init__()
        self.stem, self.blocks, self.final = denoiser.stem, denoiser.blocks, denoiser.final
        self.down, self.up = denoiser.parts[: denoiser.down], denoiser.parts[denoiser.up :]

    def forward(self, sample: Tensor, features: Tensor, forecast: Tensor) -> Tensor:
        """(N, C, H, W), (N, F), (N, D, H, W) -> output (N, C', H, W)."""
        h = self.stem(sample)
        skips = [h]
        run_parts(self.down, h, features, skips)
        return run_parts(self.up, forecast, features, skips)


class UNetAdapter:
    """`Adapter` for `UNet2DModel`.

    A model without classes has one, number 0. Nothing in a config says whether the last row of a
    table of classes is the null label: it is where that one class has no name.
    """

    architecture = "UNet2DModel"
    captioned = False

    @staticmethod
    def check(config: Mapping[str, Any]) -> None:
        """Refuse variants that are not implemented, and sizes that the levels cannot halve."""
        for key, known in CONFIG.items():
            if (value := config.get(key, known[0])) not in known:
                raise _unsupported(key, value, known)
        for key, known in BLOCKS.items():
            for value in config.get(key, ()):
                if value not in known:
                    raise _unsupported(key, value, known)
        size, levels = config.get("sample_size"), len(config.get("block_out_channels", range(4)))
        divisor = 2 ** (levels - 1)
        if size is None or any(edge % divisor for edge in _edges(size)):
            raise UnsupportedError(
                f"model: sample_size {size!r} is not supported; expected a multiple of {divisor}, "
                f"which {levels} levels can halve; set it in unet/config.json"
            )

    def __init__(self, model: UNet2DModel, named: int | None = None) -> None:
        """Take `model` apart; its parameters are shared. `named` of its classes have names."""
        config = model.config
        self.check(config)
        model = model.float().eval().requires_grad_(False)
        rows = config.num_class_embeds or 0
        check_names(named, *((rows, rows - 1) if rows > 1 else (1,)))
        self.null_label = named if rows and named == rows - 1 else None
        self.num_classes = self.null_label or max(rows, 1)
        self.sample_shape = (config.in_channels, *_edges(config.sample_size))
        self.output_channels = config.out_channels
        self._units = list(units_of(model))
        resnets = [unit.resnet for unit in self._units]
        self.temporal: Temporal = TemporalFeatures(model, [*resnets, None]).eval()
        denoiser = Denoiser(model, self._units).eval().requires_grad_(False)
        self.denoiser: nn.Module = denoiser
        self.steps: dict[str, nn.Module] = {"full": denoiser, "reuse": Reuse(denoiser).eval()}
        self.stem, self.parts = denoiser.stem, denoiser.parts
        ran = (*self.parts[: denoiser.down], *self.parts[denoiser.up :])
        self.shallow = tuple(part.name for part in ran)
        deep = denoiser.up - 1
        self.slots = (self.parts[deep].name,)
        self.slot_shape = (self._units[deep].channels, *self._sizes()[deep])

    def layers(self) -> dict[str, Layer]:
        """The convolutions and Linears of all parts; the first convolution is not one of them."""
        return {
            f"{part.name}.{name}": module
            for part in self.parts
            for name, module in part.module.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }

    def positions(self) -> dict[str, int]:
        """One row per pixel of the part's output."""
        areas = {
            part.name: math.prod(size) for part, size in zip(self.parts, self._sizes(), strict=True)
        }
        return {
            name: next(areas[part] for part in areas if name.startswith(f"{part}."))
            for name in self.layers()
        }

    def _sizes(self) -> list[tuple[int, int]]:
        """Height and width of every part's output."""
        (_, *edges), widening, found = self.sample_shape, 1.0, []
        for unit in self._units:
            widening *= unit.widening
            found.append((int(edges[0] * widening), int(edges[1] * widening)))
        return [*found, (edges[0], edges[1])]

    def temporal_linears(self) -> dict[str, nn.Linear]:
        """The Linears of the TIB; the table of classes is looked up, not multiplied."""
        return linears_of(self.temporal, TEMPORAL)

    def modulated(self) -> dict[str, Modulated]:
        """None: a SiLU lies between every modulation and the next layer."""
        return {}

    def chained(self) -> dict[str, tuple[str, int]]:
        """The attention's output Linear mixes values, which qkv's last third of rows makes."""
        return {
            f"{part.name}.attn.proj": (
                f"{part.name}.attn.qkv",
                2 * part.module.attn.proj.in_features,
            )
            for part in self.parts
            if isinstance(part.module, AttentionBlock)
        }


def _edges(size: Any) -> tuple[int, int]:
    """Height and width of a config's `sample_size`."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _unsupported(key: str, value: object, known: tuple[str | None, ...]) -> UnsupportedError:
    expected = " or ".join("null" if name is None else name for name in known)
    return UnsupportedError(
        f"model: {key} {value!r} is not supported in a U-Net; expected {expected}; "
        "take another model, there is no adapter for this one"
    )
