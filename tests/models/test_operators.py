"""The attention operator that the exporter sees whole."""

from __future__ import annotations

import math
from typing import Any

import torch

from ditcast.models.operators import attention


def parts(heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Query, key and value (N, S, D) as a network makes them: slices of one tensor."""
    qkv = torch.randn(2, 5, 3 * 24, generator=torch.Generator().manual_seed(heads))
    query, key, value = qkv.chunk(3, dim=-1)
    return query, key, value, heads


def to_others(heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """The same with seven other tokens for key and value, and a bias (N, 7) of their scores."""
    generator = torch.Generator().manual_seed(heads)
    key, value = torch.randn(2, 7, 2 * 24, generator=generator).chunk(2, dim=-1)
    bias = torch.tensor([[0.0, 0, 0, -1e4, -1e4, -1e4, -1e4], [0, -1, 2, 0, 0, 0, -1e4]])
    return parts(heads)[0], key, value, heads, bias


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by its formula."""
    width, found = query.shape[-1] // heads, []
    added = 0 if bias is None else bias[:, None]
    for h in range(heads):
        q, k, v = (x[..., h * width : (h + 1) * width] for x in (query, key, value))
        found.append((q @ k.mT / math.sqrt(width) + added).softmax(dim=-1) @ v)
    return torch.cat(found, dim=-1)


def test_attention_is_softmax_of_scaled_products_per_head() -> None:
    """Written out, head by head."""
    for heads in (1, 3, 4):
        for given in (parts(heads), to_others(heads)):
            found, wanted = attention(*given), written_out(*given)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_attention_is_a_well_behaved_operator() -> None:
    """Schema and fake tensors, by torch's own checks: the exporter relies on them."""
    for heads in (1, 4):
        for given in (parts(heads), to_others(heads)):
            torch.library.opcheck(torch.ops.ditcast.attention.default, given)


def test_gradients_are_those_of_the_formula() -> None:
    """Reconstruction trains through attention; the operator computes it once more for that."""
    weights = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(9))
    for query, key, value, *others in (parts(3), to_others(3)):
        _compare_gradients([query, key, value], others, weights)


def _compare_gradients(given: list[torch.Tensor], others: list[Any], weights: torch.Tensor) -> None:
    """With respect to query, key and value, of a weighted sum of outputs."""
    found: list[torch.Tensor | None] = []
    wanted: list[torch.Tensor | None] = []
    for computed, gradients in ((attention, found), (written_out, wanted)):
        inputs = [x.clone().requires_grad_() for x in given]
        query, key, value = inputs
        (computed(query, key, value, *others) * weights).sum().backward()
        gradients += [x.grad for x in inputs]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
