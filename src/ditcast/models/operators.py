"""Attention: an operator that reaches the exporter whole, so that it becomes one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@torch.library.custom_op("ditcast::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None
) -> Tensor:
    """Multi-head attention of a query (N, S, D) to a key and a value (N, L, D); gives (N, S, D).

    `bias` (N, L) is added to the scores of all queries and heads.
    """
    return _attend(query, key, value, heads, bias)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    n, tokens, width = query.shape
    parts = (x.reshape(n, x.shape[1], heads, width // heads) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in parts)
    mask = None if bias is None else bias[:, None, None]
    mixed = functional.scaled_dot_product_attention(q, k, v, mask)
    return mixed.transpose(1, 2).reshape(n, tokens, width).contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    del key, value, heads, bias
    return torch.empty_like(query)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:3])
    ctx.heads, ctx.bias = inputs[3:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Compute once more, this time with a gradient; only calibration ever trains."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        query, key, value = inputs
        output = _attend(query, key, value, ctx.heads, ctx.bias)
        found = torch.autograd.grad(output, inputs, gradient)
    return *found, None, None


attention.register_autograd(_backward, setup_context=_remember)


class Attention(nn.Module):
    """Self-attention with one Linear for query, key and value."""

    def __init__(self, attention: Any) -> None:
        """Copy q, k, v of a diffusers attention into one Linear; share the output Linear."""
        super().__init__()
        self.heads = attention.heads
        self.qkv = _joined(attention.to_q, attention.to_k, attention.to_v)
        self.proj = attention.to_out[0]

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, D) -> (N, S, D)."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        projected: Tensor = self.proj(attention(query, key, value, self.heads))
        return projected


MASKED = 10000.0  # taken from the scores of a token that does not count, as in diffusers


class CrossAttention(nn.Module):
    """Attention to a caption, with one Linear for its key and value."""

    def __init__(self, attention: Any) -> None:
        """Copy k, v of a diffusers attention into one Linear; share the others."""
        super().__init__()
        self.heads = attention.heads
        self.q, self.kv = attention.to_q, _joined(attention.to_k, attention.to_v)
        self.proj = attention.to_out[0]

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        """(N, S, D), (N, L, D), and 1 for its tokens that count, else 0, (N, L) -> (N, S, D)."""
        bias = (mask - 1) * MASKED
        key, value = self.kv(caption).chunk(2, dim=-1)
        projected: Tensor = self.proj(attention(self.q(x), key, value, self.heads, bias))
        return projected


def _joined(*parts: nn.Linear) -> nn.Linear:
    """One Linear with the outputs of several, one after the other; a copy."""
    first, has_bias = parts[0], parts[0].bias is not None
    found = nn.Linear(first.in_features, len(parts) * first.out_features, bias=has_bias)
    found.weight.data = torch.cat([part.weight.data for part in parts])
    if has_bias:
        found.bias.data = torch.cat([part.bias.data for part in parts])
    return found
