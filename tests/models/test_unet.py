"""The U-Net adapter against the unmodified diffusers model that it takes apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ditcast.errors import ConfigError, UnsupportedError
from ditcast.models import load
from ditcast.models.base import first_skips, run_parts, vector_slices
from ditcast.models.unet import UNetAdapter
from tests.unets import CLASSES, CONDITIONAL, OTHER, save, untrained

VARIANTS: dict[str, dict[str, Any]] = {
    "without classes": {},
    "with classes": CONDITIONAL,
    "scale and shift, resizing residual blocks": OTHER,
    "two layers, other padding": {"layers_per_block": 2, "downsample_padding": 0},
    "one level": {
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "resizing block types": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "no middle, not square": {"mid_block_type": None, "sample_size": (8, 4)},
    "a middle without attention": {"add_attention": False},
    "scaled middle": {"mid_block_scale_factor": 1.4, "attn_norm_num_groups": 8},
    "centered input": {"center_input_sample": True},
    "other time embedding": {"flip_sin_to_cos": False, "freq_shift": 1},
    "dropout, which only trains": {"dropout": 0.5, "act_fn": "swish"},
}


def adapter_of(named: int | None = None, **changes: Any) -> UNetAdapter:
    """The adapter of an untrained model."""
    return UNetAdapter(untrained(**changes), named)


def samples(adapter: UNetAdapter, n: int, seed: int = 0) -> Tensor:
    """Noise of the model's shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *adapter.sample_shape, generator=generator)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_adapter_is_the_model(changes: dict[str, Any]) -> None:
    """A full step, and a reuse step with what the full step forecasts for itself."""
    model, adapter = untrained(**changes), adapter_of(**changes)
    for t, label in ((999, 0), (37, 2)):
        x = samples(adapter, 1, seed=t)
        labels = torch.tensor([label]) if "num_class_embeds" in changes else None
        wanted = model(x, torch.tensor([t]), labels).sample
        features = adapter.temporal(torch.tensor([float(t)]), torch.tensor([label]))[0]
        found, forecast = adapter.denoiser(x, features, features[None], torch.ones(1, 1))
        assert found.shape == (1, adapter.output_channels, *x.shape[2:])
        assert forecast.shape == (1, 1, *adapter.slot_shape)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
        assert torch.equal(adapter.steps["reuse"](x, features, forecast[0]), found)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_the_extracted_tib_is_that_of_the_residual_blocks(changes: dict[str, Any]) -> None:
    """The tensors inside the original blocks, in the order of parts, to the last bit."""
    model, seen = untrained(**changes), list[Tensor]()

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        seen.append(output)

    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.time_emb_proj.register_forward_hook(watch)
    timesteps, labels = torch.tensor([7, 444, 999]), torch.tensor([0, 3, 2])
    adapter = adapter_of(**changes)
    model(samples(adapter, 3), timesteps, labels if "num_class_embeds" in changes else None)
    found = [adapter.temporal.part(i, timesteps.float(), labels) for i in range(len(adapter.parts))]
    found = [features for features in found if features.shape[1]]
    assert len(found) == len(seen) > 2
    for ours, wanted in zip(found, seen, strict=True):
        assert (ours - wanted).abs().max() == 0


@torch.no_grad()
def test_features_of_all_steps_at_once() -> None:
    """One batch over T and U gives what the model computes step by step, within rounding."""
    model, adapter = untrained(**CONDITIONAL), adapter_of(**CONDITIONAL)
    steps, labels = [999, 640, 1], torch.tensor([0, 3, 4])
    features = adapter.temporal(torch.tensor(steps).float(), labels)
    x = samples(adapter, 3)
    for step, t in enumerate(steps):
        wanted = model(x, torch.full((3,), t), labels).sample
        nothing = features[:0], torch.zeros(0, 1)
        found, forecast = adapter.denoiser(x, features[step], *nothing)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert forecast.shape == (0, 3, *adapter.slot_shape)


