"""Adapter for diffusers' `DiTTransformer2DModel` (Peebles & Xie 2022, arXiv 2212.09748).

The network is taken apart at the timestep. Everything that depends only on (timestep, class)
is the TIB and runs once per request; what remains sees it as one row of features per sample.
The residual stream only ever adds gated slot outputs, and the gates of all steps are known, so
a full step can sum up what later reuse steps add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from ditcast.errors import UnsupportedError
from ditcast.models.base import (
    Layer,
    Modulated,
    Part,
    Temporal,
    check_names,
    frequencies,
    linears_of,
)
from ditcast.models.operators import Attention
from ditcast.recipe import TEMPORAL

ACTIVATIONS = {"gelu": "none", "gelu-approximate": "tanh"}


class TemporalFeatures(Temporal):
    """The TIB: per block timestep and label embedders, SiLU and modulation Linear.

    diffusers keeps a whole set of embedders in every block; the final layer reuses those of
    block 0. F is block-major: shift, scale, gate (attention), shift, scale, gate (MLP) of each
    block, then the final shift and scale.
    """

    def __init__(self, model: DiTTransformer2DModel) -> None:
        """Share the parameters of `model`."""
        super().__init__()
        norms = [block.norm1 for block in model.transformer_blocks]
        self.time = nn.ModuleList([norm.emb.timestep_embedder for norm in norms])
        self.label = nn.ModuleList([norm.emb.class_embedder.embedding_table for norm in norms])
        self.modulation = nn.ModuleList([norm.linear for norm in norms])
        self.final = model.proj_out_1
        self.register_buffer("frequencies", frequencies(norms[0].emb.time_proj))
        self.frequencies: Tensor

    def forward(self, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """(T,) float32 and (U,) int64 -> features (T, U, F)."""
        sinusoid = self._sinusoid(timesteps)
        parts = []
        for i, modulation in enumerate(self.modulation):
            condition = self._condition(i, sinusoid, class_labels)
            parts.append(modulation(condition))
            if i == 0:
                final = self.final(condition)
        return torch.cat([*parts, final], dim=-1)

    def part(self, index: int, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """The features of one part of the network for pairs (N,) and (N,); the last is final."""
        last = index == len(self.modulation)
        sinusoid = self._sinusoid(timesteps)
        owner = 0 if last else index
        time, label = self.time[owner](sinusoid), self.label[owner](class_labels)
        condition = functional.silu(time + label)
        found: Tensor = (self.final if last else self.modulation[index])(condition)
        return found

    def _sinusoid(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None] * self.frequencies[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)  # (T, 256)

    def _condition(self, index: int, sinusoid: Tensor, class_labels: Tensor) -> Tensor:
        """What the modulations of a block see: (T, U, D)."""
        time, label = self.time[index](sinusoid), self.label[index](class_labels)
        return functional.silu(time[:, None] + label[None])


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, feed_forward: Any, approximate: str) -> None:
        """Share the two Linears of a diffusers feed-forward."""
        super().__init__()
        self.fc1 = feed_forward.net[0].proj
        self.fc2 = feed_forward.net[2]
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, D) -> (N, S, D)."""
        hidden = functional.gelu(self.fc1(x), approximate=self.approximate)
        projected: Tensor = self.fc2(hidden)
        return projected


