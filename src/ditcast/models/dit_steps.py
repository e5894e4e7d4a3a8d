"""The steps of a diffusion transformer that are not full: gauges, and ways to reuse.

Each is built around the full step, whose modules it shares under the same names. `cache.stepping`
says how a trajectory is put together from them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ditcast.models.dit_network import Denoiser

# Below all sums of magnitudes that mean something; the exporter takes 1e-8 for 0 and drops the sum.
TINY = 1e-7


class _Step(nn.Module):
    """A step that shares the embedding, the blocks and the final layer of the full one."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.patch_embed, self.final = denoiser.patch_embed, denoiser.final
        self.blocks, self.rows, self.gates = denoiser.blocks, denoiser.rows, denoiser.gates


class Reuse(_Step):
    """The stream takes the forecast in place of the blocks."""

    def forward(self, sample: Tensor, features: Tensor, forecast: Tensor) -> Tensor:
        """(N, C, H, W), (N, F), (N, S, D) -> output (N, C', H, W)."""
        h = self.patch_embed(sample) + forecast
        output: Tensor = self.final(h, self.rows(features)[-1])
        return output


def _drift(now: Tensor, expected: Tensor, relative_to: Tensor) -> Tensor:
    """Relative L1 distance of the worst sample, ()."""
    distance = (now - expected).abs().sum(dim=(1, 2))
    return (distance / (relative_to.abs().sum(dim=(1, 2)) + TINY)).max()


def _expected(before: Tensor, factors: Tensor) -> Tensor:
    """The weighted sum (N, ...) of gauges (H, N, ...)."""
    return (factors.reshape(-1, *[1] * (before.dim() - 1)) * before).sum(dim=0)


class Change(_Step):
    """How far the first block's modulated input has moved (TeaCache's indicator)."""

    def forward(
        self, sample: Tensor, features: Tensor, before: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N, C, H, W), (N, F), (H, N, S, D), (H,) -> gauge (N, S, D), drift ()."""
        h = self.patch_embed(sample)
        gauge, _ = self.blocks[0].enter(0, h, self.rows(features)[0])
        expected = _expected(before, factors)
        return gauge, self.drift(gauge, expected)

    def drift(self, gauge: Tensor, expected: Tensor) -> Tensor:
        """Relative to what it was."""
        return _drift(gauge, expected, expected)


class Surprise(Change):
    """How wrong the first input's own forecast is (RFC, RCS)."""

    def drift(self, gauge: Tensor, expected: Tensor) -> Tensor:
        """Relative to what it is."""
        return _drift(gauge, expected, gauge)


class FirstBlock(_Step):
    """The first block, and how far its residual has moved (First-Block-Cache)."""

    def forward(
        self, sample: Tensor, features: Tensor, before: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C, H, W), (N, F), (H, N, S, D), (H,) -> gauge (N, S, D), drift (), stream."""
        h = self.patch_embed(sample)
        stream = self.blocks[0](h, self.rows(features)[0])
        gauge, expected = stream - h, _expected(before, factors)
        return gauge, _drift(gauge, expected, expected), stream


class Rest(_Step):
    """All blocks but the first, and what they add to the stream."""

    def forward(self, stream: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, S, D), (N, F) -> output (N, C', H, W), residual (N, S, D)."""
        _, *parts, last = self.rows(features)
        h = stream
        for block, part in zip(self.blocks[1:], parts, strict=True):
            h = block(h, part)
        return self.final(h, last), h - stream


class Finish(_Step):
    """The first block's stream takes the residual of the others."""

    def forward(self, stream: Tensor, features: Tensor, residual: Tensor) -> Tensor:
        """(N, S, D), (N, F), (N, S, D) -> output (N, C', H, W)."""
        # Flat, because ONNX Runtime fuses a sum of this shape and the norm behind it, with other
        # last bits, where it knows the shapes: in a session of its own, but not in a loop.
        h = (stream.flatten(1) + residual.flatten(1)).reshape(stream.shape)
        output: Tensor = self.final(h, self.rows(features)[-1])
        return output


