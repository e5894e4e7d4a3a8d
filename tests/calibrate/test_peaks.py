"""How large inputs are at each step, as calibration keeps it, against trajectories by hand."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cache.fitted import recipe_plan
from ditcast.calibrate import tib
from ditcast.calibrate.collect import draw_labels
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import follow
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.recipe import TEMPORAL
from tests.conftest import RECIPE, calibrated

QUICK: dict[str, Any] = {"iterations": 2, "rows": 12}


def by_hand(model: LoadedModel, manifest: Any, found: QParams) -> dict[str, Tensor]:
    """The largest magnitude (T,) of the input of every layer of the balanced network."""
    recipe, step = manifest.recipe, 0
    peaks = {name: torch.zeros(recipe.steps) for name in model.adapter.layers()}

    def next_step(done: int, full: bool) -> None:
        nonlocal step
        del full
        step = (done + 1) % recipe.steps

    def look(name: str, x: Tensor) -> None:
        peaks[name][step] = max(float(peaks[name][step]), float(x.abs().max()))

    labels = draw_labels(recipe, model.adapter.num_classes)
    plan = recipe_plan(manifest) if recipe.trajectories == "cached" else None
    with quantized(model.adapter, QParams(balance=found.balance)), contextlib.ExitStack() as hooks:
        for name, layer in model.adapter.layers().items():
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0]))
            hooks.callback(hook.remove)
        follow(model, recipe, range(len(labels)), labels, plan=plan, callback=next_step)
    return peaks


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "absmax"},
        {"method": "tfmq"},
        {"method": "absmax", "balance": "smooth"},
        {"method": "brecq", "balance": "ptq4dit", "fsc": "all"},
        {"method": "percentile", "trajectories": "cached"},
        {"method": "tfmq", "balance": "smooth", "trajectories": "cached"},
    ],
    ids=lambda keys: "-".join(keys.values()),
)
def test_peaks_of_the_network(tiny: LoadedModel, tmp_path: Path, keys: dict[str, Any]) -> None:
    """Of every input that is rounded, as it is rounded: balanced, and 0 where it does not run."""
    values = RECIPE | QUICK | keys
    found = calibrated(tiny, tmp_path / "b", values)
    manifest = describe(tiny, recipes.make(values))
    wanted = by_hand(tiny, manifest, found)
    rounded = [name for name, held in found.layers.items() if held.activation is not None]
    assert "blocks.0.attn.qkv" in rounded
    for name in rounded:
        peak = found.layers[name].peak
        assert peak is not None
        torch.testing.assert_close(peak, wanted[name], rtol=1e-4, atol=0)
        assert len(set(peak.tolist())) > 1
    cached, full = keys.get("trajectories") == "cached", recipe_plan(manifest).full.tolist()
    fc2 = found.layers["blocks.1.mlp.fc2"].peak
    assert fc2 is not None
    assert (fc2 > 0).tolist() == (full if cached else [True] * 6)
    assert not all(full)


def test_peaks_are_what_absmax_takes(tiny: LoadedModel, tmp_path: Path) -> None:
    """Step by step, bins ascending with the timestep, and at once."""
    for fsc in ("all", "none"):
        found = calibrated(tiny, tmp_path / fsc, RECIPE | {"method": "absmax", "fsc": fsc})
        for held in found.layers.values():
            assert held.peak is not None
            assert held.activation is not None
            seen = held.peak.flip(0) if fsc == "all" else held.peak.max()
            torch.testing.assert_close(held.activation * 127, seen, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fsc", ["none", "tib"])
@pytest.mark.parametrize("temporal", ["tib", "naive"])
def test_peaks_of_the_tib(tiny: LoadedModel, tmp_path: Path, temporal: str, fsc: str) -> None:
    """With its weights rounded, over the labels that it is calibrated on."""
    values = RECIPE | {"temporal": temporal, "fsc": fsc}
    found = calibrated(tiny, tmp_path / "b", values)
    own = {name: held for name, held in found.layers.items() if name.startswith(TEMPORAL)}
    timesteps = torch.tensor([830.0, 664.0, 498.0, 332.0, 166.0, 0.0])
    labels = tib.draw_labels(tiny.adapter, timesteps, 0)
    seen: list[float] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        seen.append(float(args[0].abs().max()))

    assert "temporal.modulation.1" in own
    for name, held in own.items():
        seen.clear()
        with torch.no_grad(), tib.rounded(tiny.adapter, own) as layers:
            hook = layers[name].register_forward_pre_hook(look)
            for t in timesteps:
                tiny.adapter.temporal.own(t[None], labels)
            hook.remove()
        assert held.peak is not None
        torch.testing.assert_close(held.peak, torch.tensor(seen))


def test_inputs_in_float_have_no_peaks(tiny: LoadedModel, tmp_path: Path) -> None:
    """Nor do they need a pass over trajectories."""
    found = calibrated(tiny, tmp_path / "b", RECIPE | {"scheme": "w4a16"})
    assert found.layers
    assert all(held.peak is None for held in found.layers.values())


def test_peaks_are_the_same_every_time(tiny: LoadedModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        calibrated(tiny, tmp_path / name, RECIPE | QUICK | {"method": "tfmq", "temporal": "tib"})
    assert Bundle.open(tmp_path / "a").manifest == Bundle.open(tmp_path / "b").manifest