class Block(nn.Module):
    """One transformer block without its TIB: two norms and two slots."""

    def __init__(self, block: Any, approximate: str) -> None:
        """Share the parameters of a diffusers block."""
        super().__init__()
        self.norm1, self.norm2 = block.norm1.norm, block.norm3
        self.attn = Attention(block.attn1)
        self.mlp = Mlp(block.ff, approximate)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """(N, S, D) and the block's features (N, 6 D) -> (N, S, D)."""
        return self.slots(h, features)[0]

    def slots(self, h: Tensor, features: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The same, with the output Y of both slots before its gate."""
        rows = features.chunk(6, dim=-1)
        h, first = self._slot(h, self.norm1, self.attn, rows[:3])
        h, second = self._slot(h, self.norm2, self.mlp, rows[3:])
        return h, (first, second)

    def _slot(
        self, h: Tensor, norm: nn.Module, module: nn.Module, rows: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate = rows
        y = module(norm(h) * (1 + scale[:, None]) + shift[:, None])
        return h + gate[:, None] * y, y


class FinalLayer(nn.Module):
    """Norm, modulation, projection and un-patching."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        """Share the parameters of `model`."""
        super().__init__()
        self.norm, self.proj = model.norm_out, model.proj_out_2
        self.patch, self.channels = model.config.patch_size, model.out_channels
        self.grid = model.config.sample_size // model.config.patch_size

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """(N, S, D) and its features (N, 2 D) -> (N, C', H, W)."""
        shift, scale = features.chunk(2, dim=-1)
        h = self.proj(self.norm(h) * (1 + scale[:, None]) + shift[:, None])
        g, p, c = self.grid, self.patch, self.channels
        h = h.reshape(-1, g, g, p, p, c).permute(0, 5, 1, 3, 2, 4)  # (N, C', g, p, g, p)
        return h.reshape(-1, c, g * p, g * p)


class Denoiser(nn.Module):
    """A full step: every slot is computed, and what later reuse steps add to their stream."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        """Share the parameters of `model` (q, k, v are copied into one Linear)."""
        super().__init__()
        approximate = ACTIVATIONS[model.config.activation_fn]
        self.patch_embed = model.pos_embed
        blocks = [Block(b, approximate) for b in model.transformer_blocks]
        self.blocks: Any = nn.ModuleList(blocks)  # typed, iterating it gives no Block
        self.final = FinalLayer(model)
        self.width = model.inner_dim

    def forward(
        self, sample: Tensor, features: Tensor, ahead: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output (N, C', H, W) and forecast (R, N, S, D) of a sample (N, C, H, W).

        `features` (N, F) are those of this step; `ahead` (R, N, F) those of R later reuse
        steps, and `weights` (R, slots) how much of each slot's output Y each of them takes:
        `forecast[r] = sum_k weights[r, k] * gate_k(ahead[r]) * Y_k`. It is summed up while Y is
        at hand, because a Y that is written down and read again costs more than it is worth.
        """
        widths = [6 * self.width] * len(self.blocks) + [2 * self.width]
        *parts, last = features[:, : sum(widths)].split(widths, dim=-1)
        gates = self._gates(ahead, weights)
        h = self.patch_embed(sample)  # (N, S, D)
        forecast = None
        for i, (block, part) in enumerate(zip(self.blocks, parts, strict=True)):
            h, outputs = block.slots(h, part)
            for j, y in enumerate(outputs):
                added = gates[2 * i + j] * y
                forecast = added if forecast is None else forecast + added
        assert forecast is not None  # a model has blocks
        return self.final(h, last), forecast

    def _gates(self, ahead: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """The weighted gate of every slot at the steps ahead, one (R, N, 1, D) per slot."""
        slots = 2 * len(self.blocks)
        steps, rows, _ = ahead.shape
        triples = ahead[..., : 3 * slots * self.width]
        gates = triples.reshape(steps, rows, slots, 3, self.width)[..., 2, :]
        scaled = gates * weights[:, None, :, None]
        found: tuple[Tensor, ...] = scaled.split(1, dim=2)
        return found


class Reuse(nn.Module):
    """A reuse step: the stream takes the forecast in place of the blocks."""

    def __init__(self, denoiser: Denoiser) -> None:
        """Share the embedding and the final layer of `denoiser`."""
        super().__init__()
        self.patch_embed, self.final = denoiser.patch_embed, denoiser.final
        last = 6 * denoiser.width * len(denoiser.blocks)
        self.columns = slice(last, last + 2 * denoiser.width)

    def forward(self, sample: Tensor, features: Tensor, forecast: Tensor) -> Tensor:
        """(N, C, H, W), (N, F), (N, S, D) -> output (N, C', H, W)."""
        h = self.patch_embed(sample) + forecast
        output: Tensor = self.final(h, features[:, self.columns])
        return output


class DiTAdapter:
    """`Adapter` for `DiTTransformer2DModel`."""

    architecture = "DiTTransformer2DModel"

    @staticmethod
    def check(config: Mapping[str, Any]) -> None:
        """Refuse an activation other than the two GELUs."""
        activation = config.get("activation_fn", "gelu-approximate")
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"model: activation_fn {activation!r} is not supported; "
                f"expected {' or '.join(ACTIVATIONS)}"
            )

    def __init__(self, model: DiTTransformer2DModel, named: int | None = None) -> None:
        """Take `model` apart; its parameters are shared. `named` of its classes have names."""
        config = model.config
        self.check(config)
        check_names(named, config.num_embeds_ada_norm)
        model = model.float().eval().requires_grad_(False)
        size = config.sample_size
        self.sample_shape = (config.in_channels, size, size)
        self.output_channels = model.out_channels
        self.num_classes = self.null_label = config.num_embeds_ada_norm
        names = [(f"blocks.{i}.attn", f"blocks.{i}.mlp") for i in range(config.num_layers)]
        self.slots = tuple(name for pair in names for name in pair)
        self.temporal: Temporal = TemporalFeatures(model).eval().requires_grad_(False)
        denoiser = Denoiser(model).eval().requires_grad_(False)
        self.denoiser: nn.Module = denoiser
        self.reuse: nn.Module = Reuse(denoiser).eval()
        self.slot_shape: tuple[int, ...] = ((size // config.patch_size) ** 2, model.inner_dim)
        self.stem = denoiser.patch_embed
        width, layers = model.inner_dim, config.num_layers
        self.parts = (
            *(
                Part(f"blocks.{i}", block, slice(6 * width * i, 6 * width * (i + 1)), 6)
                for i, block in enumerate(denoiser.blocks)
            ),
            Part("final", denoiser.final, slice(6 * width * layers, (6 * layers + 2) * width), 2),
        )
        self.shallow: tuple[str, ...] = ("final",)

    def layers(self) -> dict[str, Layer]:
        """The Linears of the blocks and of the final layer."""
        return {**linears_of(self.denoiser)}

    def positions(self) -> dict[str, int]:
        """One row per token."""
        return dict.fromkeys(self.layers(), self.slot_shape[0])

    def temporal_linears(self) -> dict[str, nn.Linear]:
        """The Linears of the TIB; the label tables are looked up, not multiplied."""
        return linears_of(self.temporal, TEMPORAL)

    def modulated(self) -> dict[str, Modulated]:
        """The Linears behind a modulated norm: every block's first of each slot."""
        width = self.slot_shape[1]
        found = {}
        for i in range(len(self.slots) // 2):
            for j, layer in enumerate(("attn.qkv", "mlp.fc1")):
                shift = (6 * i + 3 * j) * width
                found[f"blocks.{i}.{layer}"] = Modulated(shift, shift + width, width)
        return found

    def chained(self) -> dict[str, tuple[str, int]]:
        """The attention's output Linear mixes values, which qkv's last third of rows makes."""
        first, blocks = 2 * self.slot_shape[1], range(len(self.slots) // 2)
        return {f"blocks.{i}.attn.proj": (f"blocks.{i}.attn.qkv", first) for i in blocks}