class Observe(_Step):
    """A full step that hands out what each of K slots takes and gives."""

    def forward(
        self, sample: Tensor, features: Tensor, y: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output (N, C', H, W), the last H outputs y (H, K, N, S, D), inputs a, slopes (K, N).

        `y` and `a` (K, N, S, D) are those of the full step before. A slope is the length of the
        output's change over that of the input's (RFC), per sample.
        """
        *parts, last = self.rows(features)
        h, slots = self.patch_embed(sample), []
        for block, part in zip(self.blocks, parts, strict=True):
            h, found = block.slots(h, part)
            slots += found
        now, given = torch.stack([slot.y for slot in slots]), torch.stack([s.a for s in slots])
        slope = _length(now - y[0]) / (_length(given - a) + TINY)
        kept = torch.cat([now[None], y])[: y.shape[0]]
        return self.final(h, last), kept, given, slope


def _length(x: Tensor) -> Tensor:
    """The L2 norm of every sample, over tokens and channels: (..., S, D) -> (...)."""
    return x.square().sum(dim=(-2, -1)).sqrt()


class Extrapolate(_Step):
    """Every slot is a weighted sum of its last outputs."""

    def forward(self, sample: Tensor, features: Tensor, factors: Tensor, y: Tensor) -> Tensor:
        """(N, C, H, W), (N, F), (H,), (H, K, N, S, D) -> output (N, C', H, W)."""
        h, slots = self.patch_embed(sample), _expected(y, factors)
        gates = self.gates(features[None], features.new_ones(1, len(slots)))
        for gate, slot in zip(gates, slots.unbind(), strict=True):
            h = h + gate[0] * slot
        output: Tensor = self.final(h, self.rows(features)[-1])
        return output


def estimate(y: Tensor, increment: Tensor, slope: Tensor, moved: Tensor) -> Tensor:
    """RFE of one slot: `y + slope |moved| increment / |increment|`, (N, S, D), per sample.

    `slope` is (N,); without an increment there is no change.
    """
    length = slope * _length(moved) / (_length(increment) + TINY)
    return y + length[:, None, None] * increment


class Relate(_Step):
    """Every slot changes in the direction of its forecast, as far as its input has (RFE)."""

    def forward(
        self,
        sample: Tensor,
        features: Tensor,
        factors: Tensor,
        y: Tensor,
        a: Tensor,
        slope: Tensor,
    ) -> Tensor:
        """(N, C, H, W), (N, F), (H,), (H, K, N, S, D), (K, N, S, D), (K, N) -> output.

        The increment is what the factors forecast, and the input that of the stream which earlier
        slots have estimated.
        """
        *parts, last = self.rows(features)
        h, increments = self.patch_embed(sample), _expected(y, factors) - y[0]
        slots = itertools.count()
        for block, part in zip(self.blocks, parts, strict=True):
            for j in range(len(block.SLOTS)):
                k = next(slots)
                now, gate = block.enter(j, h, part)
                h = h + gate * estimate(y[0, k], increments[k], slope[k], now - a[k])
        output: Tensor = self.final(h, last)
        return output


class Partial(_Step):
    """Each slot is computed, or repeats what it gave last; gates are those of this step."""

    def forward(
        self, sample: Tensor, features: Tensor, mask: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        """(N, C, H, W), (N, F), (K,), K times (N, S, D) -> output, K times (N, S, D).

        A mask of 1 computes a slot, 0 does not. Export turns the choice into a branch.
        """

        def choose(k: int, y: Tensor) -> Tensor:
            return torch.where(mask[k] > 0.5, y, cache[k])

        return self.walk(sample, features, choose)

    def soft(
        self, sample: Tensor, features: Tensor, scores: Tensor, cache: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """The same with scores (K,) in [0, 1] that mix both (HarmoniCa's student).

        A slot whose cache is empty (None) is computed, whatever its score.
        """

        def mix(k: int, y: Tensor) -> Tensor:
            held = cache[k]
            return y if held is None else scores[k] * y + (1 - scores[k]) * held

        return self.walk(sample, features, mix)

    def walk(
        self, sample: Tensor, features: Tensor, choose: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """All blocks, where `choose(k, y)` gives what takes the place of slot k's output."""
        *parts, last = self.rows(features)
        h, kept = self.patch_embed(sample), list[Tensor]()
        for block, part in zip(self.blocks, parts, strict=True):
            for j in range(len(block.SLOTS)):
                a, gate = block.enter(j, h, part)
                kept.append(choose(len(kept), block.compute(j, a, part)))
                h = h + gate * kept[-1]
        return self.final(h, last), *kept


STEPS: dict[str, Callable[[Denoiser], nn.Module]] = {
    "reuse": Reuse,
    "change": Change,
    "surprise": Surprise,
    "block": FirstBlock,
    "rest": Rest,
    "finish": Finish,
    "observe": Observe,
    "extrapolate": Extrapolate,
    "relate": Relate,
    "partial": Partial,
}
