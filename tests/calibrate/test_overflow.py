"""NaN and Inf in a calibration: the layer and the step are named, whatever is calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel, load
from ditcast.models.base import describe
from tests.conftest import RECIPE


def broken(folder: Path, layer: str) -> LoadedModel:
    """The tiny model with one infinite weight."""
    model = load(str(folder))
    layers = model.adapter.layers() | model.adapter.temporal_linears()
    with torch.no_grad():
        layers[layer].weight[0, 0] = torch.inf
    return model


def refused(model: LoadedModel, path: Path, **keys: Any) -> str:
    """What calibration says of a model or recipe that overflows."""
    values = RECIPE | {"iterations": 1, "rows": 12} | keys
    with pytest.raises(ConfigError, match="^calibration: NaN or Inf in ") as caught:
        calibrate(Bundle.create(path, describe(model, recipes.make(values))), model)
    return str(caught.value)


@pytest.mark.parametrize("steps", [6, 1])
@pytest.mark.parametrize("keys", [{"method": "absmax"}, {"method": "tfmq"}, {"balance": "ptq4dit"}])
def test_a_layer_that_overflows_is_named(
    tiny_dir: Path, tmp_path: Path, keys: dict[str, Any], steps: int
) -> None:
    """The one that is given its output, at the first step, by every kind of pass."""
    model = broken(tiny_dir, "blocks.1.mlp.fc1")
    found = refused(model, tmp_path / "b", steps=steps, interval=1, **keys)
    assert "in the input of layer blocks.1.mlp.fc2 at step 0;" in found


@pytest.mark.parametrize("steps", [6, 1])
@pytest.mark.parametrize("method", ["absmax", "tfmq"])
def test_the_last_layer_has_none_behind_it(
    tiny_dir: Path, tmp_path: Path, method: str, steps: int
) -> None:
    model = broken(tiny_dir, "final.proj")
    found = refused(model, tmp_path / "b", steps=steps, interval=1, method=method)
    assert "in the sample at step 0;" in found


@pytest.mark.parametrize("method", ["absmax", "tfmq"])
@pytest.mark.parametrize(
    ("temporal", "place"),
    [
        ("fp", "the input of layer blocks.1.attn.qkv"),
        ("tib", "the temporal features"),
        ("cache", "the temporal features"),
        ("select", "the temporal features"),
        ("naive", "the input of layer blocks.1.attn.qkv"),
    ],
)
def test_a_tib_that_overflows_is_named(
    tiny_dir: Path, tmp_path: Path, method: str, temporal: str, place: str
) -> None:
    model = broken(tiny_dir, "temporal.modulation.1")
    found = refused(model, tmp_path / "b", method=method, temporal=temporal, labels=[1])
    assert f"in {place} at step 0;" in found


@pytest.mark.parametrize("method", ["absmax", "tfmq"])
def test_guidance_that_overflows(tiny: LoadedModel, tmp_path: Path, method: str) -> None:
    """1e38 is finite, but what it makes of the sample at step 0 is not."""
    found = refused(tiny, tmp_path / "b", guidance=1e38, method=method)
    assert "in the sample at step 0; the model overflows with this sampler and guidance" in found
