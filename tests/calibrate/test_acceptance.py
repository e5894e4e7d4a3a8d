"""What TFMQ-DM and Temporal Feature Matters claim, on small models, W4A8, few calibration latents.

Only the TIB is quantized where models are compared, its inputs rounded, so that nothing else
decides. Trajectories are of noise that no calibration has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ditcast.calibrate import features
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import sample
from ditcast.models import LoadedModel
from ditcast.models.base import vector_slices
from ditcast.schedule import from_config
from tests import unets
from tests.conftest import calibrated

STEPS, IMAGES, SEED = 6, 16, 777
RECIPE: dict[str, Any] = {
    "steps": STEPS,
    "guidance": 1.0,
    "cache": "none",
    "interval": 1,
    "scheme": "w4a8",
    "samples": 1,  # few latents: one row of each step
    "batch": 1,
    "rows": STEPS,
}
BLOCKWISE: dict[str, Any] = {
    "method": "tfmq",
    "temporal": "naive",
    "init": "nearest",
    "iterations": 100,
    "fsc": "none",
}
FROZEN: dict[str, Any] = {"method": "mse", "temporal": "tib", "fsc": "none"}
TFMQ: dict[str, Any] = BLOCKWISE | {"temporal": "tib", "fsc": "tib"}

Found = Callable[..., QParams]


def tib_alone(found: QParams) -> QParams:
    """Everything but the TIB in float."""
    layers = {name: s for name, s in found.layers.items() if name.startswith("temporal.")}
    assert layers
    assert any(held.activation is not None for held in layers.values())
    return replace(found, layers=layers)


@torch.no_grad()
def states(model: LoadedModel, found: QParams) -> Tensor:
    """The samples after every step, (T, n, C H W)."""
    seen: list[Tensor] = []

    def remember(step: int, x: Tensor) -> Tensor:
        del step
        seen.append(x)
        return x

    with quantized(model.adapter, found):
        sample(
            model.adapter,
            from_config(model.scheduler),
            sampler="ddim",
            steps=STEPS,
            guidance=1.0,
            seed=SEED,
            indices=range(IMAGES),
            labels=[i % model.adapter.num_classes for i in range(IMAGES)],
            correct=remember,
        )
    return torch.stack(seen).flatten(start_dim=2)


def turned(model: LoadedModel, found: QParams) -> Tensor:
    """1 - cos(x_t, x_t^q) after every step, (T,), a mean over images."""
    wanted, made = states(model, QParams()), states(model, found)
    cosines = functional.cosine_similarity(wanted.double(), made.double(), dim=-1)
    return 1 - cosines.mean(dim=1)


def end_error(model: LoadedModel, found: QParams) -> float:
    """Squared error of the images, relative to their power."""
    wanted, made = states(model, QParams())[-1], states(model, found)[-1]
    return float((made - wanted).square().mean() / wanted.square().mean())


@torch.no_grad()
def feature_cosine(model: LoadedModel, found: QParams) -> float:
    """The mean over steps, labels and vectors of cos(e, e_q)."""
    adapter = model.adapter
    steps = torch.from_numpy(from_config(model.scheduler).timesteps(STEPS)).float()
    labels = torch.arange(adapter.num_classes)
    wanted = adapter.temporal(steps, labels)
    with quantized(adapter, found):
        made = adapter.temporal(steps, labels)
    each = [
        functional.cosine_similarity(made[..., c], wanted[..., c], dim=-1)
        for c in vector_slices(adapter.parts)
    ]
    return float(torch.stack(each).mean())


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The papers' kind of model."""
    return unets.loaded(tmp_path_factory.mktemp("unet"), unets.CLASSES, **unets.CONDITIONAL)


@pytest.fixture(scope="module", params=["unet", "dit"])
def model(request: pytest.FixtureRequest, unet: LoadedModel, tiny: LoadedModel) -> LoadedModel:
    return unet if request.param == "unet" else tiny


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The TIB of a model by some recipe, made once."""
    held: dict[str, QParams] = {}

    def find(model: LoadedModel, **keys: Any) -> QParams:
        name = f"{model.fingerprint} {sorted(keys.items())}"
        if name not in held:
            path = tmp_path_factory.mktemp("acceptance") / "b"
            held[name] = tib_alone(calibrated(model, path, RECIPE | keys))
        return held[name]

    return find


def test_freezing_embedding_layers_beats_optimizing_them_in_blocks(
    model: LoadedModel, found: Found
) -> None:
    """Nearest codes and min-max ranges against the blocks' optimum, a mean over two seeds.

    Because blocks fit their embedding layers to few latents: with 16 trajectories and 96 rows in
    place of 1 and 6, the blocks' optimum makes the better images of the DiT.
    """
    frozen = found(model, **FROZEN)
    blockwise = [found(model, **BLOCKWISE, seed=seed) for seed in (0, 1)]
    assert end_error(model, frozen) < 0.95 * sum(end_error(model, x) for x in blockwise) / 2
    assert feature_cosine(model, frozen) > sum(feature_cosine(model, x) for x in blockwise) / 2


def test_temporal_features_turn_less(model: LoadedModel, found: Found) -> None:
    """By TIAR and FSC, their cosine is less than half as far from 1; the whole TIB is rounded."""
    ours, blockwise = (feature_cosine(model, found(model, **k)) for k in (TFMQ, BLOCKWISE))
    assert 1 - ours < (1 - blockwise) / 2


def test_trajectories_turn_less_at_every_step(model: LoadedModel, found: Found) -> None:
    """With only the TIB quantized, cos(x_t, x_t^q) lies above the baseline's at every t."""
    ours, blockwise = (turned(model, found(model, **k)) for k in (TFMQ, BLOCKWISE))
    assert (ours < blockwise).all()
    assert ours[-1] < 0.8 * blockwise[-1]


def test_16_bit_features_with_selection_sample_as_the_tib_in_float(
    model: LoadedModel, tmp_path: Path
) -> None:
    """To rounding, everything else quantized alike; features of 8 bits would be seen."""
    keys = {"scheme": "w4a16", "method": "mse"}
    chosen = calibrated(model, tmp_path / "select", RECIPE | keys | {"temporal": "select"})
    plain = calibrated(model, tmp_path / "fp", RECIPE | keys | {"temporal": "fp"})
    assert chosen.stored is not None
    assert chosen.stored.codes.dtype == torch.int16
    wanted, made = states(model, plain), states(model, chosen)
    tolerance = 1e-3 * float(wanted.std())
    torch.testing.assert_close(made, wanted, rtol=0, atol=tolerance)
    labels = chosen.stored.labels.tolist()
    coarse = features.store(model.adapter, chosen.stored.timesteps, labels, 8)
    worse = states(model, replace(plain, stored=coarse))
    assert float((worse - wanted).abs().max()) > 2 * tolerance
