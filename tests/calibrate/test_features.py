"""Temporal features as codes: how close they are, what is chosen, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate, features, qparams, stage, tib
from ditcast.calibrate.codes import feature_codes, weight_scale
from ditcast.calibrate.qparams import LayerScales, QParams, StoredFeatures
from ditcast.calibrate.simulate import quantized
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.recipe import Bits
from tests.conftest import RECIPE

STEPS = torch.tensor([900.0, 700.0, 300.0, 10.0])
LABELS = [0, 3, 5]
VECTORS, WIDTH = 6 * 2 + 2, 64  # modulations of two blocks and of the final layer


NARROW = [  # a TIB of 8 bits beside features of 6, which are not always the better ones
    {"pattern": "temporal.time.*.linear_1", "precision": "float"},
    {"pattern": "temporal.*", "precision": "w8a8"},
    {"pattern": "blocks.*", "precision": "w6a6"},
    {"pattern": "final.*", "precision": "float"},
]


def tib_of(model: LoadedModel, bits: Bits) -> QParams:
    """A quantized TIB with one range per step, rounded to the nearest."""
    linears = model.adapter.temporal_linears()
    scales = {
        name: LayerScales(
            bits=bits,
            weight=weight_scale(linear.weight.data, search=True, bits=bits.weight),
        )
        for name, linear in linears.items()
        if not name.endswith("linear_1")
    }
    bins = STEPS.flip(0)
    layers, outputs = tib.ranges(model.adapter, scales, list(bins[:, None]), torch.tensor(LABELS))
    return QParams(layers=layers, outputs=outputs, edges=(bins[1:] + bins[:-1]) / 2)


def selected(held: QParams, chosen: StoredFeatures) -> QParams:
    """The TIB beside the store, if it is taken anywhere."""
    return QParams(stored=chosen) if chosen.module is None else replace(held, stored=chosen)


@torch.no_grad()
def test_codes_are_those_of_each_vector(tiny: LoadedModel) -> None:
    """Per (step, label, modulation), in any order that is asked for."""
    stored = features.store(tiny.adapter, STEPS, LABELS, 8)
    assert stored.codes.dtype == torch.int8
    assert stored.codes.shape == (4, 3, tiny.adapter.parts[-1].columns.stop)
    asked, labels = STEPS[[2, 0, 2]], torch.tensor([5, 0])
    with quantized(tiny.adapter, QParams(stored=stored)):
        found = tiny.adapter.temporal(asked, labels)
    exact = tiny.adapter.temporal(asked, labels)
    assert stored.scale.shape == stored.zero_point.shape == (4, 3, VECTORS)
    codes, scale, zero = feature_codes(exact.unflatten(-1, (VECTORS, WIDTH)), 8)
    wanted = ((codes - zero[..., None]) * scale[..., None]).flatten(-2)
    difference = (found - wanted).abs()
    step = scale.repeat_interleave(WIDTH, dim=-1)
    assert (difference <= step * 1.001).all()  # a feature at a tie may go the other way
    assert (difference > 1e-5).float().mean() < 0.01


@torch.no_grad()
@pytest.mark.parametrize(("bits", "share"), [(6, 1 / 63), (8, 1 / 255), (16, 1 / 65535)])
def test_stored_features_are_the_exact_ones_to_rounding(
    tiny: LoadedModel, bits: int, share: float
) -> None:
    """No farther off, in root mean square, than half a step of the range of a vector."""
    stored = features.store(tiny.adapter, STEPS, LABELS, bits)
    assert stored.codes.dtype == (torch.int16 if bits == 16 else torch.int8)
    with quantized(tiny.adapter, QParams(stored=stored)):
        found = tiny.adapter.temporal(STEPS, torch.tensor(LABELS))
    wanted = tiny.adapter.temporal(STEPS, torch.tensor(LABELS))
    exact, ours = (x.unflatten(-1, (VECTORS, WIDTH)) for x in (wanted, found))
    step = (exact.amax(dim=-1) - exact.amin(dim=-1)) * share
    error = (ours - exact).square().mean(dim=-1).sqrt()
    assert (error <= step / 2 + 1e-7).all()
    assert (error >= step / 16).all()  # it is rounding, and nothing else


@torch.no_grad()
@pytest.mark.parametrize("name", ["timesteps", "labels"])
def test_what_is_not_stored_is_an_error(tiny: LoadedModel, name: str) -> None:
    """Never another step's or label's features."""
    stored = features.store(tiny.adapter, STEPS, LABELS, 8)
    asked = {"timesteps": torch.tensor([900.0, 10.0]), "labels": torch.tensor([0, 5])}
    with quantized(tiny.adapter, QParams(stored=stored)):
        assert tiny.adapter.temporal(*asked.values()).shape[:2] == (2, 2)
        asked[name][1] = 4
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            tiny.adapter.temporal(*asked.values())


@torch.no_grad()
@pytest.mark.parametrize(
    ("bits", "code_bits", "module"),
    [(Bits(8, 8), 8, "none"), (Bits(4, 16), 16, "none"), (Bits(8, 8), 6, "some")],
)
def test_selection_takes_the_smaller_error(
    tiny: LoadedModel, bits: Bits, code_bits: int, module: str
) -> None:
    """For every (step, part), summed over labels: that of the TIB or that of the codes.

    With as many bits the codes win everywhere: they are rounded once.
    """
    held = tib_of(tiny, bits)
    stored = features.store(tiny.adapter, STEPS, LABELS, code_bits)
    chosen = features.choose(tiny.adapter, held, stored)
    by_module = features.errors(tiny.adapter, held, stored)
    cache = features.errors(tiny.adapter, QParams(stored=stored), stored)
    found = features.errors(tiny.adapter, selected(held, chosen), stored)
    assert found.shape == (len(STEPS), len(tiny.adapter.parts))
    torch.testing.assert_close(found, torch.minimum(by_module, cache), rtol=1e-4, atol=1e-10)
    assert (chosen.module is None) == (module == "none")
    if chosen.module is not None:
        assert torch.equal(chosen.module, by_module < cache)


@torch.no_grad()
def test_selection_can_be_mixed(tiny: LoadedModel) -> None:
    """With codes made bad at one step, the TIB is taken there, and only there."""
    held = tib_of(tiny, Bits(8, 8))
    stored = features.store(tiny.adapter, STEPS, LABELS, 8)
    codes = stored.codes.clone()
    part = tiny.adapter.parts[1]
    codes[2, :, part.columns] = 0
    chosen = features.choose(tiny.adapter, held, replace(stored, codes=codes))
    assert chosen.module is not None
    assert chosen.module[2].tolist() == [False, True, False]
    with quantized(tiny.adapter, held):
        module = tiny.adapter.temporal(STEPS, torch.tensor(LABELS))
    with quantized(tiny.adapter, QParams(stored=stored)):
        cache = tiny.adapter.temporal(STEPS, torch.tensor(LABELS))
    with quantized(tiny.adapter, replace(held, stored=chosen)):
        found = tiny.adapter.temporal(STEPS, torch.tensor(LABELS))
    assert torch.equal(found[2][:, part.columns], module[2][:, part.columns])
    first = tiny.adapter.parts[0].columns
    assert torch.equal(found[2][:, first], cache[2][:, first])


@torch.no_grad()
def test_16_bits_and_selection_give_the_features_of_full_precision(tiny: LoadedModel) -> None:
    """Codes of 16 bits are always closer than a TIB of 4-bit weights: E is about 0."""
    held = tib_of(tiny, Bits(4, 16))
    stored = features.store(tiny.adapter, STEPS, LABELS, 16)
    chosen = features.choose(tiny.adapter, held, stored)
    assert chosen.module is None
    wanted = tiny.adapter.temporal(STEPS, torch.tensor(LABELS))
    with quantized(tiny.adapter, selected(held, chosen)):
        found = tiny.adapter.temporal(STEPS, torch.tensor(LABELS))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def calibrated(model: LoadedModel, path: Path, **keys: Any) -> tuple[Bundle, QParams]:
    """A calibrated bundle and what was found."""
    bundle = Bundle.create(path, describe(model, recipes.make(RECIPE | keys)))
    calibrate(bundle, model)
    assert bundle.manifest.quantization is not None
    return bundle, qparams.load(bundle.file(bundle.manifest.quantization.file))


def test_a_tib_that_nothing_takes_is_dropped(tiny: LoadedModel, tmp_path: Path) -> None:
    """Its scales too; labels are those of the recipe, once each, and null."""
    keys = {"temporal": "select", "scheme": "w4a16", "labels": [3, 1, 3]}
    bundle, found = calibrated(tiny, tmp_path / "dropped", **keys)
    assert found.stored is not None
    assert found.stored.module is None
    assert found.outputs is None
    assert not any(name.startswith("temporal.") for name in found.layers)
    assert found.stored.labels.tolist() == [1, 3, 5]
    assert bundle.manifest.stored_labels() == (1, 3)
    with quantized(tiny.adapter, found):
        assert not list(tiny.adapter.temporal.parameters())


def test_a_tib_that_is_taken_somewhere_stays(tiny: LoadedModel, tmp_path: Path) -> None:
    """With its scales; no labels were given, so that those of all are stored."""
    keys = {"temporal": "select", "scheme": "w6a6", "rules": NARROW, "tib_outputs": "rounded"}
    bundle, found = calibrated(tiny, tmp_path / "kept", **keys)
    assert found.stored is not None
    assert found.outputs is not None
    assert found.outputs.bits == 8
    assert found.stored.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert bundle.manifest.stored_labels() == (0, 1, 2, 3, 4)
    assert found.stored.module is not None
    assert found.stored.module.any()
    assert sum(name.startswith("temporal.") for name in found.layers) == 5


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_the_cache_has_the_bits_of_the_activations(
    tiny: LoadedModel, tmp_path: Path, scheme: str
) -> None:
    """And nothing of the TIB is quantized: it is not there."""
    _, found = calibrated(tiny, tmp_path / "b", temporal="cache", scheme=scheme)
    assert found.stored is not None
    assert found.stored.codes.dtype == (torch.int8 if scheme == "w8a8" else torch.int16)
    assert found.stored.timesteps.tolist() == [830, 664, 498, 332, 166, 0]
    assert found.stored.module is None
    assert not any(name.startswith("temporal.") for name in found.layers)


def test_stored_features_need_no_quantized_layer(tiny: LoadedModel, tmp_path: Path) -> None:
    """Rules may leave the whole network in float; the features are stored nevertheless."""
    rules = [{"pattern": "*", "precision": "float"}]
    _, found = calibrated(tiny, tmp_path / "b", temporal="cache", rules=rules)
    assert found.stored is not None
    assert found.layers == {}


@pytest.mark.parametrize("method", ["tfmq", "brecq"])
def test_blocks_are_reconstructed_behind_stored_labels_only(
    tiny: LoadedModel, tmp_path: Path, method: str
) -> None:
    """Trajectories of other labels have no stored features, and cannot ask for them."""
    keys = {"iterations": 3, "rows": 12, "labels": [2]}
    _, found = calibrated(tiny, tmp_path / "b", temporal="cache", method=method, **keys)
    assert found.stored is not None
    assert found.stored.labels.tolist() == [2, 5]
    assert all(held.codes is not None for held in found.layers.values())


def check(model: LoadedModel, **keys: Any) -> None:
    """The check before a bundle is started."""
    stage.check(model, recipes.make(RECIPE | {"temporal": "cache"} | keys))


def test_labels_that_the_model_has_not_are_refused(tiny: LoadedModel) -> None:
    """Null, number 5, is stored anyway and is no label to ask for."""
    for label in (5, -1):
        with pytest.raises(ConfigError, match=f"labels: got {label}, expected 0 to 4"):
            check(tiny, labels=[0, label])
    check(tiny, labels=[0, 4])


def test_a_store_larger_than_the_tib_is_refused(tiny: LoadedModel) -> None:
    """It is there to replace it: with 1000 steps, 896 features and 6 labels it would be 5.1 MiB.

    The TIB has 2 * (256 * 64 + 64 + 64 * 64 + 64 + 6 * 64) + 2 * 384 * 65 + 128 * 65 weights:
    100,224, or 400,896 bytes; 100 steps of one label take 89,600 bytes, twice that with 16 bits.
    """
    with pytest.raises(ConfigError) as caught:
        check(tiny, steps=1000)
    assert str(caught.value) == (
        "labels: the features of 1000 steps and 6 labels (null is one) take 5.1 MiB, expected at "
        "most the 0.4 MiB of the modules that make them; store at most 0 labels with --labels, "
        "or use --temporal tib"
    )
    with pytest.raises(ConfigError, match="take 0.5 MiB, .* store at most 3 labels with --labels"):
        check(tiny, steps=100)
    check(tiny, steps=100, labels=[0, 1, 2])
    with pytest.raises(ConfigError, match="take 0.7 MiB, .* store at most 1 labels"):
        check(tiny, steps=100, labels=[0, 1, 2], scheme="w4a16")
    check(tiny, steps=1000, temporal="tib")
