"""The calibration stage: trajectories of the model in, scales in the bundle out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.calibrate import qparams
from ditcast.calibrate.ranges import LEVELS, OBSERVERS, Observer, State, weight_scale
from ditcast.calibrate.trajectory import sample
from ditcast.errors import BundleError, ConfigError
from ditcast.manifest import Layer, Quantization
from ditcast.models import LoadedModel
from ditcast.progress import counting, say
from ditcast.recipe import WEIGHT_BITS, Recipe
from ditcast.sampling import coefficients
from ditcast.schedule import from_config

SCALES = "calibration/scales.safetensors"


def calibrate(bundle: Bundle, model: LoadedModel) -> None:
    """Find the scales of the bundle's recipe and commit them; does nothing where they are there.

    An interrupted run is taken up after its last whole batch of trajectories.

    Raises:
        ConfigError: rules that do not fit the model, NaN or Inf in a trajectory.
        BundleError: an interrupted calibration of something else.
    """
    recipe, manifest = bundle.manifest.recipe, bundle.manifest
    linears = model.adapter.linears()
    precision = qparams.select(list(linears), recipe.layer_rules())
    bits = {name: WEIGHT_BITS[kind] for name, kind in precision.items()}
    chosen = {name: linears[name] for name, wide in bits.items() if wide}
    if manifest.quantization is not None or not chosen:
        bundle.clear("calibration")  # a run may have been killed just before it did this
        return
    labels = draw_labels(recipe, model.adapter.num_classes)
    states = _collect(bundle, model, chosen, labels)
    observer = OBSERVERS[recipe.method]
    found = {
        name: qparams.LayerScales(
            activation=_scale(observer.bound(states[name], recipe.percentile)),
            weight=weight_scale(linear.weight.data, recipe.method, bits[name]),
            bits=bits[name],
        )
        for name, linear in chosen.items()
    }
    qparams.save(found, bundle.staged(SCALES))
    quantization = Quantization(
        made_from=manifest.fingerprint(),
        file=SCALES,
        layers=tuple(
            Layer(
                name=name,
                block=name.rpartition(".")[0],
                precision=precision[name],
                shape=(linear.out_features, linear.in_features),
            )
            for name, linear in chosen.items()
        ),
        labels=tuple(labels),
    )
    bundle.commit({"quantization": quantization}, replaces="calibration/")
    bundle.clear("calibration")


def check(model: LoadedModel, recipe: Recipe) -> None:
    """Refuse a recipe that does not fit the model, before a bundle is started.

    Raises:
        ConfigError: rules that do not fit its layers, or more steps than it was trained on.
        UnsupportedError: a noise schedule that is not implemented for this sampler.
    """
    coefficients(from_config(model.scheduler), recipe.sampler, recipe.steps)
    qparams.select(list(model.adapter.linears()), recipe.layer_rules())


def _scale(bound: float) -> float:
    """The scale of a symmetric 8-bit range, as float32; not zero where a layer sees only zeros."""
    return float(np.float32(max(bound, 1e-12) / LEVELS))


def draw_labels(recipe: Recipe, num_classes: int) -> list[int]:
    """The label of each calibration trajectory, from the recipe's seed."""
    rng = np.random.default_rng([recipe.seed, 0xCA11B])
    return [int(label) for label in rng.integers(0, num_classes, recipe.samples)]


def _collect(
    bundle: Bundle, model: LoadedModel, chosen: dict[str, nn.Linear], labels: list[int]
) -> dict[str, State]:
    """The observers' states after all trajectories, resuming where a run stopped."""
    recipe = bundle.manifest.recipe
    observer = OBSERVERS[recipe.method]
    progress = bundle.scratch("calibration") / "states.safetensors"
    states, done = _resume(progress, bundle.manifest.fingerprint(), list(chosen))
    batches = range(done, recipe.samples, recipe.batch)
    if done:
        say(f"calibrating: resuming after {done} of {recipe.samples} trajectories")
    schedule = from_config(model.scheduler)
    with counting("calibrating", len(batches) * recipe.steps) as advance:
        for first in batches:
            last = min(first + recipe.batch, recipe.samples)
            with _observing(chosen, observer, states, advance) as callback:
                sample(
                    model.adapter,
                    schedule,
                    sampler=recipe.sampler,
                    steps=recipe.steps,
                    guidance=recipe.guidance,
                    seed=recipe.seed,
                    indices=range(first, last),
                    labels=labels[first:last],
                    callback=callback,
                )
            for name in chosen:
                states[name] = observer.end_batch(states[name])
            _save(progress, bundle.manifest.fingerprint(), states, last)
    return states


@contextlib.contextmanager
def _observing(
    linears: dict[str, nn.Linear],
    observer: Observer,
    states: dict[str, State],
    advance: Callable[[], None],
) -> Iterator[Callable[[int], None]]:
    """While active, every input of the Linears goes to the observer; yields the step callback."""
    current = 0

    def next_step(done: int) -> None:
        nonlocal current
        current = done + 1
        advance()

    def watch(name: str, linear: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            if not bool(torch.isfinite(args[0]).all()):
                raise ConfigError(
                    f"calibration: NaN or Inf in the input of layer {name} at step {current}; "
                    "the model overflows with this sampler and guidance, try other values"
                )
            states[name] = observer.observe(states[name], args[0])

        return linear.register_forward_pre_hook(hook)

    hooks = [watch(name, linear) for name, linear in linears.items()]
    try:
        yield next_step
    finally:
        for hook in hooks:
            hook.remove()


def _save(path: Path, fingerprint: str, states: dict[str, State], done: int) -> None:
    """Write the states and how many trajectories are in them, by temporary file and rename."""
    flat = {f"{name}|{key}": t.numpy() for name, s in states.items() for key, t in s.items()}
    partial = path.with_suffix(".tmp")
    tensors.save(flat, partial, {"fingerprint": fingerprint, "done": str(done)})
    partial.replace(path)


def _resume(path: Path, fingerprint: str, names: list[str]) -> tuple[dict[str, State], int]:
    """The states that an interrupted run left, else empty ones."""
    states: dict[str, State] = {name: {} for name in names}
    if not path.is_file():
        return states, 0
    try:
        flat, metadata = tensors.load(path)
    except BundleError as err:
        say(f"calibrating: starting afresh, what an interrupted run left is unreadable ({err})")
        return states, 0
    if metadata["fingerprint"] != fingerprint:
        raise BundleError(
            f"calibration: {path} is of another model or recipe; remove it to start afresh"
        )
    for key, array in flat.items():
        name, _, field = key.partition("|")
        states[name][field] = torch.from_numpy(array)
    return states, int(metadata["done"])
