"""The DiT adapter against the unmodified diffusers model that it takes apart."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_adapter_is_the_model_exactly(changes: dict[str, Any]) -> None:
    """At equal batch not one bit differs, for classes and for the null label."""
    model, adapter = make(**changes)
    for t, label in ((999, 0), (500, 3), (0, NULL)):
        x = samples(1, seed=t)
        wanted = model(x, torch.tensor([t]), torch.tensor([label])).sample
        features = adapter.temporal(torch.tensor([float(t)]), torch.tensor([label]))
        found = adapter.denoiser(x, features[0])[0]
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
        found = adapter.denoiser(x, features[step])[0]
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


def full_step(adapter: DiTAdapter, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Sample, features and all outputs of a full step on two rows."""
    x = samples(2, seed)
    features = adapter.temporal(torch.tensor([500.0]), torch.tensor([1, NULL]))[0]
    return x, features, adapter.denoiser(x, features)


@torch.no_grad()
def test_reuse_right_after_a_full_step_repeats_it() -> None:
    """Same sample, same features, weight one: exactly the full step's output."""
    _, adapter = make()
    x, features, (output, *caches) = full_step(adapter, 0)
    weights = torch.ones(1, len(adapter.slots))
    assert torch.equal(adapter.reuse(1)(x, features, weights, *caches), output)


@torch.no_grad()
def test_gates_are_fresh_at_a_reuse_step() -> None:
    """Caches are un-gated: with a gate doubled, the slot's cached output counts twice."""
    _, adapter = make()
    x, features, (output, *caches) = full_step(adapter, 0)
    width, slot = 64, 2  # blocks.1.attn: shift, scale, gate at 6, 7, 8
    doubled = features.clone()
    doubled[:, (3 * slot + 2) * width : (3 * slot + 3) * width] *= 2
    reuse = adapter.reuse(1)
    weights = torch.ones(1, len(adapter.slots))
    found = reuse(x, doubled, weights, *caches)
    assert (found - output).abs().max() > 1e-4
    weights[0, slot] = 2
    torch.testing.assert_close(found, reuse(x, features, weights, *caches), rtol=0, atol=1e-6)


@torch.no_grad()
def test_reuse_forgets_what_slots_would_compute() -> None:
    """Shift and scale of a slot are not read at a reuse step; those of the final layer are."""
    _, adapter = make()
    x, features, (output, *caches) = full_step(adapter, 0)
    reuse, weights = adapter.reuse(1), torch.ones(1, len(adapter.slots))
    slot, final = features.clone(), features.clone()
    slot[:, :128] += 1
    final[:, -128:] += 1
    assert torch.equal(reuse(x, slot, weights, *caches), output)
    assert not torch.equal(reuse(x, final, weights, *caches), output)


@torch.no_grad()
def test_history_is_a_weighted_sum_newest_first() -> None:
    """Two full steps back: 1.5 of the newest minus 0.5 of the one before, for every slot."""
    _, adapter = make()
    _, _, (_, *older) = full_step(adapter, 0)
    x, features, (_, *newer) = full_step(adapter, 1)
    slots = len(adapter.slots)
    weights = torch.tensor([[1.5] * slots, [-0.5] * slots])
    found = adapter.reuse(2)(x, features, weights, *newer, *older)
    mixed = [1.5 * a - 0.5 * b for a, b in zip(newer, older, strict=True)]
    wanted = adapter.reuse(1)(x, features, torch.ones(1, slots), *mixed)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_names_of_slots_and_layers() -> None:
    """What rules, audits and caches call them, in network order."""
    _, adapter = make()
    assert adapter.slots == ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    blocks = [f"blocks.{i}.{layer}" for i in range(2) for layer in layers]
    assert list(adapter.linears()) == [*blocks, "final.proj"]


def test_other_activations_are_refused() -> None:
    """A gated unit has another shape of MLP, which the exported graph does not have."""
    model = DiTTransformer2DModel(**(TINY | {"activation_fn": "geglu"}))
    with pytest.raises(
        UnsupportedError, match=r"'geglu' is not supported; expected gelu or gelu-a"
    ):
        DiTAdapter(model)
