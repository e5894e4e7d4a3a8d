"""Whole trajectories against diffusers: its model, its scheduler, and FORA put into its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from diffusers.schedulers import scheduling_ddpm
from numpy.typing import NDArray
from torch import Tensor

from ditcast.bundle import Bundle
from ditcast.cache import StepPlan
from ditcast.cache.plan import hold
from ditcast.calibrate import qparams, trajectory
from ditcast.calibrate.simulate import quantized
from ditcast.models import LoadedModel
from ditcast.runtime import Pipeline
from ditcast.runtime.pipeline import Cache
from ditcast.schedule import from_config
from tests.conftest import make_bundle

LABELS = [4, 0, 4]
SEED = 7
# 6 steps, the largest values about 3; what remains is the order of float32 sums.
LIMIT = 1e-3


def noise(shape: tuple[int, ...], steps: int) -> Tensor:
    """Initial and step noise (1 + steps, n, C, H, W), drawn as the documentation says."""
    drawn = [
        np.random.default_rng([SEED, i]).standard_normal((1 + steps, *shape), np.float32)
        for i in range(len(LABELS))
    ]
    return torch.from_numpy(np.stack(drawn, axis=1))


@torch.no_grad()
def by_diffusers(
    model: DiTTransformer2DModel,
    scheduler: Any,
    steps: int,
    guidance: float,
    before_step: Callable[[int], None] = lambda step: None,
) -> NDArray[np.float32]:
    """Sample with nothing of ours."""
    null = model.config.num_embeds_ada_norm
    n, channels, size = len(LABELS), model.config.in_channels, model.config.sample_size
    x = noise((channels, size, size), 0)[0]
    scheduler.set_timesteps(steps)
    rows = torch.tensor(LABELS + [null] * n)
    for step, t in enumerate(scheduler.timesteps):
        before_step(step)
        output = model(torch.cat([x, x]), t.expand(2 * n), rows).sample[:, :channels]
        guided = output[n:] + guidance * (output[:n] - output[n:])
        x = scheduler.step(guided, t, x).prev_sample
    found: NDArray[np.float32] = x.numpy()
    return found


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> DiTTransformer2DModel:
    """The tiny model as diffusers loads it."""
    return DiTTransformer2DModel.from_pretrained(tiny_dir / "transformer").eval()


def largest(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest difference, of samples that are not all alike."""
    assert a.shape == b.shape
    assert np.abs(a).max() > 0.5
    return float(np.abs(a - b).max())


@pytest.mark.parametrize(("steps", "spacing"), [(6, "leading"), (9, "trailing"), (7, "linspace")])
def test_fp32_graphs_sample_as_diffusers(
    steps: int, spacing: str, model: Any, tiny_dir: Path, shared_bundle: Bundle
) -> None:
    """DDIM with guidance, in the bundle's schedule and in others that the host loop can do."""
    scheduler = DDIMScheduler.from_pretrained(tiny_dir / "scheduler", timestep_spacing=spacing)
    wanted = by_diffusers(model, scheduler, steps, guidance=2.0)
    pipeline = Pipeline(shared_bundle, target="reference")
    found = pipeline.sample(LABELS, seed=SEED, steps=steps, spacing=spacing, cache="none")
    assert largest(found, wanted) < LIMIT


def test_calibration_samples_as_diffusers(model: Any, tiny: LoadedModel, tiny_dir: Path) -> None:
    """The trajectories whose inputs are observed are those of the model."""
    scheduler = DDIMScheduler.from_pretrained(tiny_dir / "scheduler")
    wanted = by_diffusers(model, scheduler, 6, guidance=2.0)
    found = by_torch(tiny, 6)
    assert largest(found, wanted) < LIMIT


