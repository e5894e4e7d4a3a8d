"""The attention operator that the exporter sees whole."""

from __future__ import annotations

import math

import torch

from ditcast.models.operators import attention


def parts(heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Query, key and value (N, S, D) as a network makes them: slices of one tensor."""
    qkv = torch.randn(2, 5, 3 * 24, generator=torch.Generator().manual_seed(heads))
    query, key, value = qkv.chunk(3, dim=-1)
    return query, key, value, heads


def test_attention_is_softmax_of_scaled_products_per_head() -> None:
    """Written out, head by head."""
    for heads in (1, 3, 4):
        query, key, value, _ = parts(heads)
        width = 24 // heads
        wanted = []
        for h in range(heads):
            q, k, v = (x[..., h * width : (h + 1) * width] for x in (query, key, value))
            wanted.append((q @ k.mT / math.sqrt(width)).softmax(dim=-1) @ v)
        found = attention(query, key, value, heads)
        torch.testing.assert_close(found, torch.cat(wanted, dim=-1), rtol=0, atol=1e-6)


def test_attention_is_a_well_behaved_operator() -> None:
    """Schema and fake tensors, by torch's own checks: the exporter relies on them."""
    for heads in (1, 4):
        torch.library.opcheck(torch.ops.ditcast.attention.default, parts(heads))