@torch.no_grad()
def test_without_classes_all_labels_are_one() -> None:
    adapter = adapter_of()
    features = adapter.temporal(torch.tensor([5.0, 7.0]), torch.tensor([0, 0, 9]))
    assert features.shape[:2] == (2, 3)
    assert torch.equal(features[:, 0], features[:, 2])
    assert (adapter.num_classes, adapter.null_label) == (1, None)


@pytest.mark.parametrize("changes", [CONDITIONAL, OTHER])
@torch.no_grad()
def test_parts_are_the_network(changes: dict[str, Any]) -> None:
    """With the stack of skips, each with its columns; features of a part alone are the same."""
    adapter = adapter_of(**changes)
    timesteps, labels = torch.tensor([900.0, 20.0]), torch.tensor([1, 3])
    features = adapter.temporal(timesteps, labels)[torch.arange(2), torch.arange(2)]
    x = samples(adapter, 2)
    h = adapter.stem(x)
    found = run_parts(adapter.parts, h, features, first_skips(adapter.parts, h))
    assert torch.equal(found, adapter.denoiser(x, features, features[None], torch.zeros(1, 1))[0])
    for i, part in enumerate(adapter.parts):
        alone = adapter.temporal.part(i, timesteps, labels)
        torch.testing.assert_close(alone, features[:, part.columns], rtol=0, atol=1e-6)
    widths = [c.stop - c.start for c in vector_slices(adapter.parts)]
    assert sum(widths) == features.shape[1] == adapter.parts[-1].columns.stop
    vectors = 2 if "resnet_time_scale_shift" in changes else 1
    assert {part.vectors for part in adapter.parts} == {0, vectors}


@torch.no_grad()
def test_a_reuse_step_runs_the_outer_layers_only() -> None:
    """Those of the shallow parts count, all others can be anything: they are in the forecast."""
    adapter = adapter_of()
    assert adapter.slots == ("blocks.8",)  # behind the doubling, before the last two up
    assert adapter.shallow == ("blocks.0", "blocks.9", "blocks.10", "final")
    x, forecast = samples(adapter, 2), torch.randn(2, *adapter.slot_shape)
    features = adapter.temporal(torch.tensor([500.0]), torch.tensor([0, 0]))[0]
    before = adapter.steps["reuse"](x, features, forecast)
    shallow = tuple(f"{name}." for name in adapter.shallow)
    for name, layer in adapter.layers().items():
        kept = layer.weight.data
        layer.weight.data = kept * 1.5
        changed = not torch.equal(adapter.steps["reuse"](x, features, forecast), before)
        layer.weight.data = kept
        assert changed == name.startswith(shallow), name


@torch.no_grad()
def test_a_forecast_is_the_weighted_deep_branch() -> None:
    adapter = adapter_of()
    features = adapter.temporal(torch.tensor([500.0]), torch.tensor([0, 0]))[0]
    weights = torch.tensor([[1.0], [-0.5], [2.0]])
    deep: list[Tensor] = []
    slot = adapter.denoiser.get_submodule(adapter.slots[0])
    hook = slot.register_forward_hook(lambda module, args, h: deep.append(h))
    ahead = features.expand(3, -1, -1)
    _, forecast = adapter.denoiser(samples(adapter, 2), features, ahead, weights)
    hook.remove()
    for row, weight in zip(forecast, weights, strict=True):
        torch.testing.assert_close(row, weight * deep[0])


@pytest.mark.parametrize("changes", [{}, OTHER])
@torch.no_grad()
def test_layers_are_named_and_counted(changes: dict[str, Any]) -> None:
    """Names are places in the denoiser; positions are the rows that each layer really makes."""
    adapter = adapter_of(**changes)
    layers, rows = adapter.layers(), dict[str, int]()
    for name, layer in layers.items():
        assert adapter.denoiser.get_submodule(name) is layer

        def count(module: nn.Module, args: object, y: Tensor, name: str = name) -> None:
            rows[name] = y[0].numel() // len(layers[name].weight)

        layer.register_forward_hook(count)
    features = adapter.temporal(torch.tensor([500.0]), torch.tensor([0]))[0]
    adapter.denoiser(samples(adapter, 1), features, features[None], torch.zeros(1, 1))
    assert rows == adapter.positions()
    assert "blocks.0.conv1" in layers
    assert layers.keys() & {"final.conv", "stem.conv"} == {"final.conv"}
    for name, linear in adapter.temporal_linears().items():
        assert adapter.temporal.get_submodule(name.removeprefix("temporal.")) is linear
    for proj, (qkv, first) in adapter.chained().items():
        assert layers[qkv].weight.shape[0] - first == layers[proj].weight.shape[1]


