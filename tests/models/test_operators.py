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


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    """Attention by its formula."""
    width, found = query.shape[-1] // heads, []
    for h in range(heads):
        q, k, v = (x[..., h * width : (h + 1) * width] for x in (query, key, value))
        found.append((q @ k.mT / math.sqrt(width)).softmax(dim=-1) @ v)
    return torch.cat(found, dim=-1)


def test_attention_is_softmax_of_scaled_products_per_head() -> None:
    """Written out, head by head."""
    for heads in (1, 3, 4):
        found, wanted = attention(*parts(heads)), written_out(*parts(heads))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_attention_is_a_well_behaved_operator() -> None:
    """Schema and fake tensors, by torch's own checks: the exporter relies on them."""
    for heads in (1, 4):
        torch.library.opcheck(torch.ops.ditcast.attention.default, parts(heads))


def test_gradients_are_those_of_the_formula() -> None:
    """Reconstruction trains through attention; the operator computes it once more for that."""
    query, key, value, heads = parts(3)
    weights = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(9))
    found: list[torch.Tensor | None] = []
    wanted: list[torch.Tensor | None] = []
    for computed, gradients in ((attention, found), (written_out, wanted)):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        q, k, v = inputs
        (computed(q, k, v, heads) * weights).sum().backward()
        gradients += [x.grad for x in inputs]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
