"""Learned caches: the router's training, its files, and partial steps (HarmoniCa 2.6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditcast import recipe as recipes
from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache import make_plan
from ditcast.cache.fitted import of_target
from ditcast.cache.learned import KEPT, routed
from ditcast.cache.plan import hold
from ditcast.calibrate import calibrate, qparams, router
from ditcast.calibrate.cache import check
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import follow
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.recipe import Recipe
from ditcast.runtime import Pipeline
from ditcast.runtime.audit import audit
from ditcast.tables import warn_of_idle_cache
from tests.conftest import RECIPE, make_bundle

STEPS, SLOTS = 8, 4
KEYS: dict[str, Any] = {"cache": "learned", "steps": STEPS, "interval": 3, "scheme": "none"}


def recipe_of(**keys: Any) -> Recipe:
    """A recipe with a learned cache."""
    return recipes.make(RECIPE | KEYS | keys)


def logits(*rows: float) -> Any:
    """A router with the same logit for all slots of a step."""
    return np.repeat(np.array(rows, np.float32)[:, None], SLOTS, axis=1)


def followed(model: LoadedModel, plan: Any) -> Tensor:
    """Two samples under a plan."""
    return follow(model, recipe_of(), range(2), [0, 3], plan=plan)


def test_a_router_that_keeps_everything(tiny: LoadedModel) -> None:
    """2.6 i: all logits +5 are all full steps, bit for bit."""
    none = make_plan("none", steps=STEPS, interval=1, slots=SLOTS)
    plan = routed(logits(*[KEPT] * STEPS))
    assert plan.full.all()
    assert plan.reused == 0
    assert torch.equal(followed(tiny, plan), followed(tiny, none))


def test_a_router_that_keeps_nothing(tiny: LoadedModel) -> None:
    """2.6 ii: all logits -5 but the first step's are one full step, and reuse from there."""
    plan = routed(logits(KEPT, *[-KEPT] * (STEPS - 1)))
    assert plan.full.tolist() == [True] + [False] * (STEPS - 1)
    assert torch.allclose(followed(tiny, plan), followed(tiny, hold(plan.full, SLOTS)), atol=1e-3)


