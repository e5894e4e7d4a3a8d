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
    sinusoid,
)
from ditcast.models.dit_network import ACTIVATIONS, MODULATIONS, Block, Denoiser
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
        waves = sinusoid(timesteps, self.frequencies)
        parts = []
        for i, modulation in enumerate(self.modulation):
            condition = self._condition(i, waves, class_labels)
            parts.append(modulation(condition))
            if i == 0:
                final = self.final(condition)
        return torch.cat([*parts, final], dim=-1)

    def part(self, index: int, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """The features of one part of the network for pairs (N,) and (N,); the last is final."""
        last = index == len(self.modulation)
        owner = 0 if last else index
        waves = sinusoid(timesteps, self.frequencies)
        time, label = self.time[owner](waves), self.label[owner](class_labels)
        condition = functional.silu(time + label)
        found: Tensor = (self.final if last else self.modulation[index])(condition)
        return found

    def _condition(self, index: int, waves: Tensor, class_labels: Tensor) -> Tensor:
        """What the modulations of a block see: (T, U, D)."""
        time, label = self.time[index](waves), self.label[index](class_labels)
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
        self.num_classes = self.null_label = config.num_embeds_ada_norm
        approximate = ACTIVATIONS[config.activation_fn]
        blocks = [Block(b, (b.norm1.norm, b.norm3), approximate) for b in model.transformer_blocks]
        self.take(model, TemporalFeatures(model), Denoiser(model, blocks, model.proj_out_2))

    def take(self, model: Any, temporal: Temporal, denoiser: Denoiser) -> None:
        """Become the adapter of a diffusers transformer with these two halves."""
        size = model.config.sample_size
        self.sample_shape = (model.config.in_channels, size, size)
        self.output_channels = model.out_channels
        self.temporal = temporal.eval().requires_grad_(False)
        self.denoiser: nn.Module = denoiser.eval().requires_grad_(False)
        self.steps: dict[str, nn.Module] = {"full": denoiser}
        self.steps |= {name: make(denoiser).eval() for name, make in STEPS.items()}
        self.slot_shape: tuple[int, ...] = (
            (size // model.config.patch_size) ** 2,
            model.inner_dim,
        )
        self.stem = denoiser.patch_embed
        self.parts = _parts(denoiser)
        self.slots = tuple(
            f"blocks.{i}.{slot}" for i, block in enumerate(denoiser.blocks) for slot in block.SLOTS
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
        """The Linears behind a modulated norm: the first of attention and MLP."""
        width, found = self.slot_shape[1], {}
        for i, part in enumerate(self.parts[:-1]):
            for j, layer in enumerate(("attn.qkv", "mlp.fc1")):
                shift = (MODULATIONS * i + 3 * j) * width
                found[f"{part.name}.{layer}"] = Modulated(shift, shift + width, width)
        return found

    def chained(self) -> dict[str, tuple[str, int]]:
        """The attention's output Linear mixes values, which qkv's last third of rows makes."""
        first, names = 2 * self.slot_shape[1], [part.name for part in self.parts[:-1]]
        return {f"{name}.attn.proj": (f"{name}.attn.qkv", first) for name in names}


def _parts(denoiser: Denoiser) -> tuple[Part, ...]:
    """The blocks and the final layer, with their columns one after the other."""
    width = MODULATIONS * denoiser.width
    blocks = [
        Part(
            f"blocks.{i}",
            block,
            slice(width * i, width * (i + 1)),
            MODULATIONS,
            shared=denoiser.shared,
        )
        for i, block in enumerate(denoiser.blocks)
    ]
    start = width * len(blocks)
    final = slice(start, start + 2 * denoiser.width)
    return (*blocks, Part("final", denoiser.final, final, 2))
