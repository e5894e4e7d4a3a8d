"""AdaRound on single layers and on a whole attention block: better than the nearest codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ditcast.calibrate.adaround import Rounding, reconstruct
from ditcast.calibrate.codes import weight_codes, weight_scale
from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.qparams import LayerScales, QParams
from ditcast.calibrate.simulate import quantized
from ditcast.models import LoadedModel
from ditcast.models.base import Layer
from ditcast.recipe import Bits

W4 = Bits(4, 16)
ROWS = 256


def mixed(*shape: int, seed: int = 0) -> Tensor:
    """Inputs whose last axis is strongly correlated, as those of a network are: rank 6 of it."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]
    basis = torch.randn(6, width, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(shape, generator=generator) * 0.05
    return torch.randn(*shape[:-1], 6, generator=generator) @ basis + noise


def nearest(layer: Layer, bits: Bits = W4) -> LayerScales:
    """Scales of a layer with a searched weight range."""
    return LayerScales(bits=bits, weight=weight_scale(layer.weight.data, search=True, bits=bits[0]))


class Unit:
    """One layer alone under reconstruction."""

    def __init__(self, layer: Layer, x: Tensor, scales: LayerScales | None = None) -> None:
        self.layer, self.x = layer.requires_grad_(False), x
        self.scales = scales or nearest(layer)
        self.wanted = self.channels_last(layer(x))

    def channels_last(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1) if isinstance(self.layer, nn.Conv2d) else y

    def learn(self, iterations: int, seed: int = 0) -> Tensor:
        """The codes found."""
        quantized_layer = QuantizedLayer(self.layer, self.scales)
        rounding = Rounding(self.layer, self.scales)
        reconstruct(
            lambda rows: self.channels_last(quantized_layer(self.x[rows])),
            self.wanted,
            {"layer": quantized_layer},
            {"layer": rounding},
            {},
            iterations=iterations,
            batch=32,
            seed=seed,
        )
        return rounding.hard()

    def error(self, codes: Tensor | None, x: Tensor | None = None) -> float:
        """Mean squared difference to full precision, on the same inputs or on others."""
        x = self.x if x is None else x
        layer = QuantizedLayer(self.layer, replace(self.scales, codes=codes))
        return float((layer(x) - self.layer(x)).square().mean())


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_starts_at_the_weight_itself(kind: str, bits: int) -> None:
    """r(v) is the fractional part of w / s, so that the first loss is that of full precision."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 8) if kind == "linear" else nn.Conv2d(3, 8, 3)
    scale = weight_scale(layer.weight.data, search=False, bits=bits)
    rounding = Rounding(layer, LayerScales(bits=Bits(bits, 16), weight=scale))
    torch.testing.assert_close(rounding.soft(), layer.weight.data, rtol=0, atol=1e-6)
    steps = layer.weight.data.reshape(8, -1) / scale[:, None]
    torch.testing.assert_close(rounding.up(), steps - steps.floor(), rtol=0, atol=1e-4)


def test_the_first_decision_is_the_nearest_code() -> None:
    """Where nothing was learned, hard roundings are those to the nearest."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    scales = nearest(layer)
    rounding = Rounding(layer, scales)
    found = rounding.hard()
    assert torch.equal(found.float(), weight_codes(layer.weight.data, scales.weight, 4))


def test_a_clipped_weight_starts_at_its_limit() -> None:
    """With 4 bits and scale 1: 9.3 becomes 7 and -12 becomes -8."""
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[9.3, -12.0]])
    rounding = Rounding(layer, LayerScales(bits=W4, weight=torch.ones(1)))
    assert rounding.soft().tolist() == [[7.0, -8.0]]
    assert rounding.hard().tolist() == [[7, -8]]


def test_the_regularizer_vanishes_at_decisions() -> None:
    """1 - |2 r - 1|^beta by hand: 1 at r = 0.5, 0 at r = 0 and 1, and near them by beta."""
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[0.5, 0.0, 1.25, 3.0]])
    rounding = Rounding(layer, LayerScales(bits=W4, weight=torch.ones(1)))
    for beta in (2.0, 20.0):
        found = float(rounding.regularizer(beta).detach())
        assert found == pytest.approx(1 + 0 + (1 - 0.5**beta) + 0, abs=1e-4)


def test_a_linear_beats_rounding_to_the_nearest() -> None:
    """Correlated inputs let errors of weights cancel: less than half, also on unseen inputs."""
    torch.manual_seed(0)
    unit = Unit(nn.Linear(48, 24), mixed(ROWS, 48))
    found, unseen = unit.learn(iterations=150), mixed(ROWS, 48, seed=7)
    assert unit.error(found) < 0.5 * unit.error(None)
    assert unit.error(found, unseen) < 0.5 * unit.error(None, unseen)


