"""The DiT adapter against the unmodified diffusers model that it takes apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from ditcast.errors import UnsupportedError
from ditcast.models.dit import DiTAdapter
from tests.conftest import CLASSES, TINY

NULL = CLASSES
LABELS = [0, 3, NULL]
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "exact gelu": {"activation_fn": "gelu"},
    "no bias in q, k, v": {"attention_bias": False},
    "learned variance": {"out_channels": 6, "num_layers": 1},
    "dropout, which only trains": {"dropout": 0.5, "num_layers": 1},
    "one head, small patches": {"num_attention_heads": 1, "patch_size": 2, "num_layers": 3},
}


def make(**changes: Any) -> tuple[DiTTransformer2DModel, DiTAdapter]:
    """An untrained model and the adapter of its twin with the same weights."""
    pair = []
    for _ in range(2):
        torch.manual_seed(1)
        pair.append(DiTTransformer2DModel(**(TINY | changes)).eval().requires_grad_(False))
    return pair[0], DiTAdapter(pair[1])


def samples(n: int, seed: int = 0) -> Tensor:
    """Noise of the tiny model's shape."""
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def nothing_ahead(features: Tensor, adapter: DiTAdapter) -> tuple[Tensor, Tensor]:
    """What a full step is asked for that no reuse step follows: R = 0."""
    return features.new_zeros(0, *features.shape), torch.zeros(0, len(adapter.slots))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_adapter_is_the_model_exactly(changes: dict[str, Any]) -> None:
    """At equal batch not one bit differs, for classes and for the null label."""
    model, adapter = make(**changes)
    for t, label in ((999, 0), (500, 3), (0, NULL)):
        x = samples(1, seed=t)
        wanted = model(x, torch.tensor([t]), torch.tensor([label])).sample
        features = adapter.temporal(torch.tensor([float(t)]), torch.tensor([label]))
        found, _ = adapter.denoiser(x, features[0], features, torch.ones(1, len(adapter.slots)))
        assert found.shape == (1, adapter.output_channels, 16, 16)
        assert (found - wanted).abs().max() == 0


