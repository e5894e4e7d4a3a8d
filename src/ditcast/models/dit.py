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
from ditcast.models.dit_network import ACTIVATIONS, Block, Denoiser
from ditcast.models.dit_steps import STEPS
from ditcast.recipe import TEMPORAL


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

    def own(self, timesteps: Tensor, class_labels: Tensor) -> Tensor:
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


class DiTAdapter:
    """`Adapter` for `DiTTransformer2DModel`."""

    architecture = "DiTTransformer2DModel"
    captioned = False

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
        approximate = ACTIVATIONS[config.activation_fn]
        blocks = [Block(b, (b.norm1.norm, b.norm3), approximate) for b in model.transformer_blocks]
        denoiser = Denoiser(model, blocks, model.proj_out_2).eval().requires_grad_(False)
        self.denoiser: nn.Module = denoiser
        self.steps: dict[str, nn.Module] = {"full": denoiser}
        self.steps |= {name: make(denoiser).eval() for name, make in STEPS.items()}
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
