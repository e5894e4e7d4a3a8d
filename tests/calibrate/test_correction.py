"""Variance correction: its gains against their definitions, and what it does to a sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.cache import fitted, make_plan
from ditcast.cache.fitted import Fitted, recipe_plan
from ditcast.calibrate import calibrate, correction, noise, qparams
from ditcast.calibrate.collect import draw_labels
from ditcast.calibrate.correction import GAINS, GUARD, LIMITS, exact, moment, printed
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import follow
from ditcast.errors import BundleError, ConfigError
from ditcast.export import to_onnx
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.sampling import correct
from tests.conftest import RECIPE


def latents(seed: int = 0, mean: float = 0.0) -> Tensor:
    """Some samples (n, C, H, W)."""
    return torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) + mean


def mean_of(x: Tensor) -> Tensor:
    return x.mean(dim=(0, 2, 3), keepdim=True)


def test_a_scaled_chain_gets_the_inverse_as_its_gain() -> None:
    """X = 1.15 wanted with a mean of zero: every form gives 1 / 1.15 (caching.md 1.4, i)."""
    wanted = latents()
    wanted = wanted - mean_of(wanted)
    for gain in GAINS.values():
        found = gain(1.15 * wanted, wanted, torch.zeros(1))
        torch.testing.assert_close(found, torch.full((2,), 1 / 1.15))


@pytest.mark.parametrize("kind", ["exact", "moment"])
def test_equal_chains_are_left_alone(kind: str) -> None:
    """K = 1 (ii), whatever the mean."""
    x = latents(mean=0.58)
    torch.testing.assert_close(GAINS[kind](x, x, mean_of(x)), torch.ones(2))


def test_the_moment_form_gives_the_reference_deviation() -> None:
    """Exactly (iv), and without pairs."""
    x, wanted = latents(0) * 1.1, latents(1)
    mean = mean_of(x)
    corrected = mean + moment(x, wanted, mean)[:, None, None] * (x - mean)
    torch.testing.assert_close(corrected.std(dim=(0, 2, 3)), wanted.std(dim=(0, 2, 3)))


def test_the_exact_form_is_the_minimum_of_the_objective() -> None:
    """On a grid of gains, of the weighted squared error with guarded weights, per channel."""
    wanted = latents(0, mean=0.58)
    x = 1.15 * wanted + 0.1 * latents(1)
    mean = mean_of(x)
    floor = (GUARD * wanted.std(dim=(0, 2, 3), keepdim=True)).square()
    weight = 1 + 1 / torch.maximum(wanted.square(), floor)
    grid = torch.linspace(0.5, 1.2, 1401)
    loss = [(weight * (mean + k * (x - mean) - wanted).square()).sum(dim=(0, 2, 3)) for k in grid]
    best = grid[torch.stack(loss).argmin(dim=0)]
    torch.testing.assert_close(exact(x, wanted, mean), best, rtol=0, atol=6e-4)


def test_the_printed_form_is_another_one_off_zero() -> None:
    """With a mean of 0.58 it shrinks a chain that has the right variance (caching.md 1.4)."""
    wanted = latents(mean=0.58)
    mean = mean_of(wanted)
    assert (printed(wanted, wanted, mean) < 0.9).all()
    torch.testing.assert_close(exact(wanted, wanted, mean), torch.ones(2))


def test_least_squares_shrinks_what_is_not_paired() -> None:
    """With independent errors the exact gain is below the ratio of deviations."""
    wanted = latents(0)
    x = wanted + 0.5 * latents(1)
    assert (exact(x, wanted, mean_of(x)) < moment(x, wanted, mean_of(x))).all()


def run(model: LoadedModel, **keys: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset of full precision under a recipe's plan."""
    recipe = recipes.make(RECIPE | {"correction": "exact", "samples": 16} | keys)
    plan = make_plan(
        recipe.cache, steps=recipe.steps, interval=recipe.interval, slots=len(model.adapter.slots)
    )
    return correction.fit(model, recipe, QParams(), plan)


@pytest.mark.parametrize("kind", ["exact", "moment"])
def test_full_precision_without_cache_needs_none(tiny: LoadedModel, kind: str) -> None:
    """K = 1 and no offset, to 1e-6 (iii)."""
    gain, offset = run(tiny, cache="none", correction=kind)
    assert gain.shape == offset.shape == (6, 3)
    np.testing.assert_allclose(gain, 1, atol=1e-6)
    np.testing.assert_allclose(offset, 0, atol=1e-6)


def test_a_cached_chain_gets_another_one(tiny: LoadedModel) -> None:
    """From the first reuse step on, the third here; inside the limits, the same every time."""
    gain, offset = run(tiny, steps=5, interval=4, cache="taylor")
    assert (gain[:2] == 1).all()
    assert (gain[2:] != 1).any(axis=1).all()
    assert gain.min() >= LIMITS[0]
    assert gain.max() <= LIMITS[1]
    again = run(tiny, steps=5, interval=4, cache="taylor")
    np.testing.assert_array_equal(again[0], gain)
    np.testing.assert_array_equal(again[1], offset)


