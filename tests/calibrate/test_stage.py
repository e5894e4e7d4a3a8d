"""The calibration stage: the right scales, the same every time, and after every interruption."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch import Tensor

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate, collect, qparams, stage
from ditcast.calibrate.collect import draw_labels
from ditcast.calibrate.methods import METHODS
from ditcast.calibrate.trajectory import sample
from ditcast.errors import BundleError, ConfigError, UnsupportedError
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.models.dit import DiTAdapter
from ditcast.recipe import Bits
from ditcast.schedule import from_config
from tests.conftest import RECIPE, TINY

LAYERS = [
    f"blocks.{i}.{x}" for i in (0, 1) for x in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
]
PROGRESS = ".staging/calibration/states.safetensors"


def start(model: LoadedModel, path: Path, **keys: Any) -> Bundle:
    """An uncalibrated bundle."""
    return Bundle.create(path, describe(model, recipes.make(RECIPE | keys)))


def scales(bundle: Bundle) -> bytes:
    """The scales file, byte for byte."""
    assert bundle.manifest.quantization is not None
    return bundle.file(bundle.manifest.quantization.file).read_bytes()


def after_saving(then: Callable[[], None]) -> Callable[[Path, Path], Path]:
    """A `Path.replace` that does `then` when a batch of trajectories has just been saved."""
    replace = Path.replace

    def wrapper(self: Path, target: Path) -> Path:
        found = replace(self, target)
        if str(target).endswith(PROGRESS):
            then()
        return found

    return wrapper


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


@torch.no_grad()
def test_absmax_scales_are_those_of_the_trajectories(
    tiny: LoadedModel, shared_bundle: Bundle
) -> None:
    """Every layer's largest input over all steps of all images, conditional and null, by 127."""
    seen: dict[str, float] = dict.fromkeys(LAYERS, 0.0)
    linears = tiny.adapter.layers()

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            seen[name] = max(seen[name], float(args[0].abs().max()))

        return linears[name].register_forward_pre_hook(hook)

    recipe, hooks = shared_bundle.manifest.recipe, [watch(name) for name in LAYERS]
    labels = draw_labels(recipe, tiny.adapter.num_classes)
    for first in (0, 2):  # in the recipe's batches: another batch size has other last bits
        sample(
            tiny.adapter,
            from_config(tiny.scheduler),
            sampler="ddim",
            steps=6,
            guidance=recipe.guidance,
            seed=recipe.seed,
            indices=range(first, first + 2),
            labels=labels[first : first + 2],
        )
    for hook in hooks:
        hook.remove()
    assert shared_bundle.manifest.quantization is not None
    found = qparams.load(shared_bundle.file(shared_bundle.manifest.quantization.file))
    assert found.layers.keys() == set(LAYERS)
    for name, held in found.layers.items():
        assert held.activation is not None
        assert float(held.activation) == pytest.approx(seen[name] / 127, rel=1e-6)
        largest = linears[name].weight.abs().amax(dim=1)
        torch.testing.assert_close(held.weight, largest / 127)
        assert held.codes is None
        assert held.zero_point is None
        assert held.bits == Bits(8, 8)
    assert (found.balance, found.outputs, found.stored) == ({}, None, None)


def test_the_manifest_lists_what_is_quantized(tiny: LoadedModel, shared_bundle: Bundle) -> None:
    """Layers in network order with their block and shape, and the labels of the trajectories."""
    held = shared_bundle.manifest.quantization
    assert held is not None
    assert [layer.name for layer in held.layers] == LAYERS
    assert {layer.block for layer in held.layers[:2]} == {"blocks.0.attn"}
    assert {layer.precision for layer in held.layers} == {"w8a8"}
    linears = tiny.adapter.layers()
    assert [layer.shape for layer in held.layers] == [linears[n].weight.shape for n in LAYERS]
    assert len(held.labels) == RECIPE["samples"]
    assert all(0 <= label < 5 for label in held.labels)
    assert held.made_from == shared_bundle.manifest.fingerprint()


def test_the_same_recipe_gives_the_same_bytes(
    tiny: LoadedModel, shared_bundle: Bundle, tmp_path: Path
) -> None:
    """Nothing of the scales depends on the run; another seed gives others."""
    again = start(tiny, tmp_path / "again")
    calibrate(again, tiny)
    assert scales(again) == scales(shared_bundle)
    other = start(tiny, tmp_path / "other", seed=1)
    calibrate(other, tiny)
    assert scales(other) != scales(shared_bundle)


