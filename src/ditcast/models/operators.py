"""Operators that reach the exporter whole, so that each becomes one node of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
