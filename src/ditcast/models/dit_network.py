"""The diffusion transformer without its TIB: blocks, final layer, and the full step."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from ditcast.models.operators import Attention

ACTIVATIONS = {"gelu": "none", "gelu-approximate": "tanh"}


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


class Slot(NamedTuple):
    """What one slot takes, behind norm and modulation, and gives, before its gate; (N, S, D)."""

    a: Tensor
    y: Tensor


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

    def slots(self, h: Tensor, features: Tensor) -> tuple[Tensor, list[Slot]]:
        """The same, with what both slots take and give."""
        found = []
        for j, module in enumerate((self.attn, self.mlp)):
            a, gate = self.enter(j, h, features)
            found.append(Slot(a, module(a)))
            h = h + gate * found[-1].y
        return h, found

    def enter(self, slot: int, h: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The input A (N, S, D) of slot 0 or 1, and the gate (N, 1, D) of its output."""
        norm = (self.norm1, self.norm2)[slot]
        shift, scale, gate = features.chunk(6, dim=-1)[3 * slot : 3 * slot + 3]
        return norm(h) * (1 + scale[:, None]) + shift[:, None], gate[:, None]


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
        *parts, last = self.rows(features)
        gates = self.gates(ahead, weights)
        h = self.patch_embed(sample)  # (N, S, D)
        forecast = None
        for i, (block, part) in enumerate(zip(self.blocks, parts, strict=True)):
            h, outputs = block.slots(h, part)
            for j, slot in enumerate(outputs):
                added = gates[2 * i + j] * slot.y
                forecast = added if forecast is None else forecast + added
        assert forecast is not None  # a model has blocks
        return self.final(h, last), forecast

    def rows(self, features: Tensor) -> tuple[Tensor, ...]:
        """The features of every block, (N, 6 D), and those of the final layer, (N, 2 D)."""
        widths = [6 * self.width] * len(self.blocks) + [2 * self.width]
        found: tuple[Tensor, ...] = features[:, : sum(widths)].split(widths, dim=-1)
        return found

    def gates(self, ahead: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """The weighted gate of every slot at the steps ahead, one (R, N, 1, D) per slot."""
        slots = 2 * len(self.blocks)
        steps, rows, _ = ahead.shape
        triples = ahead[..., : 3 * slots * self.width]
        gates = triples.reshape(steps, rows, slots, 3, self.width)[..., 2, :]
        scaled = gates * weights[:, None, :, None]
        found: tuple[Tensor, ...] = scaled.split(1, dim=2)
        return found