def test_a_convolution_beats_rounding_to_the_nearest() -> None:
    torch.manual_seed(0)
    x = mixed(64, 8, 8, 16).movedim(-1, 1)  # channels are what is correlated
    unit = Unit(nn.Conv2d(16, 8, 2, padding=1), x)
    found = unit.learn(iterations=150)
    assert unit.error(found) < 0.7 * unit.error(None)


def test_grouped_scales_are_kept() -> None:
    """Rounding takes each weight's own scale."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 24)
    scale = weight_scale(layer.weight.data, search=True, bits=4, group=16)
    unit = Unit(layer, mixed(ROWS, 48), LayerScales(bits=W4, weight=scale))
    assert unit.error(unit.learn(iterations=150)) < 0.5 * unit.error(None)


def test_the_same_seed_gives_the_same_roundings() -> None:
    """And another one sees other rows, which changes at least one of 1152."""
    torch.manual_seed(0)
    unit = Unit(nn.Linear(48, 24), mixed(ROWS, 48))
    first, again, other = (unit.learn(iterations=40, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def block_inputs(tiny: LoadedModel, rows: int) -> tuple[Tensor, Tensor]:
    """Inputs and features of the first block: noise of several timesteps and labels."""
    adapter, generator = tiny.adapter, torch.Generator().manual_seed(0)
    sample = torch.randn(rows, *adapter.sample_shape, generator=generator)
    timesteps = torch.linspace(0, 999, rows).round()
    labels = torch.arange(rows) % (adapter.num_classes + 1)
    with torch.no_grad():
        return adapter.stem(sample), adapter.temporal.part(0, timesteps, labels)


def learn_block(
    tiny: LoadedModel, forward: Callable[[Tensor], Tensor], wanted: Tensor, iterations: int
) -> tuple[float, float]:
    """Errors of the block with four layers of 4 bits: to the nearest, and learned."""
    linears = tiny.adapter.layers()
    start = {name: nearest(linears[name]) for name in linears if name.startswith("blocks.0.")}
    assert len(start) == 4
    roundings = {name: Rounding(linears[name], held) for name, held in start.items()}
    with quantized(tiny.adapter, QParams(layers=start)) as simulation:
        reconstruct(
            forward,
            wanted,
            simulation.layers,
            roundings,
            {},
            iterations=iterations,
            batch=8,
            seed=0,
        )
    learned = {name: replace(start[name], codes=r.hard()) for name, r in roundings.items()}
    errors = []
    for layers in (start, learned):
        with quantized(tiny.adapter, QParams(layers=layers)), torch.no_grad():
            found = forward(torch.arange(len(wanted)))
        errors.append(float((found - wanted).square().mean()))
    return errors[0], errors[1]


def test_an_attention_block_beats_rounding_to_the_nearest(tiny: LoadedModel) -> None:
    """All four Linears of a transformer block at once, the attention's gradient among them."""
    h, features = block_inputs(tiny, rows=48)
    block = tiny.adapter.parts[0].module
    with torch.no_grad():
        wanted = block(h, features)
    first, second = learn_block(
        tiny, lambda rows: block(h[rows], features[rows]), wanted, iterations=60
    )
    assert second < 0.8 * first


def test_a_learned_scale_beats_a_bad_one() -> None:
    """A range of 8 deviations for 4 bits, where 2.5 are best: it shrinks, and so does the error."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16).requires_grad_(False), torch.randn(ROWS, 32)
    scales = nearest(layer, Bits(8, 4))
    start = torch.tensor(8 / 7)
    held = QuantizedLayer(layer, replace(scales, activation=torch.ones(())))
    logarithm = nn.Parameter(start.log())
    held.rows = lambda: (logarithm.exp()[None], None)
    rounding = Rounding(layer, scales)
    seen: list[int] = []
    last = reconstruct(
        lambda rows: held(x[rows]),
        layer(x),
        {"layer": held},
        {"layer": rounding},
        {"layer": logarithm},
        iterations=300,
        batch=32,
        seed=0,
        advance=lambda: seen.append(1),
    )
    assert len(seen) == 300

    def error(scale: Tensor) -> float:
        learned = replace(scales, codes=rounding.hard(), activation=scale)
        return float((QuantizedLayer(layer, learned)(x) - layer(x)).square().sum(dim=-1).mean())

    found = logarithm.detach().exp()
    assert found < 0.6 * start
    assert error(found) < 0.4 * error(start)
    assert last == pytest.approx(error(found), rel=0.4)  # of the last 32 rows