def test_gains_out_of_range_are_cut_and_said(
    tiny: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed form would destroy the sample."""
    monkeypatch.setitem(correction.GAINS, "printed", lambda x, wanted, mean: torch.full((3,), 0.1))
    gain, _ = run(tiny, correction="printed")
    assert (gain == np.float32(0.8)).all()
    assert (
        "correction: step 0 asks for gains 0.10 to 0.10, cut to (0.8, 1.2)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("gain", "keys", "message"),
    [
        (float("nan"), {}, "correction: got printed, whose gain at step 0 is no number; expected"),
        (1.0, {"guidance": 1e38}, "calibration: NaN or Inf in the sample at step 0"),
    ],
)
def test_what_is_no_number_is_refused(
    tiny: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    gain: float,
    keys: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setitem(GAINS, "printed", lambda x, wanted, mean: torch.full((3,), gain))
    with pytest.raises(ConfigError, match=message):
        run(tiny, correction="printed", **keys)


def test_a_corrected_chain_has_the_deviations_of_the_reference(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    """After every step of the quantized and cached chain, around its mean: replayed in torch."""
    keys: dict[str, Any] = {"scheme": "w4a8", "correction": "moment", "steps": 6, "samples": 4}
    recipe = recipes.make(RECIPE | keys)
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipe))
    calibrate(bundle, tiny)
    held = fitted.of_target(bundle, "onnxruntime")
    assert held.gain is not None
    assert held.offset is not None
    scales = qparams.of_bundle(bundle)
    labels = draw_labels(recipe, tiny.adapter.num_classes)
    wanted: list[Tensor] = []
    before: list[Tensor] = []

    def replay(step: int, x: Tensor) -> Tensor:
        before.append(x)
        assert held.gain is not None
        assert held.offset is not None
        gain, offset = torch.from_numpy(held.gain[step]), torch.from_numpy(held.offset[step])
        found: Tensor = correct(x, gain, offset)
        torch.testing.assert_close(mean_of(found), mean_of(x), atol=1e-5, rtol=1e-4)
        inside = (gain > LIMITS[0]) & (gain < LIMITS[1])
        deviations = [y.std(dim=(0, 2, 3))[inside] for y in (found, wanted[step])]
        torch.testing.assert_close(*deviations, rtol=1e-3, atol=1e-5)
        return found

    def remember(step: int, x: Tensor) -> Tensor:
        del step
        wanted.append(x)
        return x

    follow(tiny, recipe, range(4), labels, correct=remember)
    with quantized(tiny.adapter, scales):
        plan = held.plan(bundle.manifest)
        follow(tiny, recipe, range(4), labels, plan=plan, correct=replay)
    assert any((a.std() - b.std()).abs() > 1e-4 for a, b in zip(before, wanted, strict=True))


def square(values: Tensor) -> float:
    return float(values.square().mean())


@pytest.mark.parametrize("rule", ["error", "noise"])
def test_the_guard_compares_slot_outputs(tiny: LoadedModel, tmp_path: Path, rule: str) -> None:
    """By brute force: one slot's outputs, kept at every step of full precision and quantized."""
    keys: dict[str, Any] = {"cache": "taylor", "interval": 3, "steps": 6, "samples": 2}
    keys["guard"] = rule
    recipe = recipes.make(RECIPE | keys)
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipe))
    calibrate(bundle, tiny)
    held = fitted.of_target(bundle, "onnxruntime")
    assert held.forecast is not None
    assert held.reuse is not None
    scales = qparams.of_bundle(bundle)
    labels = draw_labels(recipe, tiny.adapter.num_classes)
    outputs: list[Tensor] = []
    inputs: list[tuple[Tensor, ...]] = []
    module = tiny.adapter.denoiser
    hooks = [
        module.get_submodule("blocks.1.attn").register_forward_hook(
            lambda module, args, output: outputs.append(output)
        ),
        module.register_forward_pre_hook(lambda module, args: inputs.append(args)),
    ]
    follow(tiny, recipe, range(2), labels)
    with quantized(tiny.adapter, scales), torch.no_grad():
        for arguments in inputs[:6]:
            tiny.adapter.denoiser(*arguments)
    for hook in hooks:
        hook.remove()
    exact, rounded = outputs[:6], outputs[6:]
    slot = tiny.adapter.slots.index("blocks.1.attn")
    plan = recipe_plan(bundle.manifest)
    assert plan.full.tolist() == [True, True, False, False, True, False]
    for step, newest, before in ((2, 1, 0), (3, 1, 0), (5, 4, 1)):
        first, second = plan.weights[step, :, slot].tolist()
        if rule == "error":
            found = first * rounded[newest] + second * rounded[before]
            pair = square(found - exact[step]), square(rounded[newest] - exact[step])
        else:
            noise = [square(rounded[t] - exact[t]) for t in (newest, before)]
            pair = (
                first**2 * noise[0] + second**2 * noise[1],
                square(exact[step] - exact[newest]) / 2,
            )
        assert held.forecast[step, slot] == pytest.approx(pair[0], rel=1e-3)
        assert held.reuse[step, slot] == pytest.approx(pair[1], rel=1e-3)
    assert (held.forecast[plan.full] == 0).all()
    assert (held.reuse[plan.full] == 0).all()


