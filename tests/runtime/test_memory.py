"""Caches that memory does not hold: how much they would be, and what fits in their place."""

from __future__ import annotations

import pytest

from ditcast.bundle import Bundle
from ditcast.cache import make_plan
from ditcast.errors import ConfigError
from ditcast.manifest import ModelInfo
from ditcast.runtime import Pipeline
from ditcast.runtime.memory import check_memory
from ditcast.runtime.pipeline import Loop

FREE = "ditcast.runtime.memory.available_memory_mib"
NOTHING = "no smaller batch, lower order or --cache fora would fit; take --cache none"


@pytest.fixture(scope="module")
def model(shared_bundle: Bundle) -> ModelInfo:
    """4 slots of 16 tokens of 64 numbers in float32: a tensor of a slot has 1/256 MiB per row."""
    info = shared_bundle.manifest.model
    assert (len(info.slots), info.slot_shape) == (4, (16, 64))
    return info


@pytest.mark.parametrize(
    ("policy", "free", "needed", "advice"),
    [
        # 2 (2 + 1 + order) of each slot and 2 (1 + order): 38, 28 and 18 tensors; FORA keeps 4
        (
            "relational",
            0.67,
            "0.9",
            "take batches of 2 images (0.6 MiB) or a bundle of --order 1 (0.7 MiB) or --cache fora "
            "(0.1 MiB)",
        ),
        (
            "relational",
            0.5,
            "0.9",
            "take batches of 1 image (0.3 MiB) or a bundle of --order 0 (0.4 MiB) or --cache fora "
            "(0.1 MiB)",
        ),
        ("relational", 0.29, "0.9", "take --cache fora (0.1 MiB)"),
        ("relational", 0.09, "0.9", NOTHING),
        # two buffers of 2 reuse steps for each of 3 segments: 12, 8 and 4 tensors
        (
            "taylor",
            0.2,
            "0.3",
            "take batches of 2 images (0.2 MiB) or a bundle of --order 1 (0.2 MiB) or --cache fora "
            "(0.1 MiB)",
        ),
        ("taylor", 0.09, "0.3", NOTHING),
        ("fora", 0.09, "0.1", "take batches of 2 images (0.1 MiB)"),
    ],
)
def test_the_advice_is_what_fits(
    model: ModelInfo,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    free: float,
    needed: str,
    advice: str,
) -> None:
    """Of order 2, at 10 steps and an interval of 3: the highest order that fits, and the rest."""
    monkeypatch.setattr(FREE, lambda: free)
    plan = make_plan(policy, steps=10, interval=3, order=2, slots=4)
    with pytest.raises(ConfigError) as error:
        check_memory(plan, model, 3, 3, 2.0)
    start = (
        f"cache: got {needed} MiB of kept outputs for 3 images in 6 rows, expected at most the "
        f"{free:.1f} MiB that are available; "
    )
    assert str(error.value) == start + advice


@pytest.mark.parametrize("loop", ["host", "graph"])
def test_both_loops_ask(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, loop: Loop) -> None:
    """FORA at an interval of 2 keeps two tensors per row; guidance doubles the rows."""
    pipeline = Pipeline(shared_bundle)
    monkeypatch.setattr(FREE, lambda: 0.03)
    with pytest.raises(ConfigError, match="for 2 images in 4 rows, .*; take batches of 1 image"):
        pipeline.sample([0, 1], loop=loop)
    assert len(pipeline.sample([0, 1], loop=loop, guidance=1.0)) == 2
