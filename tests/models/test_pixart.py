"""The PixArt adapter against the unmodified diffusers model that it takes apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ditcast.errors import ConfigError, UnsupportedError
from ditcast.models.base import features_size, first_skips, run_parts, vector_slices
from ditcast.models.pixart import PixArtAdapter
from tests.pixarts import OTHER, PROMPTS, TINY, TOKENS, captions, predict, untrained

NULL = PROMPTS
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "other": OTHER,
    "as many channels as the sample": {"out_channels": None},
    "an affine norm": {"norm_elementwise_affine": True, "num_layers": 1},
    "dropout, which only trains": {"dropout": 0.5, "num_layers": 1},
    "small patches": {"patch_size": 1, "num_layers": 1},
}


def adapter_of(**changes: Any) -> PixArtAdapter:
    """The adapter of an untrained model."""
    return PixArtAdapter(untrained(**changes), captions=captions())


def samples(n: int, seed: int = 0) -> Tensor:
    """Noise of the tiny model's shape."""
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def nothing_ahead(features: Tensor, adapter: PixArtAdapter) -> tuple[Tensor, Tensor]:
    """What a full step is asked for that no reuse step follows: R = 0."""
    return features.new_zeros(0, *features.shape), torch.zeros(0, len(adapter.slots))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_adapter_is_the_model(changes: dict[str, Any]) -> None:
    """For captions of all lengths, the null one too, one by one and in one batch."""
    model, adapter = untrained(**changes), adapter_of(**changes)
    for t, label in ((999, 0), (500, 1), (37, 3), (0, NULL)):
        x = samples(1, seed=t)
        wanted = predict(model, x, t, [label])
        features = adapter.temporal(torch.tensor([float(t)]), torch.tensor([label]))[0]
        found, _ = adapter.denoiser(x, features, features[None], torch.ones(1, len(adapter.slots)))
        assert found.shape == (1, adapter.output_channels, 8, 8)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    steps, labels = [999, 640, 1], [0, 2, NULL]
    features = adapter.temporal(torch.tensor(steps).float(), torch.tensor(labels))
    for step, t in enumerate(steps):
        wanted = predict(model, samples(3), t, labels)
        found = adapter.denoiser(
            samples(3), features[step], *nothing_ahead(features[step], adapter)
        )
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_features_are_those_of_the_modules() -> None:
    """Modulations from timesteps alone, block by block; then the caption and its mask."""
    model, adapter = untrained(**OTHER | {"num_layers": 2}), adapter_of(**OTHER | {"num_layers": 2})
    timesteps, labels = torch.tensor([900, 20]), torch.tensor([1, NULL, 0])
    found = adapter.temporal(timesteps.float(), labels)
    assert found.shape == (2, 3, (6 * 2 + 2) * 36 + 36 * TOKENS + TOKENS)
    size = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    shared, embedded = model.adaln_single(timesteps, size, batch_size=2, hidden_dtype=torch.float32)
    tables = torch.stack([block.scale_shift_table for block in model.transformer_blocks])
    blocks = (shared.unflatten(1, (1, 6, 36)) + tables).flatten(1)
    final = (embedded[:, None] + model.scale_shift_table).flatten(1)
    own = adapter.parts[-1].columns.stop
    wanted = torch.cat([blocks, final], dim=1)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(found[..., :own], wanted, rtol=0, atol=1e-6)
    table = captions()
    tokens = model.caption_projection(table.embeds[labels]).flatten(1)
    behind = torch.cat([tokens, table.mask[labels].float()], dim=1).expand(2, -1, -1)
    torch.testing.assert_close(found[..., own:], behind, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_the_extracted_tib_is_what_blocks_are_given(changes: dict[str, Any]) -> None:
    """That of the original, to the last bit, plus each block's own table, as the block adds it.

    The embedding of the size is computed once, for one row: there, the product's last bit differs.
    """
    model, given = untrained(**changes), list[Tensor]()

    def watch(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        del module, args
        given.extend(output)

    model.adaln_single.register_forward_hook(watch)
    timesteps, labels = torch.tensor([7, 7, 7]), [0, 1, NULL]
    predict(model, samples(3), 7, labels)
    shared, embedded = given
    blocks = [
        (block.scale_shift_table[None] + shared.reshape(3, 6, -1)).flatten(1)
        for block in model.transformer_blocks
    ]
    final = (model.scale_shift_table[None] + embedded[:, None]).flatten(1)
    adapter = adapter_of(**changes)
    for i, wanted in enumerate([*blocks, final]):
        found = adapter.temporal.part(i, timesteps.float(), torch.tensor(labels))
        assert (found - wanted).abs().max() <= (1e-7 if model.use_additional_conditions else 0)


@torch.no_grad()
def test_parts_are_the_network() -> None:
    """Each with its columns and the caption's; own features of a part alone are the same."""
    adapter = adapter_of()
    timesteps, labels = torch.tensor([900.0, 20.0]), torch.tensor([1, 3])
    features = adapter.temporal(timesteps, labels)[torch.arange(2), torch.arange(2)]
    x, h = samples(2), adapter.stem(samples(2))
    found = run_parts(adapter.parts, h, features, first_skips(adapter.parts, h))
    assert torch.equal(found, adapter.denoiser(x, features, *nothing_ahead(features, adapter))[0])
    for i, part in enumerate(adapter.parts):
        alone = adapter.temporal.part(i, timesteps, labels)
        torch.testing.assert_close(alone, features[:, part.columns], rtol=0, atol=1e-6)
    vectors = vector_slices(adapter.parts)
    assert [(c.start, c.stop) for c in vectors] == [(32 * i, 32 * i + 32) for i in range(14)]
    assert features_size(adapter.parts) == features.shape[1] == 32 * 14 + (32 + 1) * TOKENS
    assert [part.shared is None for part in adapter.parts] == [False, False, True]


def test_names_of_slots_and_layers() -> None:
    """What rules, audits and caches call them, in network order; rows of a caption's products."""
    adapter = adapter_of(num_layers=1)
    assert adapter.slots == ("blocks.0.attn", "blocks.0.cross", "blocks.0.mlp")
    layers = ["attn.qkv", "attn.proj", "cross.q", "cross.kv", "cross.proj", "mlp.fc1", "mlp.fc2"]
    assert list(adapter.layers()) == [*(f"blocks.0.{layer}" for layer in layers), "final.proj"]
    positions = adapter.positions()
    assert positions.pop("blocks.0.cross.kv") == TOKENS
    assert set(positions.values()) == {16}
    assert list(adapter.temporal_linears()) == [
        "temporal.time.linear_1",
        "temporal.time.linear_2",
        "temporal.modulation",
    ]
    assert (adapter.num_classes, adapter.null_label) == (PROMPTS, NULL)


@torch.no_grad()
def test_tokens_that_do_not_count() -> None:
    """Whatever is embedded there, nothing changes."""
    table = captions()
    other = table._replace(embeds=table.embeds + 9 * ~table.mask[..., None])
    outputs = []
    for held in (table, other):
        adapter = PixArtAdapter(untrained(), captions=held)
        features = adapter.temporal(torch.tensor([500.0]), torch.arange(PROMPTS + 1))[0]
        nothing = nothing_ahead(features, adapter)
        outputs.append(adapter.denoiser(samples(PROMPTS + 1), features, *nothing)[0])
    assert torch.equal(*outputs)
    assert (outputs[0][:1] - outputs[0]).abs().amax(dim=(1, 2, 3))[1:].min() > 1e-3


class FullStep(NamedTuple):
    """A full step on two rows, and every slot's output before its gate."""

    adapter: PixArtAdapter
    x: Tensor
    features: Tensor
    outputs: list[Tensor]
    output: Tensor


@torch.no_grad()
def full_step(seed: int = 0) -> FullStep:
    """A full step of the tiny model, watched from outside."""
    adapter, outputs = adapter_of(), list[Tensor]()
    features = adapter.temporal(torch.tensor([500.0]), torch.tensor([1, NULL]))[0]
    hooks = [
        adapter.denoiser.get_submodule(name).register_forward_hook(
            lambda module, args, y: outputs.append(y)
        )
        for name in adapter.slots
    ]
    x = samples(2, seed)
    output, _ = adapter.denoiser(x, features, *nothing_ahead(features, adapter))
    for hook in hooks:
        hook.remove()
    return FullStep(adapter, x, features, outputs, output)


@torch.no_grad()
def test_the_forecast_is_the_gated_sum_of_the_slots() -> None:
    """Gates of later steps for attention and MLP; what attends to the caption has the gate 1."""
    step = full_step()
    ahead = step.adapter.temporal(torch.tensor([400.0, 310.0, 220.0]), torch.tensor([1, NULL]))
    weights = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    output, found = step.adapter.denoiser(step.x, step.features, ahead, weights)
    assert torch.equal(output, step.output)
    wanted = torch.zeros_like(found)
    for k, y in enumerate(step.outputs):
        block, j = divmod(k, 3)
        start = 32 * (6 * block + {0: 2, 1: 0, 2: 5}[j])
        gate = torch.ones(1) if j == 1 else ahead[:, :, None, start : start + 32]
        wanted += weights[:, k, None, None, None] * gate * y
    assert wanted.std() > 0.05
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_steps_that_reuse_everything_repeat_the_full_step() -> None:
    """Same sample, features and outputs: each step graph in its own way, within rounding."""
    step = full_step()
    adapter, x, features = step.adapter, step.x, step.features
    steps, y = adapter.steps, torch.stack(step.outputs)
    ones = torch.ones(1, len(adapter.slots))
    _, forecast = adapter.denoiser(x, features, features[None], ones)
    output, kept, given, slope = steps["observe"](x, features, y[None], torch.zeros_like(y))
    assert torch.equal(output, step.output)
    assert torch.equal(kept[0], y)
    weights = torch.ones(1)
    gauge, _, stream = steps["block"](x, features, torch.zeros(1, *y[0].shape), weights)
    through, residual = steps["rest"](stream, features)
    for found in (
        steps["reuse"](x, features, forecast[0]),
        steps["extrapolate"](x, features, weights, kept),
        steps["relate"](x, features, weights, kept, given, slope),
        steps["partial"](x, features, torch.tensor([0.0, 1, 0, 1, 1, 0]), *y)[0],
        steps["partial"](x, features, torch.zeros(6), *y)[0],
        through,
        steps["finish"](stream, features, residual),
    ):
        torch.testing.assert_close(found, step.output, rtol=0, atol=5e-6)
    assert gauge.std() > 0.05


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"activation_fn": "geglu"},
            "activation_fn 'geglu' is not supported in a PixArt transformer; expected gelu-a",
        ),
        ({"norm_type": "ada_norm_zero"}, "'ada_norm_zero' .*; expected ada_norm_single; take"),
        ({"attention_type": "gated"}, "attention_type 'gated' .*; expected default; take"),
        ({"caption_channels": None}, "caption_channels None is not supported; expected the num"),
        ({"cross_attention_dim": 24}, "cross_attention_dim 24 is not supported; expected 32, the"),
    ],
)
def test_variants_that_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        PixArtAdapter.check(TINY | changes)


@pytest.mark.parametrize("count", [PROMPTS - 1, PROMPTS + 1])
def test_names_of_captions_are_counted(count: int) -> None:
    """The null caption has none."""
    with pytest.raises(ConfigError, match=f"has {count} names, expected {PROMPTS}, one per class"):
        PixArtAdapter(untrained(), count, captions=captions())
