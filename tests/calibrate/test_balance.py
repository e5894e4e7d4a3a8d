"""Channel balancing: the papers' formulas by hand, and that the float model stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditcast.calibrate.balance import balanced_layers, factors, ptq4dit, smooth
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import sample
from ditcast.models import LoadedModel, load
from ditcast.schedule import from_config
from tests.conftest import RECIPE, calibrated

KINDS = ("smooth", "ptq4dit")


def test_smooth_by_hand() -> None:
    """sqrt(w) / sqrt(a) with the largest a of all steps."""
    activation = torch.tensor([[4.0, 1.0], [16.0, 0.25]])
    found = smooth(activation, torch.tensor([1.0, 9.0]))
    torch.testing.assert_close(found, torch.tensor([1 / 4.0, 3 / 1.0]))


def test_ptq4dit_by_hand() -> None:
    """Two steps with rank correlations 1 and -1: weights e^-1 and e^1 over their sum."""
    weight = torch.tensor([1.0, 2.0, 4.0])
    activation = torch.tensor([[1.0, 2.0, 3.0], [9.0, 5.0, 1.0]])
    share = torch.softmax(torch.tensor([-1.0, 1.0]), dim=0)
    assert float(share[1]) == pytest.approx(0.8808, abs=1e-4)
    salience = share[0] * activation[0] + share[1] * activation[1]
    found = ptq4dit(activation, weight)
    torch.testing.assert_close(found, (weight / salience).sqrt())
    assert float(found[0]) == pytest.approx((1 / 8.0464) ** 0.5, abs=1e-4)


def spearman(a: Tensor, b: Tensor) -> float:
    """By its definition: Pearson's correlation of ranks, equal values sharing their mean rank."""
    ranks = [[float((x < y).sum() + (x == y).sum() / 2) for y in x] for x in (a, b)]
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def test_correlation_is_spearmans() -> None:
    """With one step that has the weights' ranks and one of chance; weights have many ties."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(40, generator=generator).mul(8).round() + 1
    activation = torch.stack([weight**3, torch.rand(40, generator=generator)])
    rho = [spearman(a, weight) for a in activation]
    assert rho[0] == pytest.approx(1)
    share = torch.softmax(-torch.tensor(rho, dtype=torch.float64), dim=0)
    salience = (share[:, None] * activation).sum(dim=0)
    wanted = (weight / salience).sqrt()
    torch.testing.assert_close(ptq4dit(activation, weight).double(), wanted, rtol=1e-5, atol=0)


def test_constant_salience_counts_as_uncorrelated() -> None:
    """A step in which all channels are alike has no ranks: no division by zero."""
    weight = torch.tensor([1.0, 2.0])
    found = ptq4dit(torch.tensor([[3.0, 3.0], [3.0, 3.0]]), weight)
    torch.testing.assert_close(found, (weight / 3).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_end_with_equal_salience(kind: str) -> None:
    """Max |x * f| = max |w / f| in every channel, where all steps are alike."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 8).requires_grad_(False)
    salience = torch.rand(16) * 20 + 0.1
    found = factors(kind, linear, salience.expand(5, -1))
    weight = linear.weight.abs().amax(dim=0)
    torch.testing.assert_close(salience * found, weight / found)
    torch.testing.assert_close(salience * found, (salience * weight).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_dead_channels_have_finite_factors(kind: str) -> None:
    """Inputs or weights of zero."""
    linear = nn.Linear(3, 2).requires_grad_(False)
    linear.weight[:, 1] = 0
    found = factors(kind, linear, torch.tensor([[0.0, 1.0, 1.0]]))
    assert torch.isfinite(found).all()
    assert (found > 0).all()


def test_layers_that_can_be_balanced(tiny: LoadedModel) -> None:
    """All of a block but the MLP's second one, behind whose GELU nothing can be folded."""
    assert balanced_layers(tiny.adapter) == [
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1")
    ]


def trajectory(model: LoadedModel) -> Tensor:
    """One short trajectory with guidance."""
    return sample(
        model.adapter,
        from_config(model.scheduler),
        sampler="ddim",
        steps=4,
        guidance=2.0,
        seed=0,
        indices=[0, 1],
        labels=[1, 4],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_balanced_float_model_is_the_original(
    tiny: LoadedModel, tmp_path: Path, kind: str
) -> None:
    """With the factors that calibration finds, one step differs by 1e-5 at most."""
    found = calibrated(tiny, tmp_path / "b", RECIPE | {"balance": kind})
    assert found.balance.keys() == set(balanced_layers(tiny.adapter))
    for factor in found.balance.values():
        assert factor.max() > 1.2 * factor.min()  # they are no ones
    noise = torch.randn(2, *tiny.adapter.sample_shape, generator=torch.Generator().manual_seed(0))
    outputs = []
    for held in (QParams(), QParams(balance=found.balance)):
        with quantized(tiny.adapter, held), torch.no_grad():
            rows = tiny.adapter.temporal(torch.tensor([500.0]), torch.tensor([1, 5]))[0]
            ahead, weights = rows[None], torch.ones(1, len(tiny.adapter.slots))
            outputs.append(tiny.adapter.denoiser(noise, rows, ahead, weights))
    assert not torch.equal(outputs[0][0], outputs[1][0])
    for exact, balanced in zip(*outputs, strict=True):
        torch.testing.assert_close(balanced, exact, rtol=0, atol=1e-5)


def outliers(model: LoadedModel, factor: float) -> None:
    """Make a few input channels of every first layer of a slot much larger, in place."""
    adapter = model.adapter
    for name, rows in adapter.modulated().items():
        block = int(name.split(".")[1])
        linear: nn.Linear = adapter.temporal_linears()[f"temporal.modulation.{block}"]
        first = rows.shift % (6 * rows.width)
        for channel in (3, 17, 40):
            for row in (first + channel, first + rows.width + channel):
                linear.weight.data[row] *= factor
                linear.bias.data[row] += factor


@pytest.mark.parametrize("kind", KINDS)
def test_balancing_pays_where_channels_are_unequal(
    tiny_dir: Path, tmp_path: Path, kind: str
) -> None:
    """Three channels ten times as large as the others: W8A8 comes closer to full precision."""
    model = load(str(tiny_dir))
    outliers(model, 10.0)
    wanted, errors = trajectory(model), []
    for balance in ("none", kind):
        found = calibrated(model, tmp_path / balance, RECIPE | {"balance": balance, "steps": 4})
        with quantized(model.adapter, found):
            errors.append(float((trajectory(model) - wanted).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_scales_are_those_of_balanced_inputs(tiny: LoadedModel, tmp_path: Path) -> None:
    """The largest input of qkv by 127, after its factors; the weight divided by them."""
    found = calibrated(tiny, tmp_path / "b", RECIPE | {"balance": "smooth"})
    plain = calibrated(tiny, tmp_path / "plain", RECIPE)
    name = "blocks.0.attn.qkv"
    linears, factor = tiny.adapter.layers(), found.balance[name]
    weight = linears[name].weight / factor
    weight[128:] *= found.balance["blocks.0.attn.proj"][:, None]  # the rows of values
    torch.testing.assert_close(found.layers[name].weight, weight.abs().amax(dim=1) / 127)
    before, after = (held.layers[name].activation for held in (plain, found))
    assert before is not None
    assert after is not None
    assert not torch.equal(before, after)
    untouched = "blocks.0.mlp.fc2"
    torch.testing.assert_close(
        found.layers[untouched].weight, plain.layers[untouched].weight, rtol=0, atol=0
    )
