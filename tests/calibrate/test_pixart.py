"""Calibration of a PixArt transformer: one TIB for all blocks, and captions in float."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate, qparams
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.stage import check
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel
from ditcast.models.base import describe, features_size
from tests.pixarts import PROMPTS, TOKENS, loaded

RECIPE: dict[str, Any] = {"steps": 4, "interval": 2, "samples": 4, "batch": 2, "guidance": 2.0}
LEARNED: dict[str, Any] = {"method": "tfmq", "iterations": 10, "rows": 16}
OWN = 14 * 32  # modulations of two blocks and of the final layer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Two blocks, four captions."""
    return loaded(tmp_path_factory.mktemp("pixart"))


def calibrated(model: LoadedModel, path: Path, **keys: Any) -> tuple[Bundle, QParams]:
    """A calibrated bundle without graphs, and what was found."""
    bundle = Bundle.create(path, describe(model, recipes.make(RECIPE | keys)))
    calibrate(bundle, model)
    return bundle, qparams.of_bundle(bundle)


def features_of(model: LoadedModel, timesteps: Tensor) -> Tensor:
    """The temporal features of all captions, as they are now."""
    found: Tensor = model.adapter.temporal(timesteps, torch.arange(PROMPTS + 1))
    return found


@torch.no_grad()
def error_of_a_step(model: LoadedModel, scales: QParams) -> float:
    """How far quantization moves the output of one full step."""
    adapter = model.adapter
    x = torch.randn(5, *adapter.sample_shape, generator=torch.Generator().manual_seed(5))
    outputs = []
    for held in (QParams(), scales):
        with quantized(adapter, held):
            features = features_of(model, torch.tensor([500.0]))[0]
            nothing = features[None][:0], torch.zeros(0, len(adapter.slots))
            outputs.append(adapter.denoiser(x, features, *nothing)[0])
    return float((outputs[1] - outputs[0]).square().mean().sqrt())


@pytest.mark.parametrize("fsc", ["none", "all"])
def test_every_layer_has_scales(model: LoadedModel, tmp_path: Path, fsc: str) -> None:
    """Keys and values have one row for each token of a caption."""
    bundle, found = calibrated(model, tmp_path / "b", fsc=fsc)
    layers = ("attn.qkv", "attn.proj", "cross.q", "cross.kv", "cross.proj", "mlp.fc1", "mlp.fc2")
    assert set(found.layers) == {f"blocks.{i}.{layer}" for i in (0, 1) for layer in layers}
    for scales in found.layers.values():
        assert scales.activation is not None
        assert scales.activation.shape == (() if fsc == "none" else (4,))
    assert bundle.manifest.quantization is not None
    rows = {held.name: held.positions for held in bundle.manifest.quantization.layers}
    assert rows["blocks.1.cross.kv"] == TOKENS
    assert rows["blocks.1.cross.q"] == 16
    assert 1e-4 < error_of_a_step(model, found) < 0.05
    assert bundle.manifest.model.features == features_size(model.adapter.parts)


@pytest.mark.parametrize("temporal", ["naive", "tib", "cache", "select"])
def test_every_way_to_keep_the_temporal_features(
    model: LoadedModel, tmp_path: Path, temporal: str
) -> None:
    """The TIB or its codes for the modulations; captions are those of full precision."""
    bundle, found = calibrated(model, tmp_path / "b", temporal=temporal, fsc="tib", **LEARNED)
    inside = {name for name in found.layers if name.startswith("temporal.")}
    first = torch.tensor([750.0])  # of the steps
    with torch.no_grad():
        wanted = features_of(model, first)
    if temporal in ("naive", "tib"):
        assert inside == {"temporal.time.linear_2", "temporal.modulation"}
        assert found.stored is None
    else:
        assert found.stored is not None
        assert found.stored.codes.shape == (4, 1, OWN)  # one set, that of all captions
        assert found.stored.scale.shape == (4, 1, 14)
        assert bundle.manifest.stored_labels() == tuple(range(PROMPTS))
        assert bool(inside) == (found.stored.module is not None)
    with torch.no_grad(), quantized(model.adapter, found):
        got = features_of(model, first)
    assert torch.equal(got[..., OWN:], wanted[..., OWN:])
    error = (got - wanted).abs()[..., :OWN].amax(dim=(0, 2))
    assert 1e-6 < float(error.max()) < 0.1
    assert float(error.min()) == float(error.max())  # equal for all captions


