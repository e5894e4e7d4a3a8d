"""The diffusion transformer without its TIB: blocks, final layer, and the full step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from ditcast.models.operators import Attention

ACTIVATIONS = {"gelu": "none", "gelu-approximate": "tanh"}
MODULATIONS = 6  # vectors of a block


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
    """One transformer block without its TIB: two norms and two slots, which are its modules."""

    SLOTS: tuple[str, ...] = ("attn", "mlp")

    def __init__(self, block: Any, norms: tuple[nn.Module, nn.Module], approximate: str) -> None:
        """Share the parameters of a diffusers block, of which `norms` are those of the slots."""
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn = Attention(block.attn1)
        self.mlp = Mlp(block.ff, approximate)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """(N, S, D) and the block's features (N, 6 D) -> (N, S, D)."""
        return self.slots(h, features)[0]

    def slots(self, h: Tensor, features: Tensor) -> tuple[Tensor, list[Slot]]:
        """The same, with what its slots take and give."""
        found = []
        for j in range(len(self.SLOTS)):
            a, gate = self.enter(j, h, features)
            found.append(Slot(a, self.compute(j, a, features)))
            h = h + gate * found[-1].y
        return h, found

    def enter(self, slot: int, h: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The input A (N, S, D) of slot 0 or 1, and the gate (N, 1, D) of its output."""
        norm = (self.norm1, self.norm2)[slot]
        shift, scale, gate = features.chunk(6, dim=-1)[3 * slot : 3 * slot + 3]
        return norm(h) * (1 + scale[:, None]) + shift[:, None], gate[:, None]

    def compute(self, slot: int, a: Tensor, features: Tensor) -> Tensor:
        """The output Y (N, S, D) of slot 0 or 1, of its input A."""
        del features
        found: Tensor = (self.attn, self.mlp)[slot](a)
        return found


class FinalLayer(nn.Module):
    """Norm, modulation, projection and un-patching."""

    def __init__(self, model: Any, proj: nn.Linear) -> None:
        """Share the parameters of a diffusers model, whose last Linear is `proj`."""
        super().__init__()
        self.norm, self.proj = model.norm_out, proj
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

    shared: slice | None = None  # the features that all blocks take beside their own

    def __init__(self, model: Any, blocks: Sequence[Block], proj: nn.Linear) -> None:
        """Around the blocks of a diffusers model, whose last Linear is `proj`; it is shared."""
        super().__init__()
        self.patch_embed = model.pos_embed
        self.blocks: Any = nn.ModuleList(blocks)  # typed, iterating it gives no Block
        self.final = FinalLayer(model, proj)
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
        forecast, remaining = None, iter(gates)
        for block, part in zip(self.blocks, parts, strict=True):
            h, outputs = block.slots(h, part)
            for slot in outputs:
                added = next(remaining) * slot.y
                forecast = added if forecast is None else forecast + added
        assert forecast is not None  # a model has blocks
        return self.final(h, last), forecast

    def rows(self, features: Tensor) -> tuple[Tensor, ...]:
        """What every block takes of the features, and the final layer: (N, 6 D) and (N, 2 D)."""
        widths = [6 * self.width] * len(self.blocks) + [2 * self.width]
        found: tuple[Tensor, ...] = features[:, : sum(widths)].split(widths, dim=-1)
        return found

    def gates(self, ahead: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """The weighted gate of every slot at the steps ahead, one (R, N, 1, D) per slot."""
        scaled = self.all_gates(ahead) * weights[:, None, :, None]
        found: tuple[Tensor, ...] = scaled.split(1, dim=2)
        return found

    def all_gates(self, ahead: Tensor) -> Tensor:
        """The gates of all slots, (R, N, K, D)."""
        slots = 2 * len(self.blocks)
        steps, rows, _ = ahead.shape
        triples = ahead[..., : 3 * slots * self.width]
        return triples.reshape(steps, rows, slots, 3, self.width)[..., 2, :]