def test_8_bit_floats_have_the_same_ranges(
    tiny: LoadedModel, shared_bundle: Bundle, tmp_path: Path
) -> None:
    """One calibration: what is 127 of int8 is 448 of e4m3; the same bytes for the same recipe."""
    whole = qparams.of_bundle(shared_bundle)
    pair = [start(tiny, tmp_path / name, scheme="fp8") for name in ("one", "two")]
    for bundle in pair:
        calibrate(bundle, tiny)
    assert scales(pair[0]) == scales(pair[1])
    assert pair[0].manifest.quantization is not None
    assert {layer.precision for layer in pair[0].manifest.quantization.layers} == {"fp8"}
    found = qparams.of_bundle(pair[0])
    assert found.layers.keys() == whole.layers.keys()
    for name, layer in found.layers.items():
        other = whole.layers[name]
        assert layer.bits == Bits(8, 8, e4m3=True)
        assert layer.activation is not None
        assert other.activation is not None
        torch.testing.assert_close(layer.weight * 448, other.weight * 127)
        torch.testing.assert_close(layer.activation * 448, other.activation * 127)
        codes = layer.weight_codes(tiny.adapter.layers()[name].weight.data)
        assert torch.equal(codes.abs().amax(dim=1), torch.full((len(codes),), 448.0))
        assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)


