"""Training of a learned cache's router: HarmoniCa (arXiv 2410.01723), without any images.

Step-wise denoising training (SDT) follows whole trajectories of the student, the network that
mixes what each slot computes with what it gave before, by a score per step and slot. At every
step its output is pulled to that of the network without a cache on the same input. The image
error proxy objective (IEPO) weights each step by what its reuse does to the final image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ditcast import tensors
from ditcast.cache.fitted import Table
from ditcast.cache.learned import KEPT, TAU, computed, routed
from ditcast.calibrate import threshold
from ditcast.calibrate.collect import check_finite
from ditcast.calibrate.trajectory import TorchRequest
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel
from ditcast.progress import counting, say
from ditcast.recipe import Recipe
from ditcast.sampling import (
    Coefficients,
    coefficients,
    draw_noises,
    guide,
    needs_noise,
    row_labels,
    update,
)
from ditcast.schedule import from_config

IMAGES = 2  # of a trajectory: more trajectories are better than larger ones
REFRESHES = 3  # of the weights of the steps, evenly over the training
RATE = 0.1  # of AdamW: paper 0.01, for some thirty times as many trajectories
SMOOTHING = 0.7  # of what slots were found to be worth, from one trajectory to the next
FLOOR = 1e-3  # of the mean weight of a step, so that none is free


def save(router: Table, model: LoadedModel, path: Path) -> None:
    """Write a router, as `--router` takes it."""
    tensors.save({"router": router}, path, {"model": model.fingerprint})


def load(model: LoadedModel, recipe: Recipe) -> Table:
    """The recipe's router from its file.

    Raises:
        ConfigError: there is no such file, or it is a router of something else.
    """
    path = Path(recipe.router or "")
    if not path.is_file():
        raise ConfigError(f"router: no file {path}; give one that tools/train_l2c.py has written")
    held, metadata = tensors.load(path)
    wanted = (recipe.steps, len(model.adapter.slots))
    shape = held["router"].shape if "router" in held else ()
    if shape != wanted:
        got = " and ".join(map(str, shape)) or "no router"
        raise ConfigError(
            f"router: {path} holds {got}, expected one of {wanted[0]} steps and {wanted[1]} slots; "
            "train one for this model and number of steps"
        )
    if not computed(held["router"][0]).all():
        raise ConfigError(
            f"router: {path} reuses slots at the first step, where there is nothing to reuse; "
            "expected logits over -2.2 there"
        )
    if metadata.get("model") != model.fingerprint:
        raise ConfigError(
            f"router: {path} was trained for another model than {model.source}; train one for it"
        )
    return held["router"]


def train(model: LoadedModel, recipe: Recipe) -> Table:
    """The router's logits (T, slots), for the network as it is now.

    Where the paper has a weight beta on the sum of scores, to be tried out, here it follows from
    that share: a slot's logit falls if beta is larger than what computing it is worth, the
    gradient of the loss in its score, so beta is the quantile of those. At the end all logits
    are moved together until the share is met.

    Raises:
        ConfigError: NaN or Inf in a trajectory.
    """
    wanted = share(recipe)
    school = _School(model, recipe, wanted)
    refresh = {round(i * recipe.router_epochs / REFRESHES) for i in range(REFRESHES)}
    with counting("training the router", recipe.router_epochs) as advance:
        for epoch in range(recipe.router_epochs):
            if epoch in refresh:
                school.weigh()
            school.epoch(epoch)
            advance()
    found = meet(school.logits(), wanted)
    say(
        f"cache: the router reuses {routed(found).reused:.1%} of all slots "
        f"({wanted:.1%} wanted; {routed(school.logits()).reused:.1%} as trained)"
    )
    return found


def share(recipe: Recipe) -> float:
    """The wanted share of reused slots; by default what TaylorSeer reuses at the interval."""
    if recipe.reuse is not None:
        return recipe.reuse
    return 1 - threshold.wanted(recipe) / recipe.steps


def meet(logits: Table, wanted: float) -> Table:
    """All logits but those of the first step moved by one number, until the share is met."""
    edge = np.log(TAU / (1 - TAU))
    count = round(wanted * logits.size)
    ordered = np.sort(logits[1:], axis=None)
    if 0 < count < len(ordered):
        logits = logits - (ordered[count - 1] + ordered[count]) / 2 + edge
    logits[0] = KEPT
    return logits.clip(-KEPT, KEPT).astype(np.float32)


@dataclass
class _Pupil:
    """One trajectory on its way: its request, its sample, and what its slots gave last."""

    request: TorchRequest
    noise: Tensor  # (1 + noises, n, C, H, W)
    x: Tensor
    cache: list[Tensor | None]  # None is nothing yet

    def copy(self) -> _Pupil:
        """To go another way from here; tensors are never changed in place."""
        return _Pupil(self.request, self.noise, self.x, list(self.cache))


class _School:
    """The router in training."""

    def __init__(self, model: LoadedModel, recipe: Recipe, wanted: float) -> None:
        """Logits are drawn from N(0, 1); those of the first step stay at 5."""
        self.model, self.recipe, self.wanted = model, recipe, wanted
        self.adapter, self.schedule = model.adapter, from_config(model.scheduler)
        slots, partial = len(self.adapter.slots), self.adapter.steps["partial"]
        self.mixed: Callable[..., tuple[Tensor, ...]] = partial.soft  # type: ignore[assignment]
        self.generator = torch.Generator().manual_seed(recipe.seed)
        draws = torch.randn(recipe.steps, slots, generator=self.generator)
        draws[0] = KEPT
        self.rho = [nn.Parameter(row) for row in draws]
        self.optimizers = [torch.optim.AdamW([row], lr=RATE, weight_decay=0) for row in self.rho]
        self.table = coefficients(self.schedule, recipe.sampler, recipe.steps).tolist()
        self.step_weight = torch.ones(recipe.steps)
        self.worth = torch.zeros(recipe.steps, slots)
        self.seen = 0

    def logits(self) -> Table:
        """As they are now, (T, slots)."""
        found: Table = torch.stack([row.data for row in self.rho]).numpy().copy()
        return found

    def fresh(self, number: int) -> _Pupil:
        """A trajectory before its first step, with empty caches."""
        recipe, adapter = self.recipe, self.adapter
        drawn = torch.randint(adapter.num_classes, (IMAGES,), generator=self.generator)
        rows = row_labels(drawn.tolist(), recipe.guidance, adapter.null_label)
        timesteps = torch.from_numpy(self.schedule.timesteps(recipe.steps)).float()
        noises = recipe.steps if needs_noise(recipe.sampler) else 0
        indices = range(number * IMAGES, (number + 1) * IMAGES)
        noise = torch.from_numpy(
            draw_noises(recipe.seed + 1, indices, adapter.sample_shape, noises)
        )
        with torch.no_grad():
            request = TorchRequest(adapter, timesteps, rows)
        return _Pupil(request, noise, noise[0], [None] * request.slots)

    def start(self, number: int) -> _Pupil:
        """The same after that step, which computes everything."""
        pupil = self.fresh(number)
        self.advance(pupil, 0, torch.ones(pupil.request.slots))
        return pupil

    def student(self, pupil: _Pupil, step: int, scores: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The guided output of a step with scores (K,), and what every slot gave."""
        pupil.request.begin(step, pupil.x)
        held = pupil.request.held
        output, *kept = self.mixed(held["sample"], held["features"], scores, pupil.cache)
        return self.guided(output, pupil), kept

    def error(
        self, pupil: _Pupil, step: int, scores: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The weighted squared distance to the step without a cache, and what `student` gives."""
        output, kept = self.student(pupil, step, scores)
        with torch.no_grad():
            held, ones = pupil.request.held, torch.ones_like(scores)
            exact = self.mixed(held["sample"], held["features"], ones, pupil.cache)[0]
        error = (output - self.guided(exact, pupil)).square().mean()
        return self.step_weight[step] * error, output, kept

    def guided(self, output: Tensor, pupil: _Pupil) -> Tensor:
        """What the sampler takes of an output."""
        channels = self.adapter.sample_shape[0]
        found: Tensor = guide(output, len(pupil.x), channels, self.recipe.guidance)
        return found

    @torch.no_grad()
    def advance(self, pupil: _Pupil, step: int, scores: Tensor) -> None:
        """One step of a trajectory."""
        output, kept = self.student(pupil, step, scores)
        self.move(pupil, step, output, kept, scores)

    def move(
        self, pupil: _Pupil, step: int, output: Tensor, kept: list[Tensor], scores: Tensor
    ) -> None:
        """Take the sampler's step; slots over the threshold renew their caches."""
        renewed = (scores > TAU).tolist()
        triples = zip(renewed, kept, pupil.cache, strict=True)
        pupil.cache = [new.detach() if renew else old for renew, new, old in triples]
        noise = pupil.noise[1 + step] if len(pupil.noise) > 1 else None
        row = Coefficients(*self.table[step])
        pupil.x = update(pupil.x, output.detach(), noise, row, self.schedule.clip)
        check_finite(pupil.x, "the sample of the router's student", step)

    def epoch(self, number: int) -> None:
        """One trajectory of SDT: an optimizer step at every step but the first."""
        beta = self.beta()
        pupil = self.start(number)
        for step in range(1, self.recipe.steps):
            scores = self.rho[step].sigmoid()
            error, output, kept = self.error(pupil, step, scores)
            (slope,) = torch.autograd.grad(error, scores, retain_graph=True)
            self.note(step, -slope)
            (error + beta * scores.sum()).backward()
            self.optimizers[step].step()
            self.optimizers[step].zero_grad()
            self.rho[step].data.clamp_(-KEPT, KEPT)
            self.move(pupil, step, output, kept, scores.detach())
        self.seen += 1

    def note(self, step: int, worth: Tensor) -> None:
        """What computing each slot of a step is worth, smoothed over trajectories."""
        share = SMOOTHING if self.seen else 0.0
        self.worth[step] = share * self.worth[step] + (1 - share) * worth

    def beta(self) -> float:
        """The price that the wanted share of slots is not worth; 0 before the first look."""
        if not self.seen:
            return 0.0
        share = self.wanted * self.recipe.steps / (self.recipe.steps - 1)
        return max(float(self.worth[1:].flatten().quantile(min(share, 1.0))), 1e-12)

    @torch.no_grad()
    def weigh(self) -> None:
        """IEPO: the weight of every step, with the scores as they are now.

        `leave_one_out` (paper): the squared distance of the final sample to that without reuse at
        this one step. `cumulative` (released code): that between reuse from the first step up to
        this one and up to the step before.
        """
        found = METHODS[self.recipe.iepo](self)
        found = found.clamp(min=FLOOR * float(found.mean()))
        self.step_weight = found / found.mean()

    def finish(self, pupil: _Pupil, first: int, scores: Callable[[int], Tensor]) -> Tensor:
        """The final sample of a trajectory that stands before step `first`."""
        pupil = pupil.copy()
        for step in range(first, self.recipe.steps):
            self.advance(pupil, step, scores(step))
        return pupil.x

    def scores(self, step: int) -> Tensor:
        """Those of the router."""
        return self.rho[step].data.sigmoid()


def _leave_one_out(school: _School) -> Tensor:
    """Each step's reuse switched off alone; trajectories share what lies before it."""
    steps = school.recipe.steps
    pupil, found = school.start(0), torch.zeros(steps)
    wanted = school.finish(pupil, 1, school.scores)
    for t in range(1, steps):
        other = pupil.copy()
        school.advance(other, t, torch.ones_like(school.rho[t].data))
        found[t] = (school.finish(other, t + 1, school.scores) - wanted).square().sum()
        school.advance(pupil, t, school.scores(t))
    return found


def _cumulative(school: _School) -> Tensor:
    """Reuse switched on step by step, from the noisiest: the increments sum up to its effect."""
    steps = school.recipe.steps
    pupil, found = school.start(0), torch.zeros(steps)

    def nothing(step: int) -> Tensor:
        return torch.ones_like(school.rho[step].data)

    before = school.finish(pupil, 1, nothing)
    for t in range(1, steps):
        school.advance(pupil, t, school.scores(t))
        after = school.finish(pupil, t + 1, nothing)
        found[t] = (after - before).square().mean()
        before = after
    return found


METHODS: dict[str, Callable[[_School], Tensor]] = {
    "leave_one_out": _leave_one_out,
    "cumulative": _cumulative,
}
