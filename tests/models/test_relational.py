"""RFC through the network: `Observe`'s slopes and what `Relate` makes of them (caching.md, 3.5)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ditcast.models import LoadedModel

ROWS, SLOTS = 3, 4
BEFORE, LAST, NOW = 0.0, 1.0, 1.7  # places on the way; Taylor's first order would go on to 2


class Line(NamedTuple):
    """What hooks do to the network: every norm gives a place on a line of its own."""

    place: dict[str, float]
    inputs: list[Tensor]  # of each slot that has run, behind the modulation
    outputs: list[Tensor]


@contextlib.contextmanager
def straight(model: LoadedModel) -> Iterator[Line]:
    """Slots are fixed linear maps, and their inputs go straight on, in a direction per sample."""
    torch.manual_seed(0)
    line = Line({"at": BEFORE}, [], [])
    blocks: Any = model.adapter.denoiser.blocks
    with contextlib.ExitStack() as stack:
        for block in blocks:
            for norm, slot in ((block.norm1, block.attn), (block.norm2, block.mlp)):
                start, direction = torch.randn(2, ROWS, *model.adapter.slot_shape)
                weight = torch.randn(64, 64) / 8

                def go(
                    module: Any, args: Any, output: Any, start: Any = start, by: Any = direction
                ) -> Tensor:
                    del module, args, output
                    found: Tensor = start + line.place["at"] * by
                    return found

                def map_(module: Any, args: Any, output: Any, weight: Any = weight) -> Tensor:
                    del module, output
                    line.inputs.append(args[0])
                    line.outputs.append(args[0] @ weight)
                    return line.outputs[-1]

                stack.callback(norm.register_forward_hook(go).remove)
                stack.callback(slot.register_forward_hook(map_).remove)
        yield line


class Seen(NamedTuple):
    """Two full steps of one network, and what it makes of a third place."""

    sample: Tensor
    features: Tensor
    kept: tuple[Tensor, Tensor, Tensor]  # y, a and slope after the second
    output: Tensor  # of the second


def observed(model: LoadedModel, line: Line) -> Seen:
    """Full steps at the first two places."""
    step, slot = model.adapter.steps["observe"], model.adapter.slot_shape
    sample = torch.randn(ROWS, *model.adapter.sample_shape)
    features = model.adapter.temporal(torch.tensor([40.0]), torch.tensor([0, 1, 4]))[0]
    y, a = torch.zeros(2, SLOTS, ROWS, *slot), torch.zeros(SLOTS, ROWS, *slot)
    for place in (BEFORE, LAST):
        line.place["at"] = place
        output, y, a, slope = step(sample, features, y, a)
    return Seen(sample, features, (y, a, slope), output)


@pytest.fixture
def line(tiny: LoadedModel) -> Iterator[Line]:
    """The tiny model's network, on its way."""
    with torch.no_grad(), straight(tiny) as found:
        yield found


def related(model: LoadedModel, seen: Seen, *factors: float) -> Tensor:
    """RFE's output at the place that the network is at."""
    step = model.adapter.steps["relate"]
    found: Tensor = step(seen.sample, seen.features, torch.tensor(factors), *seen.kept)
    return found


def test_slopes_are_changes_of_outputs_over_changes_of_inputs(
    tiny: LoadedModel, line: Line
) -> None:
    """Of what really went in and came out; outputs are kept newest first."""
    y, a, slope = observed(tiny, line).kept
    before, last = (
        (torch.stack(line.inputs[i : i + SLOTS]), torch.stack(line.outputs[i : i + SLOTS]))
        for i in (0, SLOTS)
    )
    assert torch.equal(a, last[0])
    assert torch.equal(y, torch.stack([last[1], before[1]]))
    for k in range(SLOTS):
        for row in range(ROWS):
            moved = torch.linalg.vector_norm(last[0][k, row] - before[0][k, row])
            changed = torch.linalg.vector_norm(last[1][k, row] - before[1][k, row])
            assert float(slope[k, row]) == pytest.approx(float(changed / moved), rel=1e-4)


def test_rfe_is_exact_where_inputs_go_straight_on(tiny: LoadedModel, line: Line) -> None:
    """3.5 i: linear slots, at whatever speed; Taylor's first order is not."""
    seen = observed(tiny, line)
    y, a, _ = seen.kept
    line.place["at"] = NOW
    wanted = tiny.adapter.steps["observe"](seen.sample, seen.features, y, a)[0]
    span = float(wanted.max() - wanted.min())
    assert float((related(tiny, seen, 2.0, -1.0) - wanted).abs().max()) < 1e-4 * span
    taylor = tiny.adapter.steps["extrapolate"](
        seen.sample, seen.features, torch.tensor([2.0, -1.0]), y
    )
    assert float((taylor - wanted).abs().max()) > 1e-2 * span


def test_rfe_stays_where_nothing_moves(tiny: LoadedModel, line: Line) -> None:
    """3.5 ii, inputs as at the last full step; and iii, an increment of zero, wherever they are."""
    seen = observed(tiny, line)
    assert torch.allclose(related(tiny, seen, 2.0, -1.0), seen.output, atol=1e-5)
    line.place["at"] = NOW
    assert torch.allclose(related(tiny, seen, 1.0, 0.0), seen.output, atol=1e-5)
    assert not torch.allclose(related(tiny, seen, 2.0, -1.0), seen.output, atol=1e-3)