def test_balancing_and_scales_per_step_leave_the_caption(
    model: LoadedModel, tmp_path: Path
) -> None:
    """Both are folded into the modulations; scales lie behind the caption's mask."""
    _, found = calibrated(model, tmp_path / "b", balance="ptq4dit", fsc="all")
    chained = {f"blocks.{i}.{slot}.proj" for i in (0, 1) for slot in ("attn", "cross")}
    assert found.balance.keys() == {*model.adapter.chained(), *model.adapter.modulated()}
    assert chained < found.balance.keys()
    assert all(float(factor.std()) > 0.01 for factor in found.balance.values())
    assert error_of_a_step(model, QParams(balance=found.balance)) < 1e-5
    with torch.no_grad():
        wanted = features_of(model, torch.tensor([500.0]))
        with quantized(model.adapter, found):
            got = features_of(model, torch.tensor([500.0]))
    size = features_size(model.adapter.parts)
    assert got.shape[-1] == size + len(found.layers)
    assert torch.equal(got[..., OWN:size], wanted[..., OWN:])
    assert not torch.equal(got[..., :OWN], wanted[..., :OWN])
    assert 1e-4 < error_of_a_step(model, found) < 0.05


def test_reconstruction_is_better_than_the_nearest(model: LoadedModel, tmp_path: Path) -> None:
    """In 4 bits, block by block, each with its caption."""
    keys: dict[str, Any] = {"scheme": "w4a8", "samples": 16, "batch": 16, "rows": 64}
    _, nearest = calibrated(model, tmp_path / "nearest", method="mse", **keys)
    keys |= {"method": "tfmq", "iterations": 60}
    _, learned = calibrated(model, tmp_path / "learned", **keys)
    assert error_of_a_step(model, learned) < 0.95 * error_of_a_step(model, nearest)
    linear = model.adapter.layers()["blocks.0.cross.kv"]
    assert isinstance(linear, nn.Linear)
    codes = learned.layers["blocks.0.cross.kv"].codes
    assert codes is not None
    assert codes.shape == linear.weight.shape


def test_the_cache_is_calibrated_too(model: LoadedModel, tmp_path: Path) -> None:
    """The noise guard knows three slots per block."""
    keys = {"cache": "taylor", "steps": 6, "guard": "error", "correction": "moment"}
    bundle, _ = calibrated(model, tmp_path / "b", **keys)
    assert bundle.manifest.cache is not None
    assert bundle.manifest.cache.forecasts == 2 * 6
    assert bundle.manifest.cache.corrected


def test_a_store_larger_than_the_tib(model: LoadedModel) -> None:
    """It is one set for all captions; their projection is no part of what it replaces."""
    adapter = model.adapter
    assert adapter.temporal.shared is not None
    tib = 4 * sum(
        p.numel()
        for name, p in adapter.temporal.named_parameters()
        if not name.startswith("shared.")
    )
    most = tib // OWN
    keys = RECIPE | {"temporal": "cache"}
    check(model, recipes.make(keys | {"steps": most}))
    match = rf"labels: the features of {most + 1} steps and 1 labels take .* MiB of the modules"
    with pytest.raises(ConfigError, match=match):
        check(model, recipes.make(keys | {"steps": most + 1}))


def test_stored_features_of_other_steps(model: LoadedModel, tmp_path: Path) -> None:
    """An error, never another step's."""
    _, found = calibrated(model, tmp_path / "b", temporal="cache")
    with torch.no_grad(), quantized(model.adapter, found), pytest.raises(IndexError):
        features_of(model, torch.tensor([501.0]))
    assert error_of_a_step(model, replace(found, stored=None)) < 0.05
