"""What a U-Net is made of: residual blocks, attentions and resizing convolutions, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from ditcast.models.base import Part
from ditcast.models.operators import Attention


class Resnet(nn.Module):
    """A residual block without its projection of the time; it may resize its input."""

    def __init__(self, block: Any) -> None:
        """Share the parameters of a diffusers `ResnetBlock2D`."""
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.shortcut = block.conv_shortcut or nn.Identity()
        self.resize: nn.Module = nn.Identity()
        if block.up:
            self.resize = nn.Upsample(scale_factor=2.0, mode="nearest")
        elif block.down:
            self.resize = nn.AvgPool2d(2)
        self.scales = block.time_embedding_norm == "scale_shift"
        self.divisor = block.output_scale_factor

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """(N, C, H, W) and (N, C') or (N, 2 C') -> (N, C', H', W')."""
        x = self.conv1(self.resize(functional.silu(self.norm1(h))))
        rows = features[:, :, None, None]
        if self.scales:
            scale, shift = rows.chunk(2, dim=1)
            x = self.norm2(x) * (1 + scale) + shift
        else:
            x = self.norm2(x + rows)
        x = self.conv2(functional.silu(x))
        return _divided(self.shortcut(self.resize(h)) + x, self.divisor)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, added to the stream."""

    def __init__(self, block: Any) -> None:
        """Copy q, k, v of a diffusers attention into one Linear; share the rest."""
        super().__init__()
        self.norm = block.group_norm or nn.Identity()
        self.attn = Attention(block)
        self.divisor = block.rescale_output_factor

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); there are no features."""
        del features
        pixels = self.norm(h).flatten(2).transpose(1, 2)  # (N, S, C)
        y = self.attn(pixels).transpose(1, 2).reshape(h.shape)
        return _divided(y + h, self.divisor)


class Resized(nn.Module):
    """A convolution that halves the image, or that follows its doubling."""

    def __init__(self, sampler: Any, up: bool) -> None:
        """Share the convolution of a diffusers `Downsample2D` or `Upsample2D`."""
        super().__init__()
        self.before: nn.Module = nn.Identity()
        if up:
            self.before = nn.Upsample(scale_factor=2.0, mode="nearest")
        elif sampler.padding == 0:
            self.before = nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = sampler.conv

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W'); there are no features."""
        del features
        found: Tensor = self.conv(self.before(h))
        return found


class Stem(nn.Module):
    """The first convolution."""

    def __init__(self, model: UNet2DModel) -> None:
        """Share its parameters."""
        super().__init__()
        self.conv, self.centers = model.conv_in, model.config.center_input_sample

    def forward(self, sample: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W)."""
        found: Tensor = self.conv(2 * sample - 1 if self.centers else sample)
        return found


class FinalLayer(nn.Module):
    """Norm, SiLU, convolution."""

    def __init__(self, model: UNet2DModel) -> None:
        """Share the parameters of `model`."""
        super().__init__()
        self.norm, self.conv = model.conv_norm_out, model.conv_out

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W); there are no features."""
        del features
        found: Tensor = self.conv(functional.silu(self.norm(h)))
        return found


def _divided(x: Tensor, divisor: float) -> Tensor:
    return x if divisor == 1 else x / divisor


class Unit(NamedTuple):
    """A part that has no name yet: its output's channels, and how much wider it is than its input.

    `resnet` is the diffusers block whose projection makes its features, or None.
    """

    module: nn.Module
    channels: int
    resnet: Any = None
    widening: float = 1.0
    takes_skip: bool = False
    leaves_skip: bool = False


def units_of(model: UNet2DModel) -> Iterator[Unit]:
    """The units of a model in network order, without the stem and the final layer."""
    for block in model.down_blocks:
        for pair in _pairs(block):
            yield from pair[:-1]
            yield pair[-1]._replace(leaves_skip=True)
        for sampler in block.downsamplers or ():
            yield _sampler(sampler, up=False)._replace(leaves_skip=True)
    if model.mid_block is not None:
        first, *others = model.mid_block.resnets
        yield _resnet(first)
        for attention, resnet in zip(model.mid_block.attentions, others, strict=True):
            yield from () if attention is None else (_attention(attention),)
            yield _resnet(resnet)
    for block in model.up_blocks:
        for pair in _pairs(block):
            yield pair[0]._replace(takes_skip=True)
            yield from pair[1:]
        for sampler in block.upsamplers or ():
            yield _sampler(sampler, up=True)


def _pairs(block: Any) -> Iterator[list[Unit]]:
    """Each residual block, with its attention where it has one."""
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        yield [_resnet(resnet)] + ([] if attention is None else [_attention(attention)])


def _resnet(block: Any) -> Unit:
    widening = 2.0 if block.up else 0.5 if block.down else 1.0
    return Unit(Resnet(block), block.out_channels, block, widening)


def _attention(block: Any) -> Unit:
    return Unit(AttentionBlock(block), block.to_out[0].out_features)


def _sampler(sampler: Any, *, up: bool) -> Unit:
    if hasattr(sampler, "time_emb_proj"):
        return _resnet(sampler)
    return Unit(Resized(sampler, up), sampler.out_channels, widening=2.0 if up else 0.5)


def make_parts(units: list[Unit], final: nn.Module) -> tuple[Part, ...]:
    """The units with their names and their columns of the features."""
    parts, start = [], 0
    for i, unit in enumerate(units):
        width = 0 if unit.resnet is None else unit.resnet.time_emb_proj.out_features
        vectors = width // unit.channels
        columns = slice(start, start + width)
        skips = (unit.takes_skip, unit.leaves_skip)
        parts.append(Part(f"blocks.{i}", unit.module, columns, vectors, *skips))
        start += width
    return (*parts, Part("final", final, slice(start, start), 0))
