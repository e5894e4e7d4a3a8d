"""Operators that reach the exporter whole, so that each becomes one node of the graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


@torch.library.custom_op("ditcast::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention of three (N, S, D) tensors, without a mask; returns (N, S, D)."""
    n, tokens, width = query.shape
    shape = (n, tokens, heads, width // heads)
    q, k, v = (x.reshape(shape).transpose(1, 2) for x in (query, key, value))
    mixed = functional.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).reshape(n, tokens, width).contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    del key, value, heads
    return torch.empty_like(query)
