"""The TIB: extracted exactly, reconstructed from timesteps alone, one range per step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate, qparams, tib
from ditcast.calibrate.codes import affine, weight_scale
from ditcast.calibrate.qparams import LayerScales, QParams
from ditcast.calibrate.simulate import quantized
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.models.dit import DiTAdapter
from ditcast.recipe import Bits
from tests.conftest import RECIPE, TINY

STEPS = torch.tensor([999.0, 800.0, 600.0, 400.0, 200.0, 1.0])
LABELS = torch.tensor([0, 2, 5])
VECTORS = 6 * 2 + 2  # modulations of two blocks and of the final layer
SEED = {"init": "nearest", "iterations": 60, "seed": 0, "advance": lambda: None}


@torch.no_grad()
def test_the_extracted_tib_is_that_of_the_blocks() -> None:
    """The tensors inside the original blocks, for pairs, to the last bit."""
    torch.manual_seed(2)
    model = DiTTransformer2DModel(**TINY).eval()
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        seen.append(output)

    modulations = [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_1]
    for linear in modulations:
        linear.register_forward_hook(watch)
    timesteps, labels = torch.tensor([7, 444, 999]), torch.tensor([0, 3, 5])
    model(torch.randn(3, 3, 16, 16), timesteps, labels)
    adapter = DiTAdapter(model)
    wanted = seen[:]
    assert len(wanted) == len(adapter.parts) == 3
    for i, features in enumerate(wanted):
        found = adapter.temporal.part(i, timesteps.float(), labels)
        assert (found - features).abs().max() == 0


def start(model: LoadedModel, bits: Bits) -> dict[str, LayerScales]:
    """Scales of all Linears of the TIB but the first ones of the embedders."""
    return {
        name: LayerScales(
            bits=bits, weight=weight_scale(linear.weight.data, search=True, bits=bits.weight)
        )
        for name, linear in model.adapter.temporal_linears().items()
        if not name.endswith("linear_1")
    }


def reconstructed(model: LoadedModel, bits: Bits, **changes: Any) -> dict[str, LayerScales]:
    """The same with learned roundings."""
    options: dict[str, Any] = SEED | changes
    return tib.tiar(model.adapter, start(model, bits), STEPS, LABELS, **options)


def error(model: LoadedModel, scales: dict[str, LayerScales]) -> float:
    """Mean squared error of all features with those weights, activations in float."""
    with torch.no_grad():
        wanted = model.adapter.temporal(STEPS, LABELS)
        with tib.rounded(model.adapter, scales):
            found = model.adapter.temporal(STEPS, LABELS)
    return float((found - wanted).square().mean())


def test_tiar_beats_rounding_to_the_nearest(tiny: LoadedModel) -> None:
    """At 4 bits, by the error that it minimizes: that of all features of all steps."""
    calls: list[int] = []
    found = reconstructed(tiny, Bits(4, 8), advance=lambda: calls.append(1))
    assert len(calls) == 60
    assert error(tiny, found) < 0.7 * error(tiny, start(tiny, Bits(4, 8)))


def test_tiar_is_the_same_every_time(tiny: LoadedModel) -> None:
    first, again = (reconstructed(tiny, Bits(4, 8), iterations=10) for _ in range(2))
    for name, held in first.items():
        codes, other = held.codes, again[name].codes
        assert codes is not None
        assert other is not None
        assert torch.equal(codes, other)


def features(model: LoadedModel, bins: list[Tensor], scales: dict[str, LayerScales]) -> Tensor:
    """The features (T, U, F) of a wholly quantized TIB with these bins."""
    with torch.no_grad():
        layers, outputs = tib.ranges(model.adapter, scales, bins, LABELS)
        ascending = torch.stack([values[0] for values in bins])
        edges = (ascending[1:] + ascending[:-1]) / 2
        with quantized(model.adapter, QParams(layers=layers, outputs=outputs, edges=edges)):
            found: Tensor = model.adapter.temporal(STEPS, LABELS)
    return found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(a, b, dim=-1)


@torch.no_grad()
def test_steps_are_not_mistaken_for_others(tiny: LoadedModel) -> None:
    """Argmax over t' of cos(e_q[t], e[t']) is t, at W4A8, for every part and label.

    With finite set calibration, features are also closer to the exact ones than with one range.
    """
    wanted = tiny.adapter.temporal(STEPS, LABELS)
    scales = reconstructed(tiny, Bits(4, 8))
    each, one = [*STEPS.flip(0)[:, None]], [STEPS.flip(0)]
    found = {len(bins): features(tiny, bins, scales) for bins in (each, one)}
    naive = features(tiny, one, start(tiny, Bits(4, 8)))
    hits, total = 0, 0
    for part in tiny.adapter.parts:
        exact, ours = wanted[..., part.columns], found[len(STEPS)][..., part.columns]
        nearest = cosine(ours[:, None], exact[None]).argmax(dim=1)  # (T, U)
        hits += int((nearest == torch.arange(len(STEPS))[:, None]).sum())
        total += nearest.numel()
    assert hits >= 0.95 * total
    errors = [float((x - wanted).square().mean()) for x in (found[len(STEPS)], found[1], naive)]
    assert errors[0] < errors[1] < errors[2]
    assert cosine(found[len(STEPS)], wanted).mean() > cosine(naive, wanted).mean()


@torch.no_grad()
def test_one_bin_is_one_range_per_tensor(tiny: LoadedModel) -> None:
    """Minimum and maximum over all steps and labels, of every input and every modulation."""
    name = "temporal.modulation.1"
    scales = start(tiny, Bits(8, 8))
    measured, outputs = tib.ranges(tiny.adapter, scales, [STEPS], LABELS)
    seen: list[Tensor] = []
    with tib.rounded(tiny.adapter, scales) as layers:
        hook = layers[name].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        found = tiny.adapter.temporal(STEPS, LABELS)
        hook.remove()
    scale, zero = affine(seen[0].min()[None], seen[0].max()[None], 8)
    held = measured[name]
    assert held.activation is not None
    assert held.zero_point is not None
    torch.testing.assert_close(held.activation, scale)
    assert torch.equal(held.zero_point, zero)
    assert outputs is not None
    assert outputs.bits == 8
    values = found.unflatten(-1, (VECTORS, -1)).movedim(2, 0).flatten(1)  # of each modulation
    scales_, zeros = affine(values.amin(dim=1), values.amax(dim=1), 8)
    torch.testing.assert_close(outputs.scale, scales_[None])
    assert torch.equal(outputs.zero_point, zeros[None])


@torch.no_grad()
def test_ranges_of_a_step_are_its_own(tiny: LoadedModel) -> None:
    """Bin b holds what one bin alone gives; and 16-bit activations need no ranges."""
    scales = start(tiny, Bits(8, 6))
    every, outputs = tib.ranges(tiny.adapter, scales, [*STEPS.flip(0)[:, None]], LABELS)
    assert outputs is not None
    for b in (0, 3):
        alone, single = tib.ranges(tiny.adapter, scales, [STEPS.flip(0)[b : b + 1]], LABELS)
        assert single is not None
        assert torch.equal(outputs.scale[b : b + 1], single.scale)
        for name, held in every.items():
            whole, one = held.activation, alone[name].activation
            assert whole is not None
            assert one is not None
            assert torch.equal(whole[b : b + 1], one)
    float_ = start(tiny, Bits(4, 16))
    assert tib.ranges(tiny.adapter, float_, [STEPS], LABELS) == (float_, None)


@torch.no_grad()
def test_layers_of_several_precisions_keep_their_own_bits(tiny: LoadedModel) -> None:
    """Rules may mix them: each layer has the ranges that it has among layers like itself."""
    mixed = start(tiny, Bits(8, 8))
    for kind, bits in (("temporal.modulation", Bits(4, 16)), ("temporal.final", Bits(6, 6))):
        mixed |= {n: s for n, s in start(tiny, bits).items() if n.startswith(kind)}
    found, _ = tib.ranges(tiny.adapter, mixed, [STEPS], LABELS)
    assert found["temporal.modulation.0"].activation is None
    alone, _ = tib.ranges(tiny.adapter, start(tiny, Bits(8, 8)), [STEPS], LABELS)
    few, _ = tib.ranges(tiny.adapter, start(tiny, Bits(6, 6)), [STEPS], LABELS)
    for name, wanted in (("temporal.time.0.linear_2", alone), ("temporal.final", few)):
        scale, expected = found[name].activation, wanted[name].activation
        assert scale is not None
        assert expected is not None
        # What reaches the final layer is rounded by other weights: its range differs a little.
        torch.testing.assert_close(scale, expected, rtol=0.05, atol=0)


def test_labels_are_drawn_with_null(tiny: LoadedModel) -> None:
    """Sorted and distinct, null last, and no more than the features of full precision allow."""
    found = tib.draw_labels(tiny.adapter, STEPS, seed=0)
    assert found.tolist() == [0, 1, 2, 3, 4, 5]  # all of a small model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tib, "LABELS", 2)
        drawn = {tuple(tib.draw_labels(tiny.adapter, STEPS, seed).tolist()) for seed in range(9)}
        assert len(drawn) > 1
        assert {(len(labels), labels[-1]) for labels in drawn} == {(3, 5)}
        patch.setattr(tib, "TARGET_BYTES", 1)
        assert len(tib.draw_labels(tiny.adapter, STEPS, seed=0)) == 2


def calibrated(model: LoadedModel, path: Path, **keys: Any) -> QParams:
    """What calibration finds by a recipe."""
    values = RECIPE | {"temporal": "tib", "interval": 1} | keys
    bundle = Bundle.create(path, describe(model, recipes.make(values)))
    calibrate(bundle, model)
    assert bundle.manifest.quantization is not None
    return qparams.load(bundle.file(bundle.manifest.quantization.file))


def test_ranges_per_step_change_nothing_with_one_step(tiny: LoadedModel, tmp_path: Path) -> None:
    """`fsc` none, tib and all give the same features and the same output, where steps is 1."""
    outputs = []
    sample = torch.randn(2, *tiny.adapter.sample_shape, generator=torch.Generator().manual_seed(0))
    for fsc in ("none", "tib", "all"):
        found = calibrated(tiny, tmp_path / fsc, steps=1, fsc=fsc)
        assert len(found.edges) == 0
        with quantized(tiny.adapter, found), torch.no_grad():
            rows = tiny.adapter.temporal(torch.tensor([0.0]), torch.tensor([1, 5]))[0]
            ahead, weights = rows[:0, None], torch.zeros(0, len(tiny.adapter.slots))
            outputs.append(tiny.adapter.denoiser(sample, rows, ahead.expand(0, 2, -1), weights)[0])
    assert torch.equal(outputs[0], outputs[1])
    # Its division is folded into the features, so that a value at a tie may go the other way.
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("fsc", "tib_bins", "bins"), [("none", 1, 0), ("tib", 6, 0), ("all", 6, 6)]
)
def test_fsc_says_where_there_is_one_range_per_step(
    tiny: LoadedModel, tmp_path: Path, fsc: str, tib_bins: int, bins: int
) -> None:
    """Nowhere, in the TIB, or in every layer; edges lie between neighbouring timesteps."""
    found = calibrated(tiny, tmp_path / "b", fsc=fsc, tib_outputs="rounded")
    for name, held in found.layers.items():
        assert held.activation is not None
        expected = tib_bins if name.startswith("temporal.") else bins
        assert list(held.activation.shape) == ([expected] if expected else [])
    assert found.outputs is not None
    assert found.outputs.scale.shape == (tib_bins, VECTORS)
    steps = torch.arange(6) * (1000 // 6)  # ascending, "leading" spacing
    edges = (steps[1:] + steps[:-1]) / 2 if tib_bins > 1 else torch.zeros(0)
    torch.testing.assert_close(found.edges, edges)
    if bins:
        assert all(len(set(s.activation.tolist())) > 1 for s in found.layers.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("temporal", ["naive", "tib"])
def test_outputs_of_the_tib_are_rounded_where_it_is_asked_for(
    tiny: LoadedModel, tmp_path: Path, temporal: str
) -> None:
    """By default they are not, as in the released code; the layers are the same ones."""
    float_, rounded = (
        calibrated(tiny, tmp_path / kind, temporal=temporal, tib_outputs=kind)
        for kind in ("float", "rounded")
    )
    assert calibrated(tiny, tmp_path / "default", temporal=temporal).outputs is None
    assert float_.outputs is None
    assert rounded.outputs is not None
    assert rounded.outputs.bits == 8
    for name, held in float_.layers.items():
        assert torch.equal(held.activation, rounded.layers[name].activation)  # type: ignore[arg-type]


def test_embedding_layers_in_blocks_are_worse_than_the_tib_alone(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    """`naive` optimizes them through the blocks' outputs: their features are farther off."""
    wanted = tiny.adapter.temporal(STEPS, LABELS)
    found = {}
    for temporal in ("naive", "tib"):
        keys = {"method": "tfmq", "scheme": "w4a8", "iterations": 60, "rows": 48, "fsc": "none"}
        held = calibrated(tiny, tmp_path / temporal, temporal=temporal, **keys)
        names = [name for name in held.layers if name.startswith("temporal.")]
        assert len(names) == 5
        assert all(held.layers[name].codes is not None for name in names)
        layers = {name: replace(held.layers[name], activation=None) for name in names}
        with quantized(tiny.adapter, QParams(layers=layers)), torch.no_grad():
            rows = tiny.adapter.temporal(STEPS, LABELS)
        found[temporal] = float((rows - wanted).square().mean())
    assert found["tib"] < 0.9 * found["naive"]
