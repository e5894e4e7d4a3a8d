"""The calibration stage: trajectories of the model in, everything quantized in the bundle out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ditcast.bundle import Bundle
from ditcast.calibrate import cache, features, qparams, tap, tib
from ditcast.calibrate.balance import balanced_layers, factors
from ditcast.calibrate.blocks import Rows, Walk
from ditcast.calibrate.clock import Clock
from ditcast.calibrate.collect import (
    States,
    Watch,
    check_finite,
    collect,
    draw_labels,
    followed,
    keep,
    resume,
)
from ditcast.calibrate.methods import METHODS
from ditcast.calibrate.qparams import LayerScales, QParams
from ditcast.calibrate.ranges import CHANNELS, INPUTS, OBSERVERS, State
from ditcast.calibrate.simulate import quantized
from ditcast.errors import ConfigError
from ditcast.manifest import Layer as LayerEntry
from ditcast.manifest import Quantization
from ditcast.models import Adapter, LoadedModel
from ditcast.models.base import Layer
from ditcast.progress import counting, say
from ditcast.recipe import FLOAT, MODULES, PRECISIONS, TEMPORAL, Bits, Recipe
from ditcast.sampling import check_guidance, coefficients, row_labels
from ditcast.schedule import from_config

SCALES = "calibration/scales.safetensors"
# What is timed, besides the parts of the cache's fit.
TRAJECTORIES, TIB, STORED = "trajectories and ranges", "TIB", "stored features"
BLOCKS = "reconstruction of blocks"


def calibrate(bundle: Bundle, model: LoadedModel) -> dict[str, float]:
    """Find all that the bundle's recipe asks for: scales, and what the cache's plan needs.

    Returns the seconds that each part took, with those of interrupted runs as far as their work
    was taken up; nothing where there was nothing left to find.

    Raises:
        ConfigError: a recipe that does not fit the model, NaN or Inf in a trajectory or in the
            temporal features.
        BundleError: an interrupted calibration of something else, another process that writes to
            the bundle, or a full disk.
    """
    clock = Clock(bundle)
    _quantize(bundle, model, clock)
    cache.fit(bundle, model, clock)
    clock.clear()
    return clock.seconds


def _quantize(bundle: Bundle, model: LoadedModel, clock: Clock) -> None:
    """Quantize by the bundle's recipe and commit what was found; does nothing where it is there.

    An interrupted run is taken up after its last whole batch of trajectories, the reconstructed
    TIB, or its last reconstructed part.
    """
    recipe, manifest = bundle.manifest.recipe, bundle.manifest
    precision = choose_precision(model, recipe)
    chosen = {name: PRECISIONS[kind] for name, kind in precision.items() if PRECISIONS[kind].weight}
    needed = bool(chosen) or recipe.temporal in ("cache", "select")
    if manifest.quantization is not None or not needed:
        bundle.clear("calibration")  # a run may have been killed just before it did this
        return
    with torch.no_grad():
        found = _Calibration(bundle, model, chosen, clock).run()
    qparams.save(found, bundle.staged(SCALES))
    adapter = model.adapter
    layers = adapter.layers() | adapter.temporal_linears()
    positions = adapter.positions()
    quantization = Quantization(
        made_from=manifest.fingerprint(),
        file=SCALES,
        layers=tuple(
            LayerEntry(
                name=name,
                block=name.rpartition(".")[0],
                precision=precision[name],
                shape=_shape(layers[name]),
                positions=positions.get(name, 1),
            )
            for name in found.layers
        ),
        labels=tuple(draw_labels(recipe, adapter.num_classes)),
        stored=None if found.stored is None else tuple(features.check_store(model, recipe)),
    )
    bundle.commit({"quantization": quantization}, replaces="calibration/")
    bundle.clear("calibration")


def check(model: LoadedModel, recipe: Recipe) -> None:
    """Refuse a recipe that does not fit the model, before a bundle is started.

    Raises:
        ConfigError: rules or a group that do not fit its layers, more steps than it was trained
            on, guidance, balancing or a cache that it does not allow, or temporal features that
            are too many to be stored.
        UnsupportedError: a noise schedule that is not implemented for this sampler.
    """
    coefficients(from_config(model.scheduler), recipe.sampler, recipe.steps)
    check_guidance(recipe.guidance, model.adapter.null_label)
    choose_precision(model, recipe)
    cache.check(model, recipe)
    if recipe.balance != "none" and not balanced_layers(model.adapter):
        raise ConfigError(
            f"balance: got {recipe.balance}, but no layer of the model can be balanced; "
            "expected none"
        )
    if recipe.temporal in ("cache", "select"):
        features.check_store(model, recipe)


def choose_precision(model: LoadedModel, recipe: Recipe) -> dict[str, str]:
    """The precision of every layer that the recipe asks for: the TIB's where it is quantized.

    Raises:
        ConfigError: rules or a group that do not fit the layers, 8-bit floats in the TIB.
    """
    layers = model.adapter.layers()
    if recipe.temporal in MODULES:
        layers |= model.adapter.temporal_linears()
    precision = qparams.select(list(layers), recipe.layer_rules())
    for name, kind in precision.items():
        inputs = _shape(layers[name])[1]
        if recipe.group and kind != FLOAT and inputs % recipe.group:
            raise ConfigError(
                f"group: got {recipe.group}, but layer {name} has {inputs} inputs; expected a "
                "divisor of them, or 0"
            )
        if PRECISIONS[kind].e4m3 and name.startswith(TEMPORAL):
            raise ConfigError(
                f"rules: got {kind} for layer {name}, whose input ranges are not symmetric, as "
                "those of 8-bit floats are; use --temporal fp, or rules with precision w8a8 for "
                f"{TEMPORAL}*"
            )
    return precision


def _shape(layer: Layer) -> tuple[int, int]:
    """Outputs O and inputs I of a layer's product."""
    return len(layer.weight), layer.weight[0].numel()


