"""The suite's own memory of traces never gives the graph of another module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import torch
from torch import nn

from tests.tracing import remembering

NAMES: dict[str, Any] = {"inputs": ["x"], "outputs": ["y"]}


def layer(seed: int = 0, width: int = 4, **settings: Any) -> nn.Module:
    """A Linear that is set to something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = nn.Linear(4, width)
    for name, value in settings.items():
        setattr(found, name, value)
    return found


def test_equal_modules_are_traced_once(tmp_path: Path) -> None:
    """Weights, settings, kinds, shapes and names of outputs tell modules apart."""
    traced: list[nn.Module] = []

    def trace(module: nn.Module, arguments: Any, **options: Any) -> gs.Graph:
        del arguments, options
        traced.append(module)
        return gs.Graph(name=str(len(traced)))

    def once(*arguments: Any, **options: Any) -> int:
        return int(remembering(trace, tmp_path)(*arguments, **options).name)

    x = torch.zeros(2, 4)
    assert once(layer(), [x], **NAMES) == once(layer(), [x + 1], **NAMES) == 1
    others = [layer(1), layer(width=3), layer(approximate="tanh"), nn.Sequential(layer())]
    assert [once(other, [x], **NAMES) for other in others] == [2, 3, 4, 5]
    assert once(layer(), [torch.zeros(3, 4)], **NAMES) == 6
    assert once(layer(), [x], **(NAMES | {"outputs": ["z"]})) == 7
