"""Adapter for diffusers' `PixArtTransformer2DModel` (Chen et al. 2023, arXiv 2310.00426; Sigma).

It is the DiT of `models.dit_network` with two differences. The TIB is one for all blocks (adaLN-
single): timestep embedder, SiLU, and one Linear, to whose output each block adds a table of its
own; it does not depend on the condition. And between attention and MLP each block attends to a
caption, which takes no norm, no modulation and no gate.

A label is the number of a caption (`models.captions`). The projected caption and its mask are
features that all blocks share, behind the modulations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from ditcast.errors import UnsupportedError
from ditcast.models.base import (
    Temporal,
    check_names,
    frequencies,
    sinusoid,
)
from ditcast.models.captions import CaptionFeatures, Captions
from ditcast.models.dit import DiTAdapter
from ditcast.models.dit_network import ACTIVATIONS, MODULATIONS, Block, Denoiser
from ditcast.models.operators import CrossAttention
from ditcast.recipe import TEMPORAL

# What can be taken apart; the first value is what diffusers has where a config lacks the key.
CONFIG: dict[str, tuple[str, ...]] = {
    "activation_fn": ("gelu-approximate", "gelu"),
    "norm_type": ("ada_norm_single",),
    "attention_type": ("default",),
}
PIXELS = 8  # of an edge, that one of a latent stands for: what the size embedder is told


class TemporalFeatures(Temporal):
    """The TIB, and behind what it makes the caption's features, which no timestep moves.

    F is block-major: shift, scale, gate (attention), shift, scale, gate (MLP) of each block, then
    the final shift and scale; then the caption's L D tokens and its mask, L.
    """

    by_label = False

    def __init__(self, model: PixArtTransformer2DModel, captions: CaptionFeatures) -> None:
        """Share the parameters of `model`; the blocks' tables are copied into one."""
        super().__init__(captions)
        embedder = model.adaln_single.emb
        self.time, self.modulation = embedder.timestep_embedder, model.adaln_single.linear
        tables = torch.stack([b.scale_shift_table.flatten() for b in model.transformer_blocks])
        self.tables = nn.Parameter(tables)  # (blocks, 6 D)
        self.final = model.scale_shift_table
        self.register_buffer("frequencies", frequencies(embedder.time_proj))
        self.frequencies: Tensor
        self.register_buffer("size", _size(model))
        self.size: Tensor | None

    def own(self, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """(T,) float32 and (U,) int64 -> (T, U, ...), equal for all U."""
        embedded = self._embedded(timesteps)
        blocks = self.modulation(functional.silu(embedded))[:, None] + self.tables
        found = torch.cat([blocks.flatten(1), self._final(embedded)], dim=1)
        return found[:, None].expand(-1, class_labels.shape[0], -1)

    def part(self, index: int, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """The own features of one part for pairs (N,) and (N,); the last is final."""
        del class_labels
        embedded = self._embedded(timesteps)
        if index == len(self.tables):
            return self._final(embedded)
        found: Tensor = self.modulation(functional.silu(embedded)) + self.tables[index]
        return found

    def _embedded(self, timesteps: Tensor) -> Tensor:
        """The embedding of timestep and size, (T, D)."""
        found: Tensor = self.time(sinusoid(timesteps, self.frequencies))
        return found if self.size is None else found + self.size

    def _final(self, embedded: Tensor) -> Tensor:
        """Shift and scale of the final layer, (T, 2 D)."""
        found: Tensor = (embedded[:, None] + self.final).flatten(1)
        return found


@torch.no_grad()
def _size(model: PixArtTransformer2DModel) -> Tensor | None:
    """What the embedders of resolution and aspect ratio add, (D,): constant for square samples."""
    if not model.use_additional_conditions:
        return None
    embedder, edge = model.adaln_single.emb, float(PIXELS * model.config.sample_size)
    device = model.scale_shift_table.device
    embedded = [
        embed(embedder.additional_condition_proj(torch.tensor(values, device=device))).flatten()
        for embed, values in (
            (embedder.resolution_embedder, [edge, edge]),
            (embedder.aspect_ratio_embedder, [1.0]),
        )
    ]
    return torch.cat(embedded)


class PixArtBlock(Block):
    """One transformer block without its TIB: three slots, of which the second sees the caption."""

    SLOTS = ("attn", "cross", "mlp")

    def __init__(self, block: Any, approximate: str, tokens: int) -> None:
        """Share the parameters of a diffusers block; `tokens` is the length of captions."""
        super().__init__(block, (block.norm1, block.norm2), approximate)
        mlp = self.mlp
        del self.mlp
        self.cross, self.mlp = CrossAttention(block.attn2), mlp  # in the order of the slots
        self.tokens, self.width = tokens, self.cross.q.in_features

    def enter(self, slot: int, h: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The input A (N, S, D) of slot 0, 1 or 2, and the gate, which broadcasts to it."""
        if self.SLOTS[slot] == "cross":
            return h, h.new_ones(1, 1, 1)
        return super().enter(slot // 2, h, features[:, : MODULATIONS * self.width])

    def compute(self, slot: int, a: Tensor, features: Tensor) -> Tensor:
        """The output Y (N, S, D) of slot 0, 1 or 2, of its input A."""
        if self.SLOTS[slot] != "cross":
            return super().compute(slot // 2, a, features)
        widths = [MODULATIONS * self.width, self.tokens * self.width, self.tokens]
        _, caption, mask = features.split(widths, dim=1)
        found: Tensor = self.cross(a, caption.reshape(-1, self.tokens, self.width), mask)
        return found


class PixArtDenoiser(Denoiser):
    """A full step, as a DiT's, with a caption among the features and slots that have no gate."""

    def __init__(self, model: PixArtTransformer2DModel, tokens: int) -> None:
        """Share the parameters of `model` (some Linears are copied into one)."""
        approximate = ACTIVATIONS[model.config.activation_fn]
        blocks = [PixArtBlock(block, approximate, tokens) for block in model.transformer_blocks]
        super().__init__(model, blocks, model.proj_out)
        own = (MODULATIONS * len(blocks) + 2) * self.width
        self.shared = slice(own, own + tokens * (self.width + 1))

    def rows(self, features: Tensor) -> tuple[Tensor, ...]:
        """What every block takes of the features, and the final layer: (N, ...) and (N, 2 D)."""
        *parts, last = super().rows(features)
        caption = features[:, self.shared]
        return *(torch.cat([part, caption], dim=1) for part in parts), last

    def all_gates(self, ahead: Tensor) -> Tensor:
        """The gates of all slots, (R, N, K, D): 1 for those that attend to the caption."""
        gates = super().all_gates(ahead).unflatten(2, (len(self.blocks), 2))
        attn, mlp = gates.split(1, dim=3)
        return torch.cat([attn, torch.ones_like(attn), mlp], dim=3).flatten(2, 3)


class PixArtAdapter(DiTAdapter):
    """`Adapter` for `PixArtTransformer2DModel`, whose labels are captions."""

    architecture = "PixArtTransformer2DModel"
    captioned = True

    @staticmethod
    def check(config: Mapping[str, Any]) -> None:
        """Refuse variants that are not implemented, and captions that are not projected."""
        for key, known in CONFIG.items():
            if (value := config.get(key, known[0])) not in known:
                raise UnsupportedError(
                    f"model: {key} {value!r} is not supported in a PixArt transformer; expected "
                    f"{' or '.join(known)}; take another model, there is no adapter for this one"
                )
        if not isinstance(config.get("caption_channels"), int):
            raise UnsupportedError(
                f"model: caption_channels {config.get('caption_channels')!r} is not supported; "
                "expected the number of channels of the text encoder's embeddings"
            )
        width = config.get("num_attention_heads", 16) * config.get("attention_head_dim", 72)
        if (got := config.get("cross_attention_dim", 1152)) != width:
            raise UnsupportedError(
                f"model: cross_attention_dim {got!r} is not supported; expected {width}, the "
                "width of the projected captions"
            )

    def __init__(
        self, model: PixArtTransformer2DModel, named: int | None = None, *, captions: Captions
    ) -> None:
        """Take `model` apart; its parameters are shared. `named` of its captions have names."""
        config = model.config
        self.check(config)
        self.num_classes = self.null_label = len(captions.mask) - 1
        check_names(named, self.num_classes)
        model = model.float().eval().requires_grad_(False)
        table = CaptionFeatures(captions, model.caption_projection)
        self.tokens = table.tokens
        self.take(model, TemporalFeatures(model, table), PixArtDenoiser(model, table.tokens))

    def positions(self) -> dict[str, int]:
        """One row per token: of the caption for its keys and values, else of the sample."""
        return {
            name: self.tokens if name.endswith(".cross.kv") else self.slot_shape[0]
            for name in self.layers()
        }

    def temporal_linears(self) -> dict[str, nn.Linear]:
        """The Linears of the TIB; those that project captions depend on no timestep."""
        found = super().temporal_linears()
        return {n: linear for n, linear in found.items() if not n.startswith(f"{TEMPORAL}shared.")}

    def chained(self) -> dict[str, tuple[str, int]]:
        """Both attentions' output Linears mix values, the last rows of qkv and of kv."""
        width, names = self.slot_shape[1], [part.name for part in self.parts[:-1]]
        crossing = {f"{name}.cross.proj": (f"{name}.cross.kv", width) for name in names}
        return super().chained() | crossing