class _Calibration:
    """One calibration in the order of its stages."""

    def __init__(
        self, bundle: Bundle, model: LoadedModel, chosen: dict[str, Bits], clock: Clock
    ) -> None:
        self.bundle, self.model, self.chosen, self.clock = bundle, model, chosen, clock
        self.adapter, self.recipe = model.adapter, bundle.manifest.recipe
        self.method = METHODS[self.recipe.method]
        steps = from_config(model.scheduler).timesteps(self.recipe.steps)
        self.timesteps = torch.from_numpy(steps).float()  # (T,), noisiest first
        self.peaks: State = {}  # of every layer of the network, (T,)

    def run(self) -> QParams:
        """Balancing, then the TIB, then the blocks behind it."""
        recipe = self.recipe
        found = QParams(balance=self._balance(), edges=self._edges())
        if recipe.temporal in ("tib", "select"):
            found = self._tib(found, self._start(self.adapter.temporal_linears()))
            self.clock.lap(TIB)
        if recipe.temporal in ("cache", "select"):
            found = self._store(found)
            self.clock.lap(STORED)
        layers = self._blocks(found) if self.method.reconstruct else self._ranges(found)
        found = replace(found, layers=found.layers | self._peaked(layers))
        self.clock.lap(BLOCKS if self.method.reconstruct else TRAJECTORIES)
        if recipe.temporal == "naive":  # what no part has reconstructed is to the nearest
            scales = self._start(self.adapter.temporal_linears())
            scales |= {name: found.layers[name] for name in scales if name in found.layers}
            found = self._tib_ranges(found, scales)
            self.clock.lap(TIB)
        return found

    def _edges(self) -> Tensor:
        """Bounds between neighbouring timesteps, so that another number of steps finds a bin."""
        ascending: Tensor = self.timesteps.unique()
        found: Tensor = (ascending[1:] + ascending[:-1]) / 2
        return found[:0] if self.recipe.fsc == "none" else found

    def _bins(self) -> list[Tensor]:
        ascending: Tensor = self.timesteps.unique()
        return [ascending] if self.recipe.fsc == "none" else list(ascending[:, None])

    def _start(self, layers: Mapping[str, Layer]) -> dict[str, LayerScales]:
        """Scales of those weights that are to be quantized, as they are now; to the nearest."""
        bits = {name: wide for name, wide in self.chosen.items() if name in layers}
        return self.method.nearest(layers, bits, self.recipe.group)

    def _balance(self) -> dict[str, Tensor]:
        kind, layers = self.recipe.balance, self.adapter.layers()
        if kind == "none":
            return {}
        names = [name for name in balanced_layers(self.adapter) if name in self.chosen]
        watches = [Watch(name, layers[name], CHANNELS, stepwise=True) for name in names]
        states = self._collect("channels", watches)
        found = {}
        for name in names:
            largest = torch.stack([state["channels"] for state in states[name]])  # (T, I)
            found[name] = factors(kind, layers[name], largest)
            ran = self.peaks[name] > 0
            self.peaks[name] = torch.where(ran, (largest * found[name]).amax(dim=1), 0)
        return found

    def _collect(self, name: str, watches: Sequence[Watch]) -> States:
        """A pass over the trajectories; the first one has the peaks, which balancing changes."""
        lap = partial(self.clock.lap, TRAJECTORIES)
        states, peaks = collect(self.bundle, self.model, name, watches, lap)
        self.peaks = self.peaks or peaks
        return states

    def _peaked(self, layers: dict[str, LayerScales]) -> dict[str, LayerScales]:
        """The layers with the peaks of those inputs that are rounded."""
        return {
            name: held
            if held.activation is None or name.startswith(TEMPORAL)
            else replace(held, peak=self.peaks[name])
            for name, held in layers.items()
        }

    def _tib(self, found: QParams, scales: dict[str, LayerScales]) -> QParams:
        """The TIB by itself: TIAR where the method reconstructs, then its ranges."""
        self._check_features(self._tib_labels())
        if self.method.reconstruct and scales:
            scales = self._tiar(scales)
        return self._tib_ranges(found, scales)

    def _tiar(self, scales: dict[str, LayerScales]) -> dict[str, LayerScales]:
        """The same with learned codes, or with those that an interrupted run has learned."""
        recipe, fingerprint = self.recipe, self.bundle.manifest.fingerprint()
        file = self.bundle.scratch("calibration") / "tib.safetensors"
        states: States = {name: [{}] for name in scales}
        if not resume(file, fingerprint, states):
            with counting("reconstructing the TIB", recipe.iterations) as advance:
                learned = tib.tiar(
                    self.adapter,
                    scales,
                    self.timesteps,
                    self._tib_labels(),
                    init=recipe.init,
                    iterations=recipe.iterations,
                    seed=recipe.seed,
                    advance=advance,
                )
            for name, held in learned.items():
                assert held.codes is not None
                states[name][0]["codes"] = held.codes
            keep(file, fingerprint, states, done=1)
            self.clock.lap(TIB)
        return {
            name: replace(held, codes=states[name][0]["codes"]) for name, held in scales.items()
        }

    def _check_features(self, labels: Tensor) -> None:
        """Refuse temporal features that are not finite, before they are rounded."""
        for step, t in enumerate(self.timesteps):
            own = self.adapter.temporal.own(t[None], labels)
            check_finite(own, "the temporal features", step)

    def _tib_labels(self) -> Tensor:
        return tib.draw_labels(self.adapter, self.timesteps, self.recipe.seed)

    def _tib_ranges(self, found: QParams, scales: dict[str, LayerScales]) -> QParams:
        layers, outputs = tib.ranges(self.adapter, scales, self._bins(), self._tib_labels())
        rounded = self.recipe.tib_outputs == "rounded"
        return replace(found, layers=found.layers | layers, outputs=outputs if rounded else None)

    def _store(self, found: QParams) -> QParams:
        """Stored features, and the TIB where it is better, if it is there at all."""
        labels = features.check_store(self.model, self.recipe)
        self._check_features(torch.tensor(labels))
        bits = self.recipe.feature_bits()
        stored = features.store(self.adapter, self.timesteps, labels, bits)
        if self.recipe.temporal == "select":
            stored = features.choose(self.adapter, found, stored)
        if stored.module is not None:
            return replace(found, stored=stored)
        return replace(found, stored=stored, layers={}, outputs=None)  # the TIB is not needed

    def _ranges(self, found: QParams) -> dict[str, LayerScales]:
        """Weights to the nearest, and input ranges from the trajectories of full precision."""
        observer, recipe = OBSERVERS[self.method.observer], self.recipe
        layers, stepwise = self.adapter.layers(), recipe.fsc == "all"
        with quantized(self.adapter, QParams(balance=found.balance)):
            scales = self._start(layers)
            names = [name for name in scales if scales[name].bits.activation < 16]
            watches = [Watch(name, layers[name], observer, stepwise) for name in names]
            states = self._collect("states", watches) if watches else {}
        for name in names:
            wide = scales[name].bits
            values = torch.tensor(
                [self.method.input_scale(s, recipe.percentile, wide) for s in states[name]]
            )
            scales[name] = replace(
                scales[name], activation=values.flip(0) if stepwise else values[0]
            )
        return scales

    def _blocks(self, found: QParams) -> dict[str, LayerScales]:
        """Reconstruction of the network's parts on inputs drawn from the trajectories."""
        bits = {n: b for n, b in self.chosen.items() if n not in found.layers}
        if self.recipe.temporal != "naive":
            bits = {n: b for n, b in bits.items() if not n.startswith(TEMPORAL)}
        walk = Walk(self.adapter, self.recipe, found, self._rows(found.edges), bits)
        folder = self.bundle.scratch("calibration")
        with counting("reconstructing", len(self.adapter.parts)) as advance:

            def next_part() -> None:
                advance()
                self.clock.lap(BLOCKS)

            return walk.run(folder, next_part)

    def _rows(self, edges: Tensor) -> Rows:
        """Rows of all full steps, equally many of each or by TAP, in the order of steps."""
        recipe, adapter = self.recipe, self.adapter
        watch = Watch("stem", adapter.stem, INPUTS, stepwise=True)
        states = self._collect("inputs", [watch])["stem"]
        inputs = torch.stack([state["inputs"] for state in states])  # (T, rows, C, H, W)
        labels = torch.tensor(_row_labels(recipe, adapter))
        computed = torch.from_numpy(followed(self.bundle).full).nonzero().flatten()
        steps = computed.repeat_interleave(len(labels))  # of every row of the pool
        rows = torch.arange(len(labels)).repeat(len(computed))
        if recipe.selection == "tap":
            drawn = tap.select(inputs[steps, rows], steps, recipe.rows, seed=recipe.seed)
            counts = steps[drawn].bincount(minlength=len(inputs)).tolist()
            say(f"calibrating: TAP draws, of steps 0 to {len(inputs) - 1}: {counts} rows")
        else:
            generator = torch.Generator().manual_seed(recipe.seed)
            each = max(1, min(recipe.rows // len(computed), len(labels)))
            drawn = torch.cat(
                [
                    i * len(labels) + torch.randperm(len(labels), generator=generator)[:each]
                    for i in range(len(computed))
                ]
            )
        steps, rows = steps[drawn], rows[drawn]
        timesteps = self.timesteps[steps]
        return Rows(
            sample=inputs[steps, rows],
            timesteps=timesteps,
            labels=labels[rows],
            bins=(timesteps[:, None] >= edges).sum(dim=1),
        )


def _row_labels(recipe: Recipe, adapter: Adapter) -> list[int]:
    """The label of every row of a step, in the order in which trajectories pass the network."""
    labels, found = draw_labels(recipe, adapter.num_classes), []
    for first in range(0, recipe.samples, recipe.batch):
        batch = labels[first : first + recipe.batch]
        found += row_labels(batch, recipe.guidance, adapter.null_label)
    return found
