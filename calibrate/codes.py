"""Codes of weights, inputs and features, and the searches for their scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ditcast.calibrate.ranges import SHRINK_STEPS
from ditcast.recipe import E4M3_TOP, levels

WEIGHT_POWER = 2.4  # error exponent of the weight search (TFMQ-DM code)
SMALLEST = 1e-12  # a range is never empty, even where a layer sees only zeros


def to_e4m3(steps: Tensor) -> Tensor:
    """The nearest numbers of float8 e4m3, ties to even, those too large being its largest.

    So does QuantizeLinear; a mere cast makes NaN of them.
    """
    return steps.clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn).to(steps.dtype)


def e4m3_scale(weight: Tensor) -> Tensor:
    """Scale (O,) of a weight (O, I) in float8 e4m3: its largest magnitude is the largest code."""
    return weight.reshape(len(weight), -1).abs().amax(dim=1).clamp(min=SMALLEST) / E4M3_TOP


def weight_limits(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a weight: symmetric, but for the 16 codes of 4 bits."""
    top = levels(bits)
    return (-top - 1 if bits <= 4 else -top), top


def grouped(weight: Tensor, scale: Tensor) -> Tensor:
    """The scale of every weight, (O, I), of a scale (O,) or (O, G)."""
    flat = weight.reshape(len(weight), -1)
    if scale.dim() == 1:
        return scale[:, None].expand_as(flat)
    return scale.repeat_interleave(flat.shape[1] // scale.shape[1], dim=1)


def weight_scale(weight: Tensor, *, search: bool, bits: int, group: int = 0) -> Tensor:
    """Symmetric scale of a weight (O, I): (O,) float32, or (O, G) for groups of `group` inputs.

    With `search`, of 80 shrunk ranges the one with the least mean |w - Q(w)|^2.4 (TFMQ-DM code);
    else the largest magnitude.
    """
    flat = weight.reshape(len(weight), -1)
    if group:
        parts = [weight_scale(part, search=search, bits=bits) for part in flat.split(group, dim=1)]
        return torch.stack(parts, dim=1)
    low, high = weight_limits(bits)
    largest = flat.abs().amax(dim=1).clamp(min=SMALLEST)
    if not search:
        return largest / high
    best, scale = torch.full_like(largest, float("inf")), largest / high
    for i in range(SHRINK_STEPS):
        candidate = largest * (1 - 0.01 * i) / high
        step = candidate[:, None]
        restored = torch.clamp(torch.round(flat / step), low, high) * step
        error = (flat - restored).abs().pow(WEIGHT_POWER).mean(dim=1)
        scale = torch.where(error < best, candidate, scale)
        best = torch.minimum(error, best)
    return scale


def weight_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes (O, I) as float32, to the nearest."""
    steps = weight.reshape(len(weight), -1) / grouped(weight, scale)
    return torch.clamp(torch.round(steps), *weight_limits(bits))


def fake_quantize(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | float, bits: int
) -> Tensor:
    """Round `x` to the codes of a signed integer, as QuantizeLinear does, and back.

    The gradient of rounding is that of the identity, so that scales can be learned (LSQ).
    """
    top = levels(bits)
    steps = x / scale + zero_point
    rounded = steps + (torch.round(steps) - steps).detach()
    return (torch.clamp(rounded, -top - 1, top) - zero_point) * scale


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges [low, high], which are widened to include 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST)
    return scale, torch.round(-low / scale) - levels(bits) - 1


def feature_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., D) of vectors, with the scale and zero point (...) of least squared error.

    Both ends of each range are shrunk together, 80 candidates (Temporal Feature Matters, cache-
    based maintenance; its text leaves the search open).
    """
    low, high = x.amin(dim=-1).clamp(max=0), x.amax(dim=-1).clamp(min=0)
    best = torch.full_like(low, float("inf"))
    scale, zero = affine(low, high, bits)
    for i in range(SHRINK_STEPS):
        shrink = 1 - 0.01 * i
        s, z = affine(low * shrink, high * shrink, bits)
        error = (fake_quantize(x, s[..., None], z[..., None], bits) - x).square().sum(dim=-1)
        scale, zero = torch.where(error < best, s, scale), torch.where(error < best, z, zero)
        best = torch.minimum(error, best)
    top = levels(bits)
    codes = torch.round(x / scale[..., None] + zero[..., None]).clamp(-top - 1, top)
    return codes, scale, zero
