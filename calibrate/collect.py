"""One pass over calibration trajectories, in which modules are watched; it can be taken up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache import StepPlan, make_plan
from ditcast.cache.fitted import recipe_plan
from ditcast.calibrate.ranges import Observer, State
from ditcast.calibrate.trajectory import follow
from ditcast.errors import BundleError, ConfigError
from ditcast.models import LoadedModel
from ditcast.progress import counting, say
from ditcast.recipe import Recipe


class Watch(NamedTuple):
    """What an observer sees of a module's input: all steps together, or each for itself."""

    name: str
    module: nn.Module
    observer: Observer
    stepwise: bool = False


States = dict[str, list[State]]  # of each watch: one state, or one per step
PEAKS = "peaks"  # in the file of a pass, beside the states


def draw_labels(recipe: Recipe, num_classes: int) -> list[int]:
    """The label of each calibration trajectory, from the recipe's seed: only stored ones."""
    rng = np.random.default_rng([recipe.seed, 0xCA11B])
    pool = sorted(set(recipe.labels)) or range(num_classes)
    return [pool[int(i)] for i in rng.integers(0, len(pool), recipe.samples)]


def collect(
    bundle: Bundle,
    model: LoadedModel,
    name: str,
    watches: Sequence[Watch],
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[States, State]:
    """The states of all watches after the recipe's trajectories, and how large inputs were.

    The latter is the largest magnitude (T,) of the input of every layer of the network, watched or
    not, at each step; 0 where it did not run. An interrupted pass is taken up after its last whole
    batch; `name` is that of its file, and `after_batch` is called whenever it is written. Where
    the trajectories follow a cache's plan, a layer that reuse steps do not run has the state of
    the full step before them there.

    Raises:
        ConfigError: NaN or Inf in a trajectory, also in a layer that no watch is of.
        BundleError: an interrupted calibration of another model or recipe.
    """
    recipe, fingerprint = bundle.manifest.recipe, bundle.manifest.fingerprint()
    plan = followed(bundle)
    progress = bundle.scratch("calibration") / f"{name}.safetensors"
    states: States = {
        w.name: [{} for _ in range(recipe.steps if w.stepwise else 1)] for w in watches
    }
    layers = model.adapter.layers()
    peaks = {layer: torch.zeros(recipe.steps) for layer in layers}
    done = resume(progress, fingerprint, states | {PEAKS: [peaks]})
    labels = draw_labels(recipe, model.adapter.num_classes)
    batches = range(done, recipe.samples, recipe.batch)
    if done:
        say(f"calibrating: resuming after {done} of {recipe.samples} trajectories")
    with counting("calibrating", len(batches) * recipe.steps) as advance:
        for first in batches:
            last = min(first + recipe.batch, recipe.samples)
            with _watching(watches, states, layers, peaks, advance) as callback:
                indices = range(first, last)
                follow(
                    model,
                    recipe,
                    indices,
                    labels[first:last],
                    plan=plan,
                    correct=_finite_sample,
                    callback=callback,
                )
            for watch in watches:
                states[watch.name] = [
                    watch.observer.end_batch(s) if s else s for s in states[watch.name]
                ]
            keep(progress, fingerprint, states | {PEAKS: [peaks]}, last)
            after_batch()
    for watch in watches:
        for step, state in enumerate(states[watch.name]):  # a reuse step takes the one before
            states[watch.name][step] = state or states[watch.name][step - 1]
    return states, peaks


def followed(bundle: Bundle) -> StepPlan:
    """The plan of calibration trajectories: all steps full, or the cache's without its guard."""
    manifest = bundle.manifest
    if manifest.recipe.trajectories == "cached":
        return recipe_plan(manifest)
    return make_plan(
        "none", steps=manifest.recipe.steps, interval=1, slots=len(manifest.model.slots)
    )


@contextlib.contextmanager
def _watching(
    watches: Sequence[Watch],
    states: States,
    layers: Mapping[str, nn.Module],
    peaks: State,
    advance: Callable[[], None],
) -> Iterator[Callable[[int, bool], None]]:
    """While active, every input goes to its observer; yields the step callback.

    The inputs of all layers are looked through, so that the first one with NaN or Inf is named,
    whichever the pass is about; what is looked for, their largest magnitude, goes to `peaks`.
    """
    current = 0

    def next_step(done: int, full: bool) -> None:
        nonlocal current
        del full
        current = done + 1
        advance()

    def check_of(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            low, high = args[0].aminmax()  # of NaN both are NaN
            largest = torch.maximum(-low, high)
            check_finite(largest, f"the input of layer {name}", current)
            peaks[name][current] = torch.maximum(peaks[name][current], largest)

        return layers[name].register_forward_pre_hook(hook)

    def hook_of(watch: Watch) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            found = states[watch.name]
            i = current if watch.stepwise else 0
            found[i] = watch.observer.observe(found[i], args[0])

        return watch.module.register_forward_pre_hook(hook)

    hooks = [check_of(name) for name in layers] + [hook_of(watch) for watch in watches]
    try:
        yield next_step
    finally:
        for hook in hooks:
            hook.remove()


def _finite_sample(step: int, x: Tensor) -> Tensor:
    """A sample as it is, if it is finite: what the last layer gives has no layer behind it."""
    check_finite(x, "the sample", step)
    return x


def check_finite(x: Tensor, what: str, step: int) -> None:
    """Refuse a trajectory that overflowed.

    Raises:
        ConfigError: naming what overflowed, and the step.
    """
    if not bool(torch.isfinite(x).all()):
        raise ConfigError(
            f"calibration: NaN or Inf in {what} at step {step}; "
            "the model overflows with this sampler and guidance, try other values"
        )


def keep(path: Path, fingerprint: str, states: States, done: int) -> None:
    """Write states and how much is in them, by temporary file and rename."""
    flat = {
        f"{name}|{i}|{key}": tensor.numpy()
        for name, found in states.items()
        for i, state in enumerate(found)
        for key, tensor in state.items()
    }
    partial = path.with_suffix(".tmp")
    tensors.save(flat, partial, {"fingerprint": fingerprint, "done": str(done)})
    partial.replace(path)


def resume(path: Path, fingerprint: str, states: States) -> int:
    """Fill in what an interrupted run left; returns how much of it is done.

    Raises:
        BundleError: it is of another model or recipe.
    """
    if not path.is_file():
        return 0
    try:
        flat, metadata = tensors.load(path)
    except BundleError as err:
        say(f"calibrating: starting afresh, what an interrupted run left is unreadable ({err})")
        return 0
    if metadata["fingerprint"] != fingerprint:
        raise BundleError(
            f"calibration: {path} is of another model or recipe; remove it to start afresh"
        )
    if missing := sorted(states.keys() - {key.split("|")[0] for key in flat}):
        say(f"calibrating: starting afresh, what an interrupted run left has no {missing[0]}")
        return 0
    for key, array in flat.items():
        name, i, field = key.split("|")
        states[name][int(i)][field] = torch.from_numpy(array)
    return int(metadata["done"])
