"""What is traced and what parity is measured on: every graph with inputs of a real request."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from ditcast.bundle import Bundle
from ditcast.cache.fitted import Fitted, recipe_plan
from ditcast.cache.stepping import GRAPHS, graphs
from ditcast.calibrate.trajectory import sample
from ditcast.models import Adapter
from ditcast.sampling import (
    Advance,
    Coefficients,
    coefficients,
    correct,
    draw_noise,
    needs_noise,
    with_null,
)
from ditcast.schedule import from_config


class Probe(NamedTuple):
    """One graph in torch with real inputs: what is traced and what parity is measured on."""

    module: Any  # a torch module, or for the graph loop a function
    feeds: dict[str, Tensor]
    outputs: list[str]
    dynamic: list[Any]

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        """The outputs by name."""
        found = self.module(*self.feeds.values())
        return dict(zip(self.outputs, found if isinstance(found, tuple) else (found,), strict=True))

    def first_slot(self) -> Probe:
        """The full step with a forecast of the first slot only."""
        cut = {name: self.feeds[name][:1] for name in ("ahead", "weights")}
        return self._replace(feeds=self.feeds | cut)


@torch.no_grad()
def make_probes(bundle: Bundle, adapter: Adapter) -> dict[str, Probe]:
    """The graphs of a bundle's plan, and those of a static one, with inputs of a real request.

    Two images, mid-trajectory; with guidance, where the model has a null label.
    """
    recipe, null = bundle.manifest.recipe, adapter.null_label
    labels = torch.tensor(with_null(two_labels(bundle), null))
    known = from_config(bundle.manifest.schedule).timesteps(recipe.steps)
    half = len(known) // 2
    timesteps = torch.tensor([float(known[half]), float(known[(half + len(known)) // 2])])
    noise = [draw_noise(recipe.seed, i, adapter.sample_shape, 0)[0] for i in range(2)]
    sample = torch.from_numpy(np.stack(noise)).repeat(2, 1, 1, 1)
    rows = torch.tensor([0, 1, 0, 1] if null is None else [0, 1, 2, 2])
    features = adapter.temporal(timesteps, labels)[:, rows]
    plan = recipe_plan(bundle.manifest)
    feeds = _Feeds(adapter, plan.history, sample, features)
    given = {"timesteps": timesteps, "class_labels": labels}
    axes = [{0: Dim("T")}, {0: Dim("U")}]
    names = dict.fromkeys(("full", "reuse", *graphs(plan)))
    return {
        "temporal": Probe(adapter.temporal, given, ["features"], axes),
        **{name: feeds.probe(name) for name in names},
    }


class _Feeds:
    """Inputs of every step graph, made by other ones at the steps before."""

    def __init__(self, adapter: Adapter, history: int, sample: Tensor, features: Tensor) -> None:
        """`features` (2, N, F) are those of the step, and of another one."""
        self.adapter, self.history = adapter, history
        self.first, self.second = features
        slots, rows = len(adapter.slots), len(sample)
        # The first row has the first slot alone: what lies behind the first layers only. Four rows
        # are as many as make forecasts a product (`export.forecast`).
        weights = torch.ones(4, slots)
        weights[0, 1:] = 0
        self.known: dict[str, Tensor] = {
            "sample": sample,
            "features": self.first,
            "ahead": self.second[None].repeat(4, 1, 1),
            "weights": weights,
            "mask": (torch.arange(slots) % 2).float(),
            "factors": 1 / torch.arange(1.0, history + 1),
        }
        self.nothing = {
            "before": torch.zeros(history, rows, *adapter.slot_shape),
            "y": torch.zeros(history, slots, rows, *adapter.slot_shape),
            "a": torch.zeros(slots, rows, *adapter.slot_shape),
        }

    def probe(self, name: str) -> Probe:
        """A step graph with its inputs."""
        rows = Dim("N")
        inputs, outputs = GRAPHS[name].names(len(self.adapter.slots))
        axes: dict[str, dict[int, Any]] = {
            "ahead": {0: Dim("R"), 1: rows},
            "weights": {0: Dim("R")},
        }
        axes |= {"before": {1: rows}, "factors": {}, "y": {2: rows}, "a": {1: rows}}
        axes |= {"slope": {1: rows}, "mask": {}}
        given = self.known | self._kept(name)
        feeds = {key: given[key] for key in inputs}
        dynamic: list[Any] = [axes.get(key, {0: rows}) for key in feeds if "." not in key]
        if kept := [{0: rows} for key in feeds if "." in key]:
            dynamic.append(tuple(kept))
        return Probe(self.adapter.steps[name], feeds, outputs, dynamic)

    def _kept(self, graph: str) -> dict[str, Tensor]:
        """What other steps give to a step graph; each of them runs once."""
        inputs, known = {*GRAPHS[graph].inputs}, self.known | self.nothing
        earlier = known | {"features": self.second}
        if "forecast" in inputs:
            return {"forecast": self._run("full", known)["forecast"][1]}
        if "before" in inputs:  # of the step before, in the place of those before that, too
            gauge = self._run(graph, earlier)["gauge"]
            return {"before": gauge[None].repeat(self.history, *[1] * gauge.dim())}
        if "cache.*" in inputs:  # all slots of another step
            slots = len(self.adapter.slots)
            empty = {f"cache.{k}": self.nothing["a"][0] for k in range(slots)}
            found = self._run(graph, earlier | empty | {"mask": torch.ones(slots)})
            return {name: found[name.replace("cache", "kept")] for name in empty}
        if "stream" in inputs:
            found = self._run("block", known)
            return found | self._run("rest", known | found)
        if "y" in inputs:
            found = self._run("observe", earlier)
            if graph != "observe":  # two full steps lie behind a reuse step
                found = self._run("observe", known | {"y": found["y_now"], "a": found["a_now"]})
            return {"y": found["y_now"], "a": found["a_now"], "slope": found["slope"]}
        return {}

    def _run(self, graph: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs, outputs = GRAPHS[graph].names(len(self.adapter.slots))
        feeds = {name: given[name] for name in inputs}
        return Probe(self.adapter.steps[graph], feeds, outputs, []).run()


def two_labels(bundle: Bundle) -> tuple[int, int]:
    """The first and the last label whose features the bundle can give."""
    labels = bundle.manifest.stored_labels() or range(bundle.manifest.model.num_classes)
    return labels[0], labels[-1]


def loop_probe(bundle: Bundle, adapter: Adapter, fitted: Fitted) -> Probe:
    """The first steps of one image with guidance, as torch samples them."""
    recipe, schedule = bundle.manifest.recipe, from_config(bundle.manifest.schedule)
    label, steps = two_labels(bundle)[1], short_steps(bundle)

    def corrected(step: int, x: Tensor) -> Tensor:
        assert fitted.gain is not None
        assert fitted.offset is not None
        found: Tensor = correct(
            x, torch.from_numpy(fitted.gain[step]), torch.from_numpy(fitted.offset[step])
        )
        return found

    def first_steps(*feeds: Tensor) -> Tensor:
        del feeds  # the same noise, drawn again
        return sample(
            adapter,
            schedule,
            sampler=recipe.sampler,
            steps=recipe.steps,
            guidance=recipe.guidance,
            seed=recipe.seed,
            indices=[0],
            labels=[label],
            plan=fitted.plan(bundle.manifest),
            stop_after=steps,
            correct=corrected if fitted.gain is not None else None,
        )

    noises = recipe.steps if needs_noise(recipe.sampler) else 0
    noise = torch.from_numpy(draw_noise(recipe.seed, 0, adapter.sample_shape, noises))
    feeds = {
        "noise": noise[:1],
        "class_labels": torch.tensor([label]),
        "guidance_scale": torch.tensor(recipe.guidance),
    }
    if noises:
        feeds["step_noise"] = noise[1 : steps + 1, None]
    return Probe(first_steps, feeds, ["latents"], [])


def between_probes(bundle: Bundle, adapter: Adapter) -> dict[str, Probe]:
    """A sum of forecasts, and a last but one step of two images with guidance and correction."""
    recipe, schedule = bundle.manifest.recipe, from_config(bundle.manifest.schedule)
    steps, (channels, *size) = recipe.steps, adapter.sample_shape
    rng = torch.Generator().manual_seed(recipe.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    noise = draw(steps, 2, channels, *size) if needs_noise(recipe.sampler) else None
    table = coefficients(schedule, recipe.sampler, steps)
    feeds = {
        "x": draw(2, channels, *size),
        "output": draw(4, adapter.output_channels, *size),
        "step": torch.tensor(max(steps - 2, 0)),
        "guidance_scale": torch.tensor(1.5),
        "gain": 1 + draw(steps, channels, 1, 1) / 10,
        "offset": draw(steps, channels, 1, 1) / 10,
        **dict(zip(Coefficients._fields, torch.from_numpy(table).T, strict=True)),
    }
    if noise is None:
        del feeds["k_z"]
    else:
        feeds["step_noise"] = noise
    advance = Advance(
        guidance=1.5,
        table=table,
        clip=schedule.clip,
        noise=noise,
        gain=feeds["gain"],
        offset=feeds["offset"],
    )

    def update(x: Tensor, output: Tensor, step: Tensor, *others: Tensor) -> Tensor:
        del others  # of the request: `advance` has them
        found: Tensor = advance(int(step), x, output)
        return found

    summed = {name: draw(2, *adapter.slot_shape) for name in ("part", "older")}
    return {
        "add": Probe(torch.add, summed, ["sum"], []),
        "update": Probe(update, feeds, ["after"], []),
    }


def short_steps(bundle: Bundle) -> int:
    """Up to the first reuse step, if there is one; at least two, where there are as many."""
    plan = recipe_plan(bundle.manifest)
    first = 1 if plan.full.all() else int(np.argmin(plan.full))
    first += 0 if plan.gate is None else 2  # that is the first that it may be
    return min(max(first, 1) + 1, len(plan.full))
