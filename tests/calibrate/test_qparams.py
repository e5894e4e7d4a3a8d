"""Scales on disk, and the torch simulation of what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ditcast.calibrate.qparams import LayerScales, load, quantized, save


def scales() -> dict[str, LayerScales]:
    """Scales of two layers."""
    return {
        "b": LayerScales(activation=0.25, weight=torch.tensor([0.1, 0.2]), bits=8),
        "a": LayerScales(activation=0.5, weight=torch.tensor([0.3]), bits=7),
    }


def test_scales_survive_the_disk(tmp_path: Path) -> None:
    """Every value, and equal scales are equal bytes."""
    save(scales(), tmp_path / "one")
    save(scales(), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = load(tmp_path / "one")
    assert found.keys() == scales().keys()
    for name, held in scales().items():
        assert found[name].activation == held.activation
        assert torch.equal(found[name].weight, held.weight)
        assert found[name].bits == held.bits


@torch.no_grad()
def test_simulation_computes_with_codes() -> None:
    """By hand: x = 0.6 has code 2 of scale 0.25, weights 0.32 and -1.0 code 3 and -10 of 0.1."""
    linear = nn.Linear(1, 2)
    linear.weight.copy_(torch.tensor([[0.32], [-1.0]]))
    linear.bias.copy_(torch.tensor([1.0, 2.0]))
    held = {"layer": LayerScales(activation=0.25, weight=torch.tensor([0.1, 0.1]), bits=8)}
    with quantized({"layer": linear}, held):
        found = linear(torch.tensor([[0.6]]))
    torch.testing.assert_close(found, torch.tensor([[0.5 * 0.3 + 1, 0.5 * -1.0 + 2]]))


@torch.no_grad()
def test_simulation_leaves_no_trace() -> None:
    """Weights and behaviour are back afterwards, even after an error inside."""
    linear = nn.Linear(8, 4)
    weight, x = linear.weight.clone(), torch.randn(3, 8)
    wanted = linear(x)
    held = {"layer": LayerScales(activation=0.25, weight=torch.full((4,), 0.1), bits=8)}

    def fail() -> None:
        assert not torch.equal(linear(x), wanted)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), quantized({"layer": linear}, held):
        fail()
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear(x), wanted)