def test_8_bit_floats_in_the_tib_are_refused(tiny: LoadedModel) -> None:
    """Its ranges have zero points; rules that leave it integers are fine."""
    with pytest.raises(
        ConfigError,
        match=r"rules: got fp8 for layer temporal\..*, whose input ranges are not symmetric, .*; "
        r"use --temporal fp, or rules with precision w8a8 for temporal\.\*",
    ):
        stage.check(tiny, recipes.make(RECIPE | {"scheme": "fp8", "temporal": "tib"}))
    rules = [("temporal.*", "w8a8"), ("blocks.*", "fp8"), ("final.*", "float")]
    keys = {"rules": [{"pattern": p, "precision": kind} for p, kind in rules]}
    stage.check(tiny, recipes.make(RECIPE | {"scheme": "fp8", "temporal": "tib"} | keys))


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].reconstruct])
def test_an_interrupted_run_is_taken_up(
    method: str,
    tiny: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After its first batch, with every observer, to the very bytes of a run in one go."""
    whole = start(tiny, tmp_path / "whole", method=method)
    calibrate(whole, tiny)
    resumed = start(tiny, tmp_path / "resumed", method=method)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", after_saving(interrupt))
        with pytest.raises(KeyboardInterrupt):
            calibrate(resumed, tiny)
    resumed = Bundle.open(resumed.path)
    assert resumed.manifest.quantization is None
    calibrate(resumed, tiny)
    assert "resuming after 2 of 4 trajectories" in capsys.readouterr().err
    assert scales(resumed) == scales(whole)
    assert not (resumed.path / PROGRESS).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate
from ditcast.models import load
from tests.calibrate.test_stage import after_saving

Path.replace = after_saving(lambda: os.kill(os.getpid(), signal.SIGKILL))
calibrate(Bundle.open(Path(sys.argv[1])), load(sys.argv[2]))
"""


def test_a_killed_run_is_taken_up(
    tiny: LoadedModel, tiny_dir: Path, shared_bundle: Bundle, tmp_path: Path
) -> None:
    """`kill -9` after the first saved batch, then the rest in another process: the same bytes."""
    path = start(tiny, tmp_path / "killed").path
    command = [sys.executable, "-c", KILLED, str(path), str(tiny_dir)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert (path / PROGRESS).is_file()
    resumed = Bundle.open(path)
    calibrate(resumed, tiny)
    assert scales(resumed) == scales(shared_bundle)
    resumed.verify()


def test_unreadable_progress_is_begun_again(
    tiny: LoadedModel,
    shared_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a dying disk left of an interrupted run is not fatal, only lost."""
    bundle = start(tiny, tmp_path / "again")
    (bundle.path / PROGRESS).parent.mkdir(parents=True)
    (bundle.path / PROGRESS).write_bytes(b"not safetensors")
    calibrate(bundle, tiny)
    assert "starting afresh, what an interrupted run left is unreadable" in capsys.readouterr().err
    assert scales(bundle) == scales(shared_bundle)


def test_progress_of_something_else_is_refused(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of two recipes are never mixed, even where the manifest was removed in between."""
    path = start(tiny, tmp_path / "one").path
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", after_saving(interrupt))
        with pytest.raises(KeyboardInterrupt):
            calibrate(Bundle.open(path), tiny)
    (path / "manifest.json").unlink()
    other = start(tiny, path, seed=1)
    with pytest.raises(
        BundleError, match="is of another model or recipe; remove it to start afresh"
    ):
        calibrate(other, tiny)


def test_a_calibrated_bundle_is_left_alone(
    tiny: LoadedModel, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call does no work."""
    monkeypatch.setattr(collect, "follow", None)
    before = bundle.manifest
    calibrate(bundle, tiny)
    assert Bundle.open(bundle.path).manifest == before


def test_scheme_none_quantizes_nothing(tiny: LoadedModel, tmp_path: Path) -> None:
    """No trajectories, no scales, no section."""
    bundle = start(tiny, tmp_path / "float", scheme="none")
    calibrate(bundle, tiny)
    assert bundle.manifest.quantization is None
    assert not bundle.manifest.files


def test_a_layer_that_sees_only_zeros_has_a_scale(tmp_path: Path) -> None:
    """Zero values in attention leave its projection an input of zeros: no division by zero."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(**(TINY | {"num_layers": 1}))
    values = network.transformer_blocks[0].attn1.to_v
    torch.nn.init.zeros_(values.weight)
    torch.nn.init.zeros_(values.bias)
    model = LoadedModel(
        source="zeros",
        adapter=DiTAdapter(network),
        scheduler=dict(DDPMScheduler(clip_sample=False).config),
        classes=(),
        fingerprint="0",
    )
    bundle = start(model, tmp_path / "zeros")
    calibrate(bundle, model)
    assert bundle.manifest.quantization is not None
    found = qparams.load(bundle.file(bundle.manifest.quantization.file))
    scale = found.layers["blocks.0.attn.proj"].activation
    assert scale is not None
    assert scale > 0


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((("blokcs.*", "w8a8"), ("*", "float")), r"'blokcs.\*' decides no layer \(misspelt"),
        (
            (("*", "float"), ("blocks.*", "w8a8")),
            r"'blocks.\*' decides no layer .*an earlier rule takes",
        ),
        ((("blocks.*", "w8a8"),), "no rule matches layer 'final.proj'; end the rules with one for"),
        (
            (("BLOCKS.*", "w8a8"), ("*", "float")),
            r"the layers are blocks.0.attn.qkv, .*, final.proj",
        ),
    ],
)
def test_rules_that_do_not_fit_are_errors(
    given: tuple[tuple[str, str], ...], match: str, tiny: LoadedModel, tmp_path: Path
) -> None:
    """A rule without effect is a mistake, and so is a layer that nobody decided on."""
    ruled = {"rules": [{"pattern": p, "precision": q} for p, q in given]}
    with pytest.raises(ConfigError, match=match):
        stage.check(tiny, recipes.make(RECIPE | ruled))
    with pytest.raises(ConfigError, match=match):
        calibrate(start(tiny, tmp_path / "ruled", **ruled), tiny)


def test_rules_choose_the_layers(tiny: LoadedModel, tmp_path: Path) -> None:
    """Only what they do not call float gets scales."""
    ruled = [{"pattern": "*.mlp.*", "precision": "w8a8"}, {"pattern": "*", "precision": "float"}]
    bundle = start(tiny, tmp_path / "ruled", rules=ruled)
    calibrate(bundle, tiny)
    assert bundle.manifest.quantization is not None
    found = [layer.name for layer in bundle.manifest.quantization.layers]
    assert found == [name for name in LAYERS if ".mlp." in name]


def test_a_group_has_to_divide_the_inputs(tiny: LoadedModel) -> None:
    """Those of every layer that is quantized: 64 and 256 here."""
    keys = RECIPE | {"scheme": "w4a16"}
    stage.check(tiny, recipes.make(keys | {"group": 32}))
    message = "group: got 48, but layer blocks.0.attn.qkv has 64 inputs; expected a divisor of them"
    with pytest.raises(ConfigError, match=message):
        stage.check(tiny, recipes.make(keys | {"group": 48}))
    wide = [{"pattern": "*.fc2", "precision": "w4a16"}, {"pattern": "*", "precision": "float"}]
    stage.check(tiny, recipes.make(keys | {"group": 128, "rules": wide}))


def test_a_recipe_is_checked_against_the_model(tiny: LoadedModel) -> None:
    """More steps than were trained, or a variance that the sampler cannot use."""
    with pytest.raises(ConfigError, match="steps: got 5000, expected 1 to 1000"):
        stage.check(tiny, recipes.make(RECIPE | {"steps": 5000}))
    learned = LoadedModel(
        source=tiny.source,
        adapter=tiny.adapter,
        scheduler=tiny.scheduler | {"variance_type": "learned_range"},
        classes=(),
        fingerprint="",
    )
    with pytest.raises(UnsupportedError, match="variance_type 'learned_range' is not supported"):
        stage.check(learned, recipes.make(RECIPE | {"sampler": "ddpm"}))
    stage.check(learned, recipes.make(RECIPE))
