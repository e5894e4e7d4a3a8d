"""Every calibration method on a U-Net: convolutions are treated as the products that they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate, qparams
from ditcast.calibrate.codes import weight_scale
from ditcast.calibrate.gptq import compensated, grams
from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.qparams import LayerScales, QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.stage import check
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.recipe import Bits
from tests.unets import CLASSES, CONDITIONAL, OTHER, loaded

RECIPE: dict[str, Any] = {"steps": 4, "interval": 2, "samples": 4, "batch": 2, "guidance": 1.0}
GEOMETRIES: list[dict[str, Any]] = [
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "bias": False},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A class-conditional U-Net with a null label."""
    return loaded(tmp_path_factory.mktemp("unet"), CLASSES, **CONDITIONAL)


def calibrated(model: LoadedModel, path: Path, **keys: Any) -> tuple[Bundle, QParams]:
    """A calibrated bundle without graphs, and what was found."""
    bundle = Bundle.create(path, describe(model, recipes.make(RECIPE | keys)))
    calibrate(bundle, model)
    return bundle, qparams.of_bundle(bundle)


def error_of_a_step(model: LoadedModel, scales: QParams) -> float:
    """How far quantization moves the output of one full step."""
    adapter = model.adapter
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, *adapter.sample_shape, generator=generator)

    def step() -> Tensor:
        features = adapter.temporal(torch.tensor([500.0]), torch.tensor([0, 1, 2, 3]))[0]
        found: Tensor = adapter.denoiser(x, features, features[None][:0], torch.zeros(0, 1))[0]
        return found

    with torch.no_grad():
        wanted = step()
        with quantized(adapter, scales):
            return float((step() - wanted).square().mean().sqrt())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_gram_of_a_convolution_is_that_of_its_windows(geometry: dict[str, Any]) -> None:
    """The energy of its outputs is w G w^T, whatever its geometry."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, **geometry).requires_grad_(False)
    first, second = torch.randn(2, 3, 9, 9), torch.randn(1, 3, 9, 9)
    with grams({"layer": layer}) as found:
        outputs = torch.cat([layer(first), layer(second)])
    if layer.bias is not None:
        outputs = outputs - layer.bias[:, None, None]
    weight = layer.weight.flatten(start_dim=1)
    energy = outputs.square().sum(dim=(0, 2, 3))
    torch.testing.assert_close((weight @ found["layer"] @ weight.T).diagonal(), energy)


def test_compensated_codes_of_a_convolution_are_better() -> None:
    """On correlated pixels, 4-bit codes of GPTQ make less error than the nearest ones."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, padding=1).requires_grad_(False)
    x = functional.avg_pool2d(torch.randn(4, 8, 24, 24), 3, stride=1)
    step = weight_scale(layer.weight.data, search=True, bits=4)
    nearest = LayerScales(bits=Bits(4, 16), weight=step)
    with grams({"layer": layer}) as found:
        wanted = layer(x)
    turned = compensated(layer.weight.data, nearest, found["layer"])
    codes = torch.clamp(torch.round(turned), -8, 7).to(torch.int8)
    errors = [
        float((QuantizedLayer(layer, scales)(x) - wanted).square().mean())
        for scales in (nearest, replace(nearest, codes=codes))
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("fsc", ["none", "all"])
@pytest.mark.parametrize("method", ["absmax", "minmax", "percentile", "mse"])
def test_every_observer_sees_convolutions(
    model: LoadedModel, tmp_path: Path, method: str, fsc: str
) -> None:
    """One scale per tensor or per step, and one per output channel of the weight."""
    bundle, found = calibrated(model, tmp_path / "b", method=method, fsc=fsc)
    layers, positions = model.adapter.layers(), model.adapter.positions()
    assert found.layers.keys() == {name for name in layers if name.startswith("blocks.")}
    for name, scales in found.layers.items():
        assert scales.weight.shape == (len(layers[name].weight),)
        assert scales.activation is not None
        assert scales.activation.shape == (() if fsc == "none" else (4,))
    assert bundle.manifest.quantization is not None
    for held in bundle.manifest.quantization.layers:
        weight = layers[held.name].weight
        assert held.shape == (len(weight), weight[0].numel())
        assert held.positions == positions[held.name]
    assert 1e-4 < error_of_a_step(model, found) < 0.05  # something is rounded


@pytest.mark.parametrize(
    ("method", "iterations", "limit"), [("tfmq", 0, 0.9), ("tfmq", 100, 0.95), ("brecq", 40, 1.0)]
)
def test_reconstruction_is_better_than_the_nearest(
    model: LoadedModel, tmp_path: Path, method: str, iterations: int, limit: float
) -> None:
    """In 4 bits, part by part along the skips; GPTQ alone (no iterations) is better already."""
    keys: dict[str, Any] = {"scheme": "w4a8", "samples": 16, "batch": 16, "rows": 64}
    _, nearest = calibrated(model, tmp_path / "nearest", method="mse", **keys)
    keys |= {"method": method, "iterations": iterations}
    _, learned = calibrated(model, tmp_path / "learned", **keys)
    assert error_of_a_step(model, learned) < limit * error_of_a_step(model, nearest)
    codes = learned.layers["blocks.0.conv1"].codes
    assert codes is not None
    assert codes.shape == (16, 16 * 9)


@pytest.mark.parametrize("temporal", ["naive", "tib", "cache", "select"])
def test_every_way_to_keep_the_temporal_features(
    model: LoadedModel, tmp_path: Path, temporal: str
) -> None:
    """The TIB is the time embedding and all projections; its first Linear stays in float."""
    keys = {"method": "tfmq", "iterations": 10, "rows": 16, "labels": (1,)}
    _, found = calibrated(model, tmp_path / "b", temporal=temporal, **keys)
    inside = {name for name in found.layers if name.startswith("temporal.")}
    projections = {f"temporal.projections.{i}" for i in range(8)}
    if temporal in ("naive", "tib"):
        assert inside == {"temporal.time.linear_2", *projections}
    if temporal in ("cache", "select"):
        assert found.stored is not None
        assert found.stored.labels.tolist() == [1, CLASSES]
        assert bool(inside) == (found.stored.module is not None)  # the TIB stays where it is taken
    if temporal == "cache":
        found = replace(found, stored=None)  # other steps than those that are stored
    if temporal != "select":
        assert 1e-4 < error_of_a_step(model, found) < 0.1


def test_stored_features_without_a_null_label(tmp_path: Path) -> None:
    """All that is stored is the one label there is."""
    model = loaded(tmp_path / "m", **OTHER)
    bundle, found = calibrated(model, tmp_path / "b", temporal="cache")
    assert found.stored is not None
    assert found.stored.labels.tolist() == [0]
    assert bundle.manifest.stored_labels() == (0,)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"guidance": 2.0}, "guidance: got 2.0, but the model has no null label to guide away"),
        ({"balance": "smooth"}, "balance: got smooth, but no layer of the model can be balanced"),
        (
            {"cache": "stack"},
            "cache: got stack, which needs the graphs change, but there are none for a "
            "UNet2DModel; expected none, fora, deepcache, taylor or output",
        ),
    ],
)
def test_a_recipe_that_does_not_fit(tmp_path: Path, keys: dict[str, Any], match: str) -> None:
    """Before a bundle is started: an unconditional model without attention."""
    model = loaded(tmp_path, add_attention=False)
    with pytest.raises(ConfigError, match=match):
        check(model, recipes.make(RECIPE | {"guidance": 1.0} | keys))


def test_balancing_of_attention(model: LoadedModel, tmp_path: Path) -> None:
    """The attention's output is all that can be balanced; in float nothing changes by it."""
    _, found = calibrated(model, tmp_path / "b", balance="ptq4dit")
    assert found.balance.keys() == set(model.adapter.chained())
    assert all(float(factor.std()) > 0.01 for factor in found.balance.values())
    assert error_of_a_step(model, QParams(balance=found.balance)) < 1e-5


def test_the_cache_is_calibrated_too(model: LoadedModel, tmp_path: Path) -> None:
    """Noise guard and variance correction know the one slot."""
    keys = {"cache": "taylor", "interval": 2, "steps": 6, "guard": "error", "correction": "moment"}
    bundle, _ = calibrated(model, tmp_path / "b", guidance=2.0, **keys)
    assert bundle.manifest.cache is not None
    assert bundle.manifest.cache.forecasts == 2
    assert bundle.manifest.cache.corrected