def test_ddpm_graphs_sample_as_diffusers(
    other_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stochastic, v-prediction, clipped, variance channels ignored: the other model."""
    folder = Path(other_bundle.manifest.model.source)
    network = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    drawn: Iterator[Tensor] = iter(noise((4, 8, 8), 6)[1:])

    def given(*arguments: Any, **options: Any) -> Tensor:
        del arguments, options
        return next(drawn)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", given)
    wanted = by_diffusers(network, scheduler, 6, guidance=1.5)
    found = Pipeline(other_bundle, target="reference").sample(LABELS, seed=SEED, cache="none")
    assert np.abs(found).max() <= 1  # the last step ends at the clipped mean
    assert largest(found, wanted) < LIMIT


def by_torch(
    model: LoadedModel, steps: int, plan: StepPlan | None = None, stop_after: int | None = None
) -> NDArray[Any]:
    """The same images in torch."""
    found = trajectory.sample(
        model.adapter,
        from_config(model.scheduler),
        sampler="ddim",
        steps=steps,
        guidance=2.0,
        seed=SEED,
        indices=range(3),
        labels=LABELS,
        plan=plan,
        stop_after=stop_after,
    )
    return found.numpy()


class Cached:
    """A module that computes on request, and else gives a weighted sum of its last outputs."""

    computing = True
    weights: Sequence[Sequence[float]] = [[1.0] * 4]  # (history, slots), newest first

    def __init__(self, module: Any, slot: int) -> None:
        """Wrap the module's forward."""
        self.compute, self.slot = module.forward, slot
        self.outputs: list[Tensor] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Compute, or predict."""
        if Cached.computing:
            self.outputs.insert(0, self.compute(*arguments, **options))
            return self.outputs[0]
        pairs = zip(Cached.weights, self.outputs, strict=False)
        return sum(weights[self.slot] * output for weights, output in pairs)


@pytest.fixture
def cached_model(tiny_dir: Path) -> Iterator[Any]:
    """The tiny model, whose attention and MLP outputs can be predicted, before gates apply."""
    network = DiTTransformer2DModel.from_pretrained(tiny_dir / "transformer").eval()
    modules = [m for block in network.transformer_blocks for m in (block.attn1, block.ff)]
    for slot, module in enumerate(modules):
        module.forward = Cached(module, slot)
    yield network
    Cached.computing, Cached.weights = True, [[1.0] * 4]


def test_caching_is_fora_in_the_blocks_of_diffusers(
    cached_model: Any, tiny_dir: Path, shared_bundle: Bundle
) -> None:
    """T=6, N=2: full at j = 5, 4, 2, 0; in between, slots repeat and gates are fresh."""
    full = [True, True, False, True, False, True]

    def before_step(step: int) -> None:
        Cached.computing = full[step]

    scheduler = DDIMScheduler.from_pretrained(tiny_dir / "scheduler")
    wanted = by_diffusers(cached_model, scheduler, 6, 2.0, before_step)
    pipeline = Pipeline(shared_bundle, target="reference")
    assert largest(pipeline.sample(LABELS, seed=SEED), wanted) < LIMIT
    assert largest(pipeline.sample(LABELS, seed=SEED, loop="graph"), wanted) < LIMIT
    assert largest(pipeline.sample(LABELS, seed=SEED, cache="none"), wanted) > LIMIT


class Planned(Pipeline):
    """A pipeline whose plan is made by hand."""

    by_hand: StepPlan

    def plan(self, steps: int | None = None, cache: Cache = None) -> StepPlan:
        """That plan."""
        return self.by_hand


@pytest.mark.parametrize("history", [2, 3])
def test_slots_are_predicted_of_several_full_steps(
    cached_model: Any, tiny: LoadedModel, tiny_dir: Path, shared_bundle: Bundle, history: int
) -> None:
    """Each slot and step with its own weights; host loop and torch against diffusers' blocks."""
    full = np.array([True, False, True, False, False, True, True, False, False])
    rng = np.random.default_rng(history)
    weights = rng.uniform(-1, 1, (len(full), history, 4)).astype(np.float32)
    weights[full] = 0
    plan = StepPlan(full=full, weights=weights)

    def before_step(step: int) -> None:
        Cached.computing, Cached.weights = bool(full[step]), weights[step].tolist()

    scheduler = DDIMScheduler.from_pretrained(tiny_dir / "scheduler")
    wanted = by_diffusers(cached_model, scheduler, len(full), 2.0, before_step)
    pipeline = Planned(shared_bundle, target="reference")
    pipeline.by_hand = plan
    found = pipeline.sample(LABELS, seed=SEED, steps=len(full))
    assert largest(found, wanted) < LIMIT
    np.testing.assert_array_equal(pipeline.sample(LABELS, seed=SEED, steps=len(full)), found)
    simulated = by_torch(tiny, len(full), plan)
    assert largest(simulated, wanted) < LIMIT
    pipeline.by_hand = hold(full, 4)
    assert largest(pipeline.sample(LABELS, seed=SEED, steps=len(full)), wanted) > LIMIT


@pytest.mark.parametrize("order", [1, 2])
def test_the_graph_loop_carries_forecasts_from_segment_to_segment(
    tiny: LoadedModel, tmp_path: Path, order: int
) -> None:
    """TaylorSeer over 12 steps: bit-identical to the host loop, and torch agrees."""
    keys: dict[str, Any] = {
        "cache": "taylor",
        "order": order,
        "steps": 12,
        "interval": 3,
        "scheme": "none",
    }
    bundle = make_bundle(tiny, tmp_path / "taylor", **keys)
    pipeline = Pipeline(bundle, target="reference")
    assert pipeline.plan().history == order + 1
    host = pipeline.sample(LABELS, seed=SEED)
    np.testing.assert_array_equal(pipeline.sample(LABELS, seed=SEED, loop="graph"), host)
    simulated = by_torch(tiny, 12, pipeline.plan())
    assert largest(simulated, host) < LIMIT
    assert largest(pipeline.sample(LABELS, seed=SEED, cache="fora"), host) > LIMIT


def test_torch_follows_a_plan_too(tiny: LoadedModel, shared_bundle: Bundle) -> None:
    """What graph loops are compared with at export: cached, and stopped while still noisy."""
    pipeline = Pipeline(shared_bundle, target="reference")
    seen: list[NDArray[Any]] = []
    found = pipeline.sample(LABELS, seed=SEED, callback=lambda step: seen.append(step.sample))
    for stop_after, wanted in ((None, found), (3, seen[2])):
        simulated = by_torch(tiny, 6, pipeline.plan(), stop_after=stop_after)
        assert largest(simulated, wanted) < LIMIT
    assert largest(seen[2], found) > 0.1


def test_integer_graphs_sample_as_their_simulation(
    tiny: LoadedModel, shared_bundle: Bundle
) -> None:
    """W8A8 without a cache: at least 40 dB (a flipped code is amplified), and better than fp32."""
    quantization = shared_bundle.manifest.quantization
    assert quantization is not None
    scales = qparams.load(shared_bundle.file(quantization.file))
    with quantized(tiny.adapter, scales):
        simulated = by_torch(tiny, 6)
    found = Pipeline(shared_bundle).sample(LABELS, seed=SEED, cache="none")
    exact = Pipeline(shared_bundle, target="reference").sample(LABELS, seed=SEED, cache="none")
    assert psnr_db(found, simulated) >= 40
    assert psnr_db(found, simulated) > psnr_db(found, exact) + 6


def psnr_db(a: NDArray[Any], b: NDArray[Any]) -> float:
    """PSNR over all samples, of the range of `b`."""
    error = np.sqrt(np.mean((a.astype(np.float64) - b) ** 2))
    return float(20 * np.log10(np.ptp(b) / max(error, 1e-12)))
