"""TAP: clusters by content and time, and a calibration set drawn from all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate, qparams, tap
from ditcast.errors import MissingDependencyError
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from tests.calibrate.test_collect import spied_rows
from tests.conftest import RECIPE


def blobs(each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two directions with some noise: (2 each, 8), and which is which."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.eye(8)[:2].repeat_interleave(each, dim=0)
    noise = 0.05 * torch.randn(2 * each, 8, generator=generator)
    return 3 * centers + noise, torch.arange(2).repeat_interleave(each)


def test_two_blobs_are_two_clusters() -> None:
    """At equal times (caching.md 1.3, i)."""
    inputs, of = blobs(20)
    found = tap.cluster(inputs, torch.zeros(40), 2, seed=0)
    assert len({*zip(found.tolist(), of.tolist(), strict=True)}) == 2


def test_without_content_clusters_are_times() -> None:
    """Alpha = 0 (ii)."""
    inputs = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(4).repeat(10) * 10
    found = tap.cluster(inputs, steps, 4, seed=0, alpha=0)
    assert len({*zip(found.tolist(), steps.tolist(), strict=True)}) == 4


@pytest.fixture
def affinities(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The matrices that were to be clustered."""
    seen: list[Tensor] = []

    class Spy:
        def __init__(self, *_: Any, **__: Any) -> None:
            """Of any settings."""

        def fit_predict(self, affinity: Any) -> Any:
            seen.append(torch.from_numpy(affinity))
            return affinity[0].argsort()

    monkeypatch.setattr("sklearn.cluster.SpectralClustering", Spy)
    return seen


