"""The quantized model in torch: each layer as asked, and no trace of it afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ditcast.calibrate.codes import fake_quantize, weight_codes, weight_scale
from ditcast.calibrate.qparams import LayerScales, OutputScales, QParams
from ditcast.calibrate.simulate import quantized
from ditcast.models import LoadedModel
from ditcast.recipe import Bits

TIMESTEPS = torch.tensor([900.0, 500.0, 20.0])
LABELS = torch.tensor([1, 4, 5])
EDGES = torch.tensor([100.0, 600.0])


def scales(model: LoadedModel, *names: str, **keys: Tensor) -> QParams:
    """Those layers in W8A8, with three bins."""
    linears = model.adapter.layers() | model.adapter.temporal_linears()
    layers = {
        name: LayerScales(
            bits=Bits(8, 8),
            weight=weight_scale(linears[name].weight.data, search=False, bits=8),
            **keys,
        )
        for name in names
    }
    return QParams(layers=layers, edges=EDGES)


def step(model: LoadedModel, features: Tensor) -> Tensor:
    """The output of a full step on one seeded row per row of features (N, F)."""
    sample = torch.randn(1, *model.adapter.sample_shape, generator=torch.Generator().manual_seed(0))
    sample = sample.expand(len(features), -1, -1, -1)
    slots = len(model.adapter.slots)
    ahead = torch.zeros(0, *features.shape)
    output: Tensor = model.adapter.denoiser(sample, features, ahead, torch.zeros(0, slots))[0]
    return output


@torch.no_grad()
def test_simulation_leaves_no_trace(tiny: LoadedModel) -> None:
    """Weights, modules and behaviour are back afterwards, even after an error inside."""
    adapter = tiny.adapter
    weights = {name: layer.weight.clone() for name, layer in adapter.layers().items()}
    modules, temporal = dict(adapter.denoiser.named_modules()), adapter.temporal
    features = adapter.temporal(TIMESTEPS, LABELS)
    wanted = step(tiny, features[0])
    held = scales(tiny, "blocks.0.attn.qkv", "temporal.final", activation=torch.full((3,), 0.1))
    balance = {"blocks.0.attn.proj": torch.full((64,), 2.0)}

    def fail() -> None:
        found = adapter.temporal(TIMESTEPS, LABELS)
        assert not torch.equal(step(tiny, found[0]), wanted)
        raise RuntimeError("inside")

    with (
        pytest.raises(RuntimeError, match="inside"),
        quantized(adapter, replace(held, balance=balance)),
    ):
        fail()
    assert adapter.temporal is temporal
    assert dict(adapter.denoiser.named_modules()) == modules
    for name, layer in adapter.layers().items():
        assert torch.equal(layer.weight, weights[name])
    assert torch.equal(adapter.temporal(TIMESTEPS, LABELS), features)
    assert torch.equal(step(tiny, features[0]), wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
def test_every_step_has_its_scale(tiny: LoadedModel, name: str) -> None:
    """Rows of one batch that belong to different steps; the layer may be modulated or not.

    Each equals the same model with one scale for all, that of its bin.
    """
    adapter, per_bin = tiny.adapter, torch.tensor([0.02, 0.05, 0.1])
    with quantized(adapter, scales(tiny, name, activation=per_bin)):
        features = adapter.temporal(TIMESTEPS, LABELS)
        found = step(tiny, features[:, 1])  # one label, three steps
    assert features.shape[-1] == adapter.parts[-1].columns.stop + 1  # and its scale behind them
    assert features[:, 0, -1].tolist() == pytest.approx([0.1, 0.05, 0.02])
    with quantized(adapter, QParams()):
        plain = adapter.temporal(TIMESTEPS, LABELS)
        exact = step(tiny, plain[:, 1])
    for row, bin_ in enumerate((2, 1, 0)):
        with quantized(adapter, scales(tiny, name, activation=per_bin[bin_])):
            wanted = step(tiny, plain[row : row + 1, 1])
        # A division that is folded into the features may round a value at a tie the other way.
        error = (found[row] - wanted[0]).square().mean()
        assert error <= 0.01 * (wanted[0] - exact[row]).square().mean()
        assert not torch.equal(wanted[0], exact[row])


@torch.no_grad()
def test_the_tib_takes_the_scales_of_its_timestep(tiny: LoadedModel) -> None:
    """By hand for the final modulation: input and output rounded by the step's own ranges."""
    adapter, name, vectors = tiny.adapter, "temporal.final", 6 * 2 + 2
    zero = torch.tensor([-20.0, 0.0, 5.0])
    held = scales(tiny, name, activation=torch.tensor([0.01, 0.02, 0.04]), zero_point=zero)
    steps = torch.tensor([0.05, 0.1, 0.2])[:, None].repeat(1, vectors)
    outputs = OutputScales(steps, torch.zeros(3, vectors), 8)
    seen: list[Tensor] = []
    final = adapter.temporal_linears()[name]
    hook = final.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain = adapter.temporal(TIMESTEPS, LABELS)
    hook.remove()
    with quantized(adapter, replace(held, outputs=outputs)):
        found = adapter.temporal(TIMESTEPS, LABELS)
    codes = weight_codes(final.weight.data, held.layers[name].weight, 8)
    restored = codes * held.layers[name].weight[:, None]
    scale = held.layers[name].activation
    assert scale is not None
    columns = adapter.parts[-1].columns
    for row, bin_ in enumerate((2, 1, 0)):
        x = fake_quantize(seen[0][row], scale[bin_], zero[bin_], 8)
        wanted = x @ restored.T + final.bias
        output_scale = outputs.scale[bin_, 0]
        wanted = fake_quantize(wanted, output_scale, 0.0, 8)
        difference = (found[row][:, columns] - wanted).abs()
        assert (difference > 1e-5).float().mean() <= 0.01  # ties
        assert difference.max() <= output_scale * 1.001
        others = fake_quantize(plain[row][:, : columns.start], output_scale, 0.0, 8)
        torch.testing.assert_close(found[row][:, : columns.start], others)


@torch.no_grad()
def test_a_timestep_between_two_bins_takes_one_of_them(tiny: LoadedModel) -> None:
    """So that another number of steps can be sampled; from the edge on it is the upper bin."""
    name = "blocks.0.mlp.fc2"
    with quantized(tiny.adapter, scales(tiny, name, activation=torch.tensor([1.0, 2.0, 3.0]))):
        found = tiny.adapter.temporal(torch.tensor([0.0, 99.0, 100.0, 599.9, 600.0, 999.0]), LABELS)
    assert found[:, 0, -1].tolist() == [1, 1, 2, 2, 3, 3]


@torch.no_grad()
def test_exact_layers_keep_their_rounded_weights(tiny: LoadedModel) -> None:
    """What the graph of a quantized model is before its Q/DQ nodes; and only while asked for."""
    name = "blocks.0.mlp.fc1"
    linear = tiny.adapter.layers()[name]
    held = scales(tiny, name, activation=torch.tensor(0.1))
    features = tiny.adapter.temporal(TIMESTEPS, LABELS)[0]
    exact = step(tiny, features)
    with quantized(tiny.adapter, held) as simulation:
        rounded = step(tiny, features)
        with simulation.exact():
            weights_only = step(tiny, features)
        assert torch.equal(step(tiny, features), rounded)
        assert simulation.originals[name] is linear
    changes = [(found - exact).abs().max() for found in (weights_only, rounded)]
    assert 0 < changes[0] < changes[1] / 2
