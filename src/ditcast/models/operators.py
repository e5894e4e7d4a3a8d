"""Attention: an operator that reaches the exporter whole, so that it becomes one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@torch.library.custom_op("ditcast::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention of three (N, S, D) tensors, without a mask; returns (N, S, D)."""
    return _attend(query, key, value, heads)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    n, tokens, width = query.shape
    shape = (n, tokens, heads, width // heads)
    q, k, v = (x.reshape(shape).transpose(1, 2) for x in (query, key, value))
    mixed = functional.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).reshape(n, tokens, width).contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    del key, value, heads
    return torch.empty_like(query)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:3])
    ctx.heads = inputs[3]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Compute once more, this time with a gradient; only calibration ever trains."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        query, key, value = inputs
        output = _attend(query, key, value, ctx.heads)
        found = torch.autograd.grad(output, inputs, gradient)
    return *found, None


attention.register_autograd(_backward, setup_context=_remember)


class Attention(nn.Module):
    """Self-attention with one Linear for query, key and value."""

    def __init__(self, attention: Any) -> None:
        """Copy q, k, v of a diffusers attention into one Linear; share the output Linear."""
        super().__init__()
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.heads = attention.heads
        has_bias = parts[0].bias is not None
        self.qkv = nn.Linear(parts[0].in_features, 3 * parts[0].out_features, bias=has_bias)
        self.qkv.weight.data = torch.cat([part.weight.data for part in parts])
        if has_bias:
            self.qkv.bias.data = torch.cat([part.bias.data for part in parts])
        self.proj = attention.to_out[0]

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, D) -> (N, S, D)."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        projected: Tensor = self.proj(attention(query, key, value, self.heads))
        return projected