@pytest.mark.parametrize(("shifted", "content"), [(False, [1, 0, 0]), (True, [1, 0.5, 0])])
def test_opposites_are_apart_and_the_unlike_in_between(
    affinities: list[Tensor], shifted: bool, content: list[float]
) -> None:
    """Cosines 1, 0 and -1, cut at 0 or shifted; half of the affinity, beside that of time."""
    inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    tap.cluster(inputs, torch.tensor([0, 0, 1]), 2, seed=0, shifted=shifted)
    time = torch.exp(-torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    wanted = 0.5 * torch.tensor(content, dtype=torch.float64) + 0.5 * time
    assert torch.allclose(affinities[0][0], wanted)
    tap.select(inputs.repeat(4, 1), torch.zeros(12), 6, seed=0, shifted=shifted)
    assert bool((affinities[-1] - 0.75).abs().lt(1e-9).any()) == shifted


def test_centered_inputs_lose_what_their_elements_share(affinities: list[Tensor]) -> None:
    """A cosine of nearly 1 becomes that of what is left of each input."""
    inputs = torch.tensor([[3.0, -3.0, 0.0], [1.0, 1.0, -2.0]])
    for centered in (False, True):
        tap.cluster(inputs + 100, torch.zeros(2), 1, seed=0, alpha=1, centered=centered)
    assert float(affinities[0][0, 1]) > 0.99
    assert float(affinities[1][0, 1]) == pytest.approx(0, abs=1e-9)
    tap.select((inputs + 100).repeat(4, 1), torch.zeros(8), 4, seed=0, alpha=1, centered=True)
    assert float(affinities[-1].min()) == pytest.approx(0, abs=1e-9)


def similarity(inputs: Tensor, drawn: Tensor) -> float:
    """Mean cosine of pairs."""
    flat = functional.normalize(inputs[drawn].flatten(1), dim=1)
    pairs = flat @ flat.T
    return float((pairs.sum() - len(drawn)) / (len(drawn) * (len(drawn) - 1)))


def test_duplicates_are_drawn_more_seldom_than_at_random() -> None:
    """Three quarters of the pool are one input, at all times (iii): lower mean cosine."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 16, generator=generator)
    inputs[:300] = inputs[0] + 0.01 * torch.randn(300, 16, generator=generator)
    steps = torch.arange(400) % 10
    found = [similarity(inputs, tap.select(inputs, steps, 60, seed=seed)) for seed in range(4)]
    random = [similarity(inputs, torch.randperm(400, generator=generator)[:60]) for _ in range(10)]
    assert sum(found) / 4 < 0.8 * sum(random) / 10


@pytest.mark.parametrize("count", [1, 7, 60, 99])
def test_as_many_as_are_asked_for_each_once(count: int) -> None:
    """Ascending, and the same for a seed."""
    inputs = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(100) // 10
    found = tap.select(inputs, steps, count, seed=3)
    assert len(found) == len(found.unique()) == count
    assert torch.equal(found, found.sort().values)
    assert torch.equal(found, tap.select(inputs, steps, count, seed=3))


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingDependencyError, match=r"'sklearn' .* 'ditcast.compile.'"):
        tap.cluster(torch.randn(4, 2), torch.zeros(4), 2, seed=0)


def test_a_small_pool_is_taken_whole() -> None:
    inputs = torch.randn(10, 4)
    assert tap.select(inputs, torch.zeros(10), 12, seed=0).tolist() == list(range(10))


@pytest.mark.parametrize("selection", ["uniform", "tap"])
@pytest.mark.parametrize("trajectories", ["full", "cached"])
def test_rows_are_those_of_steps_that_compute(
    tiny: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    selection: str,
    trajectories: str,
) -> None:
    """Under a cache the pool is that of full steps; bins of reuse steps have scales too.

    TAP, whose draw is not flat, says how many rows of each step it is (1.3, iv).
    """
    seen = spied_rows(monkeypatch)
    pools: list[Tensor] = []
    select = tap.select

    def watched(inputs: Tensor, steps: Tensor, count: int, *, seed: int) -> Tensor:
        pools.append(inputs)
        return select(inputs, steps, count, seed=seed)

    monkeypatch.setattr(tap, "select", watched)
    keys: dict[str, Any] = {"method": "tfmq", "iterations": 1, "rows": 12, "cache": "fora"}
    keys |= {"selection": selection, "trajectories": trajectories}
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipes.make(RECIPE | keys)))
    calibrate(bundle, tiny)
    (rows,) = seen
    timesteps = torch.tensor([830.0, 664.0, 498.0, 332.0, 166.0, 0.0])
    computed = [0, 1, 3, 5] if trajectories == "cached" else range(6)  # T=6, N=2
    assert len(rows.sample) == len(rows.labels) == 12
    assert {*rows.timesteps.tolist()} <= {timesteps[i].item() for i in computed}
    assert torch.equal(rows.timesteps, rows.timesteps.sort(descending=True).values)
    if selection == "tap":  # of the whole pool, which is 8 rows of each step
        pool = torch.tensor(computed).repeat_interleave(8)
        assert torch.equal(rows.sample, pools[0][select(pools[0], pool, 12, seed=0)])
        counts = [int((rows.timesteps == t).sum()) for t in timesteps]
        said = f"calibrating: TAP draws, of steps 0 to 5: {counts} rows"
        assert said in capsys.readouterr().err
    if selection == "uniform":
        assert pools == []
        each = 12 // len(computed)
        assert rows.timesteps.tolist() == [
            timesteps[i].item() for i in computed for _ in range(each)
        ]


@pytest.mark.parametrize("method", ["absmax", "tfmq", "brecq"])
def test_ranges_per_step_follow_a_cached_trajectory(
    tiny: LoadedModel, tmp_path: Path, method: str
) -> None:
    """A reuse step, which no layer runs in, has the range of the full step before it."""
    found = {}
    for trajectories in ("full", "cached"):
        keys: dict[str, Any] = {"fsc": "all", "cache": "fora", "trajectories": trajectories}
        keys |= {"method": method, "iterations": 2, "rows": 24}
        path = tmp_path / trajectories
        bundle = Bundle.create(path, describe(tiny, recipes.make(RECIPE | keys)))
        calibrate(bundle, tiny)
        found[trajectories] = input_scales(bundle)
    cached = found["cached"].flip(0)  # bins ascend, steps descend
    assert cached[2] == cached[1]
    assert cached[4] == cached[3]
    assert len(set(cached.tolist())) == 4
    assert len(set(found["full"].tolist())) == 6


def test_a_bin_that_no_row_is_of_has_a_scale(tiny: LoadedModel, tmp_path: Path) -> None:
    """TAP draws two rows of six steps."""
    keys: dict[str, Any] = {"fsc": "all", "method": "tfmq", "selection": "tap", "rows": 2}
    keys |= {"iterations": 1}
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipes.make(RECIPE | keys)))
    calibrate(bundle, tiny)
    scales = input_scales(bundle)
    assert scales.shape == (6,)
    assert 1 <= len(set(scales.tolist())) <= 2


def input_scales(bundle: Bundle) -> Tensor:
    """Input scales (B,) of the second block's first Linear."""
    scale = qparams.of_bundle(bundle).layers["blocks.1.attn.qkv"].activation
    assert scale is not None
    return scale
