"""Error-compensated rounding: against its definition, against the nearest codes, as a start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ditcast.calibrate import gptq
from ditcast.calibrate.adaround import LEAN, Rounding, start
from ditcast.calibrate.codes import weight_scale
from ditcast.calibrate.gptq import compensated, grams
from ditcast.calibrate.qparams import LayerScales
from ditcast.models import LoadedModel
from ditcast.recipe import Bits
from tests.calibrate.test_adaround import mixed, nearest
from tests.calibrate.test_tib import calibrated

W4 = Bits(4, 16)


def solved(weight: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """The definition: after each column the least-squares best change of those to come."""
    left, turned = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    damped = gram.double() + gptq.DAMPING * gram.diagonal().double().mean() * torch.eye(len(gram))
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    for position, i in enumerate(order):
        turned[:, i] = left[:, i] / scale
        error = left[:, i] - torch.clamp(torch.round(turned[:, i]), -8, 7) * scale
        left[:, i] -= error
        rest = order[position + 1 :]
        if len(rest):
            best = torch.linalg.solve(damped[rest][:, rest], damped[rest, i][:, None])
            left[:, rest] += error[:, None] @ best.T
    return turned.float()


@pytest.mark.parametrize("block", [4, 128])
def test_each_column_is_made_up_for_by_those_behind_it(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One least-squares problem per column gives the same codes, whatever the block."""
    monkeypatch.setattr(gptq, "BLOCK", block)
    torch.manual_seed(0)
    layer, x = nn.Linear(18, 10), mixed(256, 18)
    held = nearest(layer)
    found = compensated(layer.weight.data, held, x.T @ x)
    wanted = solved(layer.weight.data, held.weight, x.T @ x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [0, 16])
def test_correlated_inputs_lose_a_tenth(group: int) -> None:
    """Of rank 6 and a little noise, on unseen inputs too: errors of 42 inputs can be made up."""
    torch.manual_seed(0)
    layer, x, unseen = nn.Linear(48, 24), mixed(256, 48), mixed(256, 48, seed=7)
    scale = weight_scale(layer.weight.data, search=True, bits=4, group=group)
    scales = LayerScales(bits=W4, weight=scale)
    found = start({"layer": layer}, {"layer": scales}, {"layer": x.T @ x})["layer"]
    assert found.hard().min() >= -8
    assert found.hard().max() <= 7

    def error(codes: Tensor) -> float:
        restored = (codes * found.step).view_as(layer.weight)
        return float((unseen @ (restored - layer.weight.data).T).square().mean())

    assert error(found.hard()) < 0.1 * error(scales.weight_codes(layer.weight.data))


def test_independent_inputs_change_nothing() -> None:
    """With an input that nothing else can make up for, the nearest code is the best one."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    held = nearest(layer)
    found = compensated(layer.weight.data, held, torch.eye(12))
    torch.testing.assert_close(found, layer.weight.data / held.weight[:, None])


def test_an_input_that_is_always_zero_is_no_singular_matrix() -> None:
    """A dead channel of activations, or all of them: those weights go to the nearest."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 8), mixed(64, 12)
    x[:, 3] = 0
    held = nearest(layer)
    steps = layer.weight.data / held.weight[:, None]
    found = compensated(layer.weight.data, held, x.T @ x)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 3], steps[:, 3])
    torch.testing.assert_close(compensated(layer.weight.data, held, torch.zeros(12, 12)), steps)


def test_reconstruction_starts_at_the_compensated_codes() -> None:
    """Undecided, but leaning to them; without a gram matrix it starts at the weight itself."""
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 8), mixed(64, 24)
    scales = nearest(layer)
    turned = compensated(layer.weight.data, scales, x.T @ x)
    rounding = Rounding(layer, scales, turned)
    assert torch.equal(rounding.hard().float(), turned.round().clamp(-8, 7))
    lean = (rounding.up() - 0.5).abs()
    torch.testing.assert_close(lean, torch.full_like(lean, LEAN))
    alone = start({"layer": layer}, {"layer": scales}, {})["layer"]
    assert torch.equal(alone.v.data, Rounding(layer, scales).v.data)


def test_grams_are_sums_over_all_inputs() -> None:
    """Of two batches, of whatever leading axes; nothing is watched afterwards."""
    layer, first, second = nn.Linear(6, 4), torch.randn(2, 5, 6), torch.randn(3, 6)
    with grams({"layer": layer}) as found:
        layer(first)
        layer(second)
    layer(second)
    rows = torch.cat([first.flatten(end_dim=1), second])
    torch.testing.assert_close(found["layer"], rows.T @ rows)


@pytest.mark.parametrize("temporal", ["tib", "naive"])
def test_a_recipe_starts_from_compensated_codes(
    tiny: LoadedModel, tmp_path: Path, temporal: str
) -> None:
    """In blocks and in the TIB: without iterations, codes that the nearest are not."""
    keys = {"method": "tfmq", "scheme": "w4a8", "iterations": 0, "rows": 48, "temporal": temporal}
    found = {
        init: calibrated(tiny, tmp_path / init, init=init, **keys) for init in ("nearest", "gptq")
    }
    linears = tiny.adapter.layers() | tiny.adapter.temporal_linears()
    for name, held in found["nearest"].layers.items():
        codes = held.weight_codes(linears[name].weight.data)
        other = found["gptq"].layers[name].weight_codes(linears[name].weight.data)
        alone = LayerScales(bits=held.bits, weight=held.weight)
        assert torch.equal(codes, alone.weight_codes(linears[name].weight.data)), name
        assert not torch.equal(codes, other), name