@pytest.mark.parametrize(
    ("rows", "named", "classes", "null"),
    [(None, None, 1, None), (None, 1, 1, None), (5, None, 5, None), (5, 5, 5, None), (5, 4, 4, 4)],
)
def test_the_row_without_a_name_is_the_null_label(
    rows: int | None, named: int | None, classes: int, null: int | None
) -> None:
    adapter = adapter_of(named, num_class_embeds=rows)
    assert (adapter.num_classes, adapter.null_label) == (classes, null)


@pytest.mark.parametrize(
    ("rows", "match"), [(5, "expected 5 or 4, one"), (None, "expected 1, one")]
)
def test_another_number_of_names(rows: int | None, match: str) -> None:
    with pytest.raises(ConfigError, match=f"classes.json has 3 names, {match} per class"):
        adapter_of(3, num_class_embeds=rows)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fourier": (
        {"time_embedding_type": "fourier"},
        "time_embedding_type 'fourier' is not supported in a U-Net; expected positional; take",
    ),
    "class embedding": (
        {"class_embed_type": "timestep"},
        "class_embed_type 'timestep' is not supported in a U-Net; expected null",
    ),
    "norm": (
        {"resnet_time_scale_shift": "spatial"},
        "resnet_time_scale_shift 'spatial' is not supported .*; expected default or scale_shift",
    ),
    "activation": ({"act_fn": "mish"}, "act_fn 'mish' is not supported .*; expected silu or swish"),
    "middle": (
        {"mid_block_type": "UNetMidBlock2DCrossAttn"},
        "mid_block_type 'UNetMidBlock2DCrossAttn' .*; expected UNetMidBlock2D or null",
    ),
    "down": (
        {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")},
        "down_block_types 'CrossAttnDownBlock2D' is not supported .*; expected DownBlock2D or Attn",
    ),
    "up": (
        {"up_block_types": ("AttnSkipUpBlock2D", "UpBlock2D")},
        "up_block_types 'AttnSkipUpBlock2D' is not supported .*; expected UpBlock2D or Attn",
    ),
    "resizing": (
        {"downsample_type": "fir"},
        "downsample_type 'fir' is not supported .*; expected conv or resnet",
    ),
    "doubling": (
        {"upsample_type": "fir"},
        "upsample_type 'fir' is not supported .*; expected conv or resnet",
    ),
    "no size": (
        {"sample_size": None},
        "sample_size None is not supported; expected a multiple of 2, which 2 levels .* set it in",
    ),
    "odd size": ({"sample_size": (8, 5)}, "sample_size .8, 5. is not supported; expected a mult"),
}


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_taken_apart_is_refused(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    """From the config alone, before diffusers builds the model."""
    folder = save(tmp_path)
    path = folder / "unet/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))
    with pytest.raises(UnsupportedError, match=match):
        load(str(folder))


def test_a_directory_with_a_unet(tmp_path: Path) -> None:
    """Config, weights and names arrive."""
    model = load(str(save(tmp_path, CLASSES, **CONDITIONAL)))
    assert model.adapter.architecture == "UNet2DModel"
    assert model.adapter.sample_shape == (3, 8, 8)
    assert model.adapter.null_label == CLASSES == len(model.classes)
    wanted = adapter_of(**CONDITIONAL)
    for name, layer in wanted.layers().items():
        assert torch.equal(model.adapter.layers()[name].weight, layer.weight)