@torch.no_grad()
def test_features_of_all_steps_at_once() -> None:
    """One batch over T and U gives what the model computes step by step, within rounding."""
    model, adapter = make()
    steps = [999, 640, 320, 1]
    features = adapter.temporal(torch.tensor(steps).float(), torch.tensor(LABELS))
    assert features.shape == (len(steps), len(LABELS), (6 * 2 + 2) * 64)
    x = samples(len(LABELS))
    for step, t in enumerate(steps):
        wanted = model(x, torch.full((len(LABELS),), t), torch.tensor(LABELS)).sample
        found = adapter.denoiser(x, features[step], *nothing_ahead(features[step], adapter))[0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_null_label_has_its_own_embedding() -> None:
    """Row num_classes of the table is what guidance uses; changing it changes only that row."""
    _, adapter = make()
    t, labels = torch.tensor([500.0]), torch.tensor(LABELS)
    before = adapter.temporal(t, labels)
    for table in adapter.temporal.label:  # type: ignore[union-attr]
        table.weight[NULL] += 1
    changed = (adapter.temporal(t, labels) != before).any(dim=-1)[0]
    assert changed.tolist() == [False, False, True]


class FullStep(NamedTuple):
    """Inputs of a full step on two rows, and every slot's output before its gate."""

    adapter: DiTAdapter
    x: Tensor
    features: Tensor  # (N, F)
    outputs: list[Tensor]  # one (N, S, D) per slot

    def run(self, ahead: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and the forecast for features (R, N, F) with weights (R, slots)."""
        output, forecast = self.adapter.denoiser(self.x, self.features, ahead, weights)
        return output, forecast

    def held(self) -> tuple[Tensor, Tensor]:
        """What FORA asks for one reuse step: this step's gates and all of every slot."""
        return self.features[None], torch.ones(1, len(self.adapter.slots))


@torch.no_grad()
def full_step(seed: int = 0, **changes: Any) -> FullStep:
    """A full step of a model, watched from outside."""
    _, adapter = make(**changes)
    x = samples(2, seed)
    features = adapter.temporal(torch.tensor([500.0 + seed]), torch.tensor([1, NULL]))[0]
    outputs: list[Tensor] = []
    blocks: Any = adapter.denoiser.blocks
    hooks = [
        module.register_forward_hook(lambda module, args, y: outputs.append(y))
        for block in blocks
        for module in (block.attn, block.mlp)
    ]
    adapter.denoiser(x, features, *nothing_ahead(features, adapter))
    for hook in hooks:
        hook.remove()
    return FullStep(adapter, x, features, outputs)


def gate(slot: int, width: int = 64) -> slice:
    """Where a slot's gate lies in F: after its shift and its scale."""
    return slice((3 * slot + 2) * width, (3 * slot + 3) * width)


def gated_sum(weights: Tensor, ahead: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """`sum_k weights[r, k] * gate_k(ahead[r]) * Y_k`, term by term in double precision."""
    rows = [
        sum(
            weights[r, k].double() * ahead[r, :, None, gate(k, y.shape[-1])].double() * y.double()
            for k, y in enumerate(outputs)
        )
        for r in range(len(weights))
    ]
    return torch.stack([torch.as_tensor(row) for row in rows]).float()


def steps_ahead(step: FullStep, count: int) -> tuple[Tensor, Tensor]:
    """Features of real timesteps and labels, and weights of which none is like another."""
    timesteps, labels = 400.0 - 90 * torch.arange(count), torch.tensor([1, NULL])
    generator = torch.Generator().manual_seed(count)
    weights = torch.randn(count, len(step.adapter.slots), generator=generator)
    return step.adapter.temporal(timesteps, labels), weights


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    "changes", [{}, {"num_layers": 3, "patch_size": 2, "attention_bias": False}], ids=["2", "3"]
)
@torch.no_grad()
def test_the_forecast_is_the_gated_sum_of_the_slots(changes: dict[str, Any], count: int) -> None:
    """Every later step with its own gates and weights, of the outputs that the slots gave."""
    step = full_step(**changes)
    ahead, weights = steps_ahead(step, count)
    _, forecast = step.run(ahead, weights)
    assert forecast.shape == (count, 2, *step.adapter.slot_shape)
    assert len(step.outputs) == len(step.adapter.slots)
    wanted = gated_sum(weights, ahead, step.outputs)
    assert wanted.std() > 0.05
    torch.testing.assert_close(forecast, wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def test_looking_ahead_does_not_change_the_step() -> None:
    """The output is the same to the last bit, whatever later steps there are."""
    step = full_step()
    output, _ = step.run(*nothing_ahead(step.features, step.adapter))
    for count in (1, 3):
        assert torch.equal(step.run(*steps_ahead(step, count))[0], output)


@torch.no_grad()
def test_with_nothing_ahead_the_forecast_is_empty() -> None:
    """R = 0: no row, of the usual shape."""
    step = full_step()
    _, forecast = step.run(*nothing_ahead(step.features, step.adapter))
    assert forecast.shape == (0, 2, 16, 64)
    assert step.adapter.slot_shape == (16, 64)


@torch.no_grad()
def test_weights_of_zero_forecast_nothing() -> None:
    """A row that only fills up R is zero, exactly, and leaves the others alone."""
    step = full_step()
    ahead, weights = steps_ahead(step, 3)
    _, wanted = step.run(ahead, weights)
    weights[1] = 0
    _, forecast = step.run(ahead, weights)
    assert (forecast[1] == 0).all()
    assert torch.equal(forecast[[0, 2]], wanted[[0, 2]])


@torch.no_grad()
def test_reuse_right_after_a_full_step_repeats_it() -> None:
    """Same sample, same features, weight one: the full step's output but for the last bits."""
    step = full_step()
    output, forecast = step.run(*step.held())
    found = step.adapter.steps["reuse"](step.x, step.features, forecast[0])
    torch.testing.assert_close(found, output, rtol=0, atol=2e-6)
    without = step.adapter.steps["reuse"](step.x, step.features, torch.zeros_like(forecast[0]))
    assert (without - output).abs().max() > 0.01


@torch.no_grad()
def test_gates_are_those_of_the_reuse_step() -> None:
    """Not those of the full step: with a gate doubled ahead, that slot counts twice."""
    step = full_step()
    ahead, weights = step.held()
    _, held = step.run(ahead, weights)
    for slot in range(len(step.adapter.slots)):
        doubled, twice = ahead.clone(), weights.clone()
        doubled[..., gate(slot)] *= 2
        twice[0, slot] = 2
        _, forecast = step.run(doubled, weights)
        assert (forecast - held).abs().max() > 1e-3
        assert torch.equal(forecast, step.run(ahead, twice)[1])


@torch.no_grad()
def test_a_forecast_reads_only_gates_ahead() -> None:
    """Shift and scale of the slots do not matter to it, nor do those of the final layer."""
    step = full_step()
    ahead, weights = steps_ahead(step, 2)
    other = ahead + 1
    for slot in range(len(step.adapter.slots)):
        other[..., gate(slot)] = ahead[..., gate(slot)]
    assert torch.equal(step.run(other, weights)[1], step.run(ahead, weights)[1])


@torch.no_grad()
def test_reuse_reads_only_the_features_of_the_final_layer() -> None:
    """What concerns the slots is in the forecast already."""
    step = full_step()
    _, forecast = step.run(*step.held())
    output = step.adapter.steps["reuse"](step.x, step.features, forecast[0])
    slots = step.features.clone()
    slots[:, :-128] += 1
    assert torch.equal(step.adapter.steps["reuse"](step.x, slots, forecast[0]), output)
    for half in (slice(-128, -64), slice(-64, None)):
        final = step.features.clone()
        final[:, half] += 1
        assert not torch.equal(step.adapter.steps["reuse"](step.x, final, forecast[0]), output)


@torch.no_grad()
def test_forecasts_of_several_full_steps_add_up() -> None:
    """Two full steps back: 1.5 of the newest minus 0.5 of the one before, for every slot."""
    older, newer = full_step(0), full_step(1)
    ahead, ones = newer.held()
    found = newer.run(ahead, 1.5 * ones)[1] + older.run(ahead, -0.5 * ones)[1]
    mixed = [1.5 * a - 0.5 * b for a, b in zip(newer.outputs, older.outputs, strict=True)]
    wanted = gated_sum(ones, ahead, mixed)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def test_each_row_is_its_own() -> None:
    """One image's forecast and output do not depend on the others of the batch."""
    step = full_step()
    ahead, weights = steps_ahead(step, 2)
    output, forecast = step.run(ahead, weights)
    for n in (slice(0, 1), slice(1, 2)):
        alone = step._replace(x=step.x[n], features=step.features[n])
        found = alone.run(ahead[:, n], weights)
        torch.testing.assert_close(found[0], output[n], rtol=0, atol=2e-6)
        torch.testing.assert_close(found[1], forecast[:, n], rtol=0, atol=2e-6)
        reused = step.adapter.steps["reuse"](alone.x, alone.features, forecast[0, n])
        wanted = step.adapter.steps["reuse"](step.x, step.features, forecast[0])[n]
        torch.testing.assert_close(reused, wanted, rtol=0, atol=2e-6)


def test_names_of_slots_and_layers() -> None:
    """What rules, audits and caches call them, in network order."""
    _, adapter = make()
    assert adapter.slots == ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    blocks = [f"blocks.{i}.{layer}" for i in range(2) for layer in layers]
    assert list(adapter.layers()) == [*blocks, "final.proj"]


def test_other_activations_are_refused() -> None:
    """A gated unit has another shape of MLP, which the exported graph does not have."""
    model = DiTTransformer2DModel(**(TINY | {"activation_fn": "geglu"}))
    with pytest.raises(
        UnsupportedError, match=r"'geglu' is not supported; expected gelu or gelu-a"
    ):
        DiTAdapter(model)