def test_an_export_before_the_cache_is_calibrated_is_refused(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    """Nothing that was asked for is left out without a word."""
    keys: dict[str, Any] = {"scheme": "none", "correction": "moment"}
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipes.make(RECIPE | keys)))
    with pytest.raises(BundleError, match=r"is not calibrated for its cache; run: ditcast calibr"):
        to_onnx(bundle, tiny)


def test_memory_is_bounded_by_fewer_images(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is left out: the tables are those of fewer samples."""
    keys: dict[str, Any] = {"cache": "taylor", "interval": 3, "correction": "moment"}
    four, one = (recipes.make(RECIPE | keys | {"samples": n}) for n in (4, 1))
    plan = make_plan("taylor", steps=6, interval=3, slots=len(tiny.adapter.slots))
    # Labels are drawn for the whole recipe: those of one sample are the first of four.
    labels = [draw_labels(recipe, tiny.adapter.num_classes)[0] for recipe in (four, one)]
    assert labels[0] == labels[1]
    whole = noise.measure(tiny, four, QParams(), plan)
    monkeypatch.setattr(noise, "BYTES", 1)
    bounded = noise.measure(tiny, four, QParams(), plan)
    np.testing.assert_array_equal(bounded, noise.measure(tiny, one, QParams(), plan))
    assert not np.array_equal(bounded, whole)
    whole = correction.fit(tiny, four, QParams(), plan)
    monkeypatch.setattr(correction, "IMAGES", 1)
    bounded = correction.fit(tiny, four, QParams(), plan)
    np.testing.assert_array_equal(bounded, correction.fit(tiny, one, QParams(), plan))
    assert not np.array_equal(bounded, whole)


def test_what_was_fitted_to_another_recipe_is_missing(tiny: LoadedModel, tmp_path: Path) -> None:
    """As is what was never fitted; where nothing is asked for, nothing is missing."""
    keys: dict[str, Any] = {"scheme": "none", "correction": "moment"}
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipes.make(RECIPE | keys)))
    assert fitted.missing(bundle.manifest)
    calibrate(bundle, tiny)
    assert not fitted.missing(bundle.manifest)
    assert bundle.manifest.cache is not None
    other = bundle.manifest.cache.model_copy(update={"made_from": "another"})
    assert fitted.missing(bundle.manifest.model_copy(update={"cache": other}))
    assert not fitted.missing(describe(tiny, recipes.make(RECIPE)))


def test_a_bundle_keeps_what_was_fitted(tiny: LoadedModel, tmp_path: Path) -> None:
    """Both tables of the guard and both of the correction; a second run does nothing."""
    keys = {"cache": "taylor", "steps": 8, "interval": 3, "correction": "moment", "scheme": "w4a8"}
    keys["guard"] = "error"
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipes.make(RECIPE | keys)))
    calibrate(bundle, tiny)
    section = bundle.manifest.cache
    assert section is not None
    assert section.corrected
    assert section.forecasts == 4 * 4  # steps 2, 3, 5, 6
    found = fitted.of_target(bundle, "onnxruntime")
    assert found.forecast is not None
    assert found.reuse is not None
    assert found.gain is not None
    assert found.forecast.shape == found.reuse.shape == (8, 4)
    assert fitted.of_target(bundle, "reference") == Fitted()
    before = bundle.manifest.digest
    calibrate(bundle, tiny)
    assert bundle.manifest.digest == before


@pytest.mark.parametrize("keys", [{"cache": "fora"}, {"guard": "off"}, {"scheme": "none"}], ids=str)
def test_nothing_is_fitted_where_nothing_is_asked_for(
    tiny: LoadedModel, tmp_path: Path, keys: dict[str, str]
) -> None:
    """Plain reuse, no guard, or no quantization."""
    values = RECIPE | {"cache": "taylor", "guard": "error"} | keys
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipes.make(values)))
    calibrate(bundle, tiny)
    assert bundle.manifest.cache is None


def test_coarser_codes_make_larger_errors(tiny: LoadedModel, tmp_path: Path) -> None:
    """W4A8 against W8A8, of forecasts in all slots together."""
    errors = []
    for scheme in ("w8a8", "w4a8"):
        keys = {"cache": "taylor", "scheme": scheme, "guard": "error"}
        bundle = Bundle.create(tmp_path / scheme, describe(tiny, recipes.make(RECIPE | keys)))
        calibrate(bundle, tiny)
        found = fitted.of_target(bundle, "onnxruntime").forecast
        assert found is not None
        errors.append(float(found.sum()))
    assert errors[1] > errors[0]


def test_a_correction_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="correction: got exact with scheme none and cache none"):
        recipes.make({"correction": "exact", "scheme": "none", "cache": "none"})
