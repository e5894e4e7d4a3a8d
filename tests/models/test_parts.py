"""The pieces of a DiT that calibration walks through, against the whole network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ditcast.models import LoadedModel
from ditcast.models.base import vector_slices

TIMESTEPS = torch.tensor([900.0, 500.0, 20.0])
LABELS = torch.tensor([1, 4, 5])


@pytest.fixture
def sample(tiny: LoadedModel) -> Tensor:
    """Three rows of noise."""
    return torch.randn(3, *tiny.adapter.sample_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_stem_and_parts_are_the_network(tiny: LoadedModel, sample: Tensor) -> None:
    """One after the other, each with its columns of the features, not one bit differs."""
    adapter = tiny.adapter
    features = adapter.temporal(TIMESTEPS, LABELS)[torch.arange(3), torch.arange(3)]
    h = adapter.stem(sample)
    for part in adapter.parts:
        h = part.module(h, features[:, part.columns])
    slots = len(adapter.slots)
    wanted = adapter.denoiser(sample, features, features[None], torch.zeros(1, slots))[0]
    assert torch.equal(h, wanted)


@torch.no_grad()
def test_columns_of_the_parts_are_all_features(tiny: LoadedModel) -> None:
    """In order, without a gap; and each part's features can be made alone, for pairs."""
    adapter = tiny.adapter
    features = adapter.temporal(TIMESTEPS, LABELS)
    assert [part.name for part in adapter.parts] == ["blocks.0", "blocks.1", "final"]
    assert adapter.parts[0].columns.start == 0
    for before, after in zip(adapter.parts, adapter.parts[1:], strict=False):
        assert before.columns.stop == after.columns.start
    assert adapter.parts[-1].columns.stop == features.shape[-1]
    pairs = features[torch.arange(3), torch.arange(3)]
    for i, part in enumerate(adapter.parts):
        found = adapter.temporal.part(i, TIMESTEPS, LABELS)
        torch.testing.assert_close(found, pairs[:, part.columns], rtol=0, atol=1e-6)


@torch.no_grad()
def test_vectors_are_the_modulations(tiny: LoadedModel) -> None:
    """Shift, scale and gate twice in a block, shift and scale of the final layer, 64 wide each."""
    found = vector_slices(tiny.adapter.parts)
    assert [(c.start, c.stop) for c in found] == [(64 * i, 64 * i + 64) for i in range(14)]
    starts = {start for m in tiny.adapter.modulated().values() for start in (m.shift, m.scale)}
    assert starts <= {c.start for c in found}


def test_names_of_layers_are_their_places(tiny: LoadedModel) -> None:
    """A part's layers are the denoiser's under its name; the TIB's start with `temporal.`."""
    adapter = tiny.adapter
    found = {
        f"{part.name}.{name}": module
        for part in adapter.parts
        for name, module in part.module.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert found == adapter.layers()
    for name, linear in adapter.temporal_linears().items():
        assert adapter.temporal.get_submodule(name.removeprefix("temporal.")) is linear
    assert len(adapter.temporal_linears()) == 7  # two per embedder, one per modulation, final


@torch.no_grad()
def test_rows_of_modulated_layers_make_their_inputs(tiny: LoadedModel, sample: Tensor) -> None:
    """The input is norm * (1 + scale) + shift of exactly those rows: it moves with them."""
    adapter = tiny.adapter
    features = adapter.temporal(TIMESTEPS[:1], LABELS[:1])[0]
    assert adapter.modulated().keys() == {
        f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.qkv", "mlp.fc1")
    }
    for name, rows in adapter.modulated().items():
        assert adapter.layers()[name].in_features == rows.width
        seen: list[Tensor] = []
        linear = adapter.layers()[name]
        hook = linear.register_forward_pre_hook(lambda _, args, kept=seen: kept.append(args[0]))
        gain = torch.linspace(0.5, 2, rows.width)
        changed = features.clone()
        shift = slice(rows.shift, rows.shift + rows.width)
        scale = slice(rows.scale, rows.scale + rows.width)
        changed[:, shift] *= gain
        changed[:, scale] = (1 + changed[:, scale]) * gain - 1
        for values in (features, changed):
            adapter.denoiser(sample[:1], values, values[None], torch.zeros(1, len(adapter.slots)))
        hook.remove()
        torch.testing.assert_close(seen[1], seen[0] * gain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_inputs_of_chained_layers_are_linear_in_their_makers(
    tiny: LoadedModel, sample: Tensor
) -> None:
    """Channel by channel: twice a row of the maker is twice that channel of the input."""
    adapter = tiny.adapter
    features = adapter.temporal(TIMESTEPS[:1], LABELS[:1])[0]
    gain = torch.linspace(0.5, 2, 64)
    for name, (maker, first) in adapter.chained().items():
        seen: list[Tensor] = []
        linear, source = adapter.layers()[name], adapter.layers()[maker]
        assert source.bias is not None
        hook = linear.register_forward_pre_hook(lambda _, args, kept=seen: kept.append(args[0]))
        kept = source.weight.data.clone(), source.bias.data.clone()
        for factor in (torch.ones(64), gain):
            source.weight.data[first : first + 64] *= factor[:, None]
            source.bias.data[first : first + 64] *= factor
            adapter.denoiser(
                sample[:1], features, features[None], torch.zeros(1, len(adapter.slots))
            )
        source.weight.data.copy_(kept[0])
        source.bias.data.copy_(kept[1])
        hook.remove()
        torch.testing.assert_close(seen[1], seen[0] * gain, rtol=1e-4, atol=1e-6)
    assert len(adapter.chained()) == 2