def test_a_router_of_every_other_step(tiny: LoadedModel) -> None:
    """2.6 iii: alternating logits are an interval of two, half of all slots."""
    plan = routed(logits(*[KEPT, -KEPT] * (STEPS // 2)))
    assert plan.reused == 0.5
    assert torch.allclose(followed(tiny, plan), followed(tiny, hold(plan.full, SLOTS)), atol=1e-3)


def test_slots_are_chosen_one_by_one(tiny: LoadedModel) -> None:
    """A slot that is not wanted repeats what it gave, and the others see the difference."""
    step: Any = tiny.adapter.steps["partial"]
    torch.manual_seed(0)
    x = torch.randn(2, *tiny.adapter.sample_shape)
    features = tiny.adapter.temporal(torch.tensor([40.0]), torch.tensor([0, 1]))[0]
    cache = list(torch.randn(SLOTS, 2, *tiny.adapter.slot_shape))
    exact, *new = step(x, features, torch.ones(SLOTS), *cache)
    assert torch.allclose(exact, tiny.adapter.denoiser(x, features, *_no_ahead(features))[0])
    _, *kept = step(x, features, torch.tensor([1.0, 0.0, 1.0, 0.0]), *cache)
    assert torch.equal(kept[0], new[0])
    assert torch.equal(kept[1], cache[1])
    assert torch.equal(kept[3], cache[3])
    assert not torch.equal(kept[2], new[2])
    _, *mixed = step.soft(x, features, torch.tensor([0.25, 1.0, 1.0, 1.0]), cache)
    assert torch.allclose(mixed[0], 0.25 * new[0] + 0.75 * cache[0])


def _no_ahead(features: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(0, *features.shape), torch.zeros(0, SLOTS)


def test_increments_of_reuse_add_up(tiny: LoadedModel) -> None:
    """2.6 iv: switched on step by step, they sum up to the effect of the whole router."""
    school = router._School(tiny, recipe_of(), 0.5)
    with torch.no_grad():
        pupil = school.start(0)
        nothing = school.finish(pupil, 1, lambda step: torch.ones(SLOTS))
        wanted = school.finish(pupil, 1, school.scores) - nothing
        total, before = torch.zeros_like(nothing), nothing
        for t in range(1, STEPS):
            school.advance(pupil, t, school.scores(t))
            after = school.finish(pupil, t + 1, lambda step: torch.ones(SLOTS))
            total, before = total + after - before, after
    assert torch.allclose(total, wanted, atol=1e-2 * float(wanted.abs().max()))
    assert float(wanted.abs().max()) > 0


def test_an_empty_cache_leaves_the_price_only(tiny: LoadedModel) -> None:
    """2.6 v: a slot without one is computed whatever its score, so its gradient is beta g'."""
    school, beta = router._School(tiny, recipe_of(), 0.5), 0.01
    torch.manual_seed(0)
    pupil = school.fresh(0)
    for filled in ([], [0, 2, 3], [0, 1, 2, 3]):
        pupil.cache = [
            torch.randn(4, *tiny.adapter.slot_shape) if k in filled else None for k in range(SLOTS)
        ]
        rho = school.rho[3]
        rho.grad, scores = None, rho.sigmoid()
        error, _, _ = school.error(pupil, 3, scores)
        (error + beta * scores.sum()).backward()
        assert rho.grad is not None
        price = beta * scores * (1 - scores)
        same = torch.isclose(rho.grad, price, rtol=1e-4, atol=0)
        assert same.tolist() == [k not in filled for k in range(SLOTS)]


@pytest.mark.parametrize("iepo", ["leave_one_out", "cumulative"])
def test_steps_weigh_what_their_reuse_does(tiny: LoadedModel, iepo: str) -> None:
    """Each step's by whole trajectories, without the shared beginnings; the mean is one."""
    recipe, found = recipe_of(iepo=iepo), torch.zeros(STEPS)
    school, twin = (router._School(tiny, recipe, 0.5) for _ in range(2))
    for held in (school, twin):  # some steps reuse much more than others
        for step, row in enumerate(held.rho[1:], start=1):
            row.data = row.data + (3.0 if step % 2 else -3.0)
    school.weigh()
    with torch.no_grad():
        pupil = twin.start(0)

        def final(*exact: int) -> Tensor:
            ones = torch.ones(SLOTS)
            return twin.finish(pupil, 1, lambda t: ones if t in exact else twin.scores(t))

        for t in range(1, STEPS):
            if iepo == "leave_one_out":
                found[t] = (final(t) - final()).square().sum()
            else:
                later = range(t + 1, STEPS)
                found[t] = (final(*later) - final(t, *later)).square().mean()
    found = found.clamp(min=router.FLOOR * float(found.mean()))
    assert torch.allclose(school.step_weight, found / found.mean(), rtol=1e-2, atol=1e-4)
    assert float(school.step_weight.max()) > 10 * float(school.step_weight.min())


def test_training_moves_logits_by_what_slots_are_worth(tiny: LoadedModel) -> None:
    """Not a draw that is shifted: those worth more than the price rise, the others fall."""
    school = router._School(tiny, recipe_of(), 0.5)
    school.epoch(0)
    before, beta = school.logits(), school.beta()
    school.note = lambda step, worth: None  # type: ignore[method-assign]
    for number in range(1, 4):
        school.epoch(number)
    rose = (school.logits() > before)[1:]
    worth = school.worth[1:].numpy()
    assert beta > 0
    assert np.isclose((worth < beta).mean(), 0.5, atol=0.1)
    assert rose[worth > 3 * beta].mean() > 0.8
    assert rose[worth < beta / 3].mean() < 0.2


@pytest.mark.parametrize("iepo", ["leave_one_out", "cumulative"])
def test_training_meets_the_wanted_share(tiny: LoadedModel, iepo: str) -> None:
    """First step kept, share of the interval, the same router for the same seed."""
    recipe = recipe_of(iepo=iepo, router_epochs=3)
    found = router.train(tiny, recipe)
    assert found.shape == (STEPS, SLOTS)
    assert (found[0] == KEPT).all()
    wanted = 1 - make_plan("taylor", steps=STEPS, interval=3, slots=SLOTS).full.mean()
    assert routed(found).reused == pytest.approx(wanted, abs=0.5 / SLOTS / STEPS + 1e-6)
    assert np.array_equal(found, router.train(tiny, recipe))


def test_slots_that_matter_are_kept(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot whose output is scaled up tenfold costs more to reuse, and is reused less."""
    monkeypatch.setattr(router, "RATE", 0.5)
    step: Any = tiny.adapter.steps["partial"]
    plain = type(step).walk

    def loud(self: Any, sample: Tensor, features: Tensor, choose: Any) -> Any:
        return plain(self, sample, features, lambda k, y: choose(k, 10 * y if k == 2 else y / 10))

    monkeypatch.setattr(type(step), "walk", loud)
    mask = routed(router.train(tiny, recipe_of(router_epochs=12))).mask
    assert mask is not None
    assert mask[1:, 2].mean() > mask[1:, [0, 1, 3]].mean()


def test_learned_bundles_run_in_both_loops(tiny: LoadedModel, tmp_path: Path) -> None:
    """Branches of quantized slots: the same bits, integers in all of them, torch's samples."""
    bundle = make_bundle(tiny, tmp_path / "b", **KEYS | {"scheme": "w8a8", "router_epochs": 2})
    pipeline = Pipeline(bundle)
    assert bundle.manifest.cache is not None
    assert bundle.manifest.cache.reused == pytest.approx(pipeline.plan().reused)
    for labels in ([0, 1, 4], [2]):
        host = pipeline.sample(labels, seed=2)
        assert np.array_equal(host, pipeline.sample(labels, seed=2, loop="graph"))
    for loop in ("host", "graph"):
        found = audit(bundle, pipeline.backend, loop)
        assert found.passed
        assert len(found.layers) == 8
    reference = Pipeline(bundle, target="reference").sample([0, 3], seed=0)
    wanted = followed(tiny, pipeline.plan()).numpy()
    assert np.abs(reference - wanted).max() < 1e-4 * np.ptp(wanted)
    with quantized(tiny.adapter, qparams.of_bundle(bundle)):
        wanted = followed(tiny, pipeline.plan()).numpy()
    error = np.square(pipeline.sample([0, 3], seed=0) - wanted).mean() / np.ptp(wanted) ** 2
    assert -10 * np.log10(error) > 40
    with pytest.raises(ConfigError, match="cache: got learned, whose branches backend openvino"):
        Pipeline(bundle, backend="openvino", target="reference").sample([0])


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([KEPT] * STEPS, "cache learned never reuses: all 8 steps are full"),
        ([KEPT] + [-KEPT] * (STEPS - 1), "cache learned reuses every slot at every step but the f"),
    ],
)
def test_routers_that_choose_nothing(
    rows: list[float], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning, and an error where that is asked for; one slot at one step is a choice."""
    held = logits(*rows)
    warn_of_idle_cache("learned", routed(held), strict=False)
    assert f"warning: {match}" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match=match):
        warn_of_idle_cache("learned", routed(held), strict=True)
    held[3, 1] = -held[3, 1]
    warn_of_idle_cache("learned", routed(held), strict=True)


@pytest.mark.parametrize(
    ("rows", "model", "match"),
    [
        ([0] * 7, "", r"holds 7 and 4, expected one of 8 steps and 4 slots; train one for this"),
        ([0] * STEPS, "another", "was trained for another model than "),
        ([-3, *[0] * (STEPS - 1)], "", "reuses slots at the first step, where there is nothing"),
    ],
)
def test_routers_of_something_else(
    tiny: LoadedModel, tmp_path: Path, rows: list[float], model: str, match: str
) -> None:
    """Another number of steps, another model, a first step that is not full."""
    path = tmp_path / "router.safetensors"
    held = {"router": logits(*rows)}
    tensors.save(held, path, {"model": model or tiny.fingerprint})
    with pytest.raises(ConfigError, match=match):
        check(tiny, recipe_of(router=str(path)))


def test_a_router_from_a_file(tiny: LoadedModel, tmp_path: Path) -> None:
    """It is what the bundle runs; a file that is not there is refused."""
    path, held = tmp_path / "router.safetensors", logits(*[KEPT, -KEPT] * (STEPS // 2))
    with pytest.raises(ConfigError, match=r"router: no file .*router.safetensors; give one that"):
        check(tiny, recipe_of(router=str(path)))
    router.save(held, tiny, path)
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipe_of(router=str(path))))
    calibrate(bundle, tiny)
    mask = of_target(bundle, "onnxruntime").plan(bundle.manifest).mask
    assert mask is not None
    assert mask[:, 0].tolist() == [True, False] * (STEPS // 2)
