"""The walk over the network's parts: each is reconstructed behind those already quantized.

Inputs are "asymmetric" (BRECQ, TFMQ-DM code): a part sees what the quantized parts before it
give, and is asked for what full precision gives. Two sets of activations are all that is held,
and in a U-Net the skips of both.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ditcast.calibrate import adaround
from ditcast.calibrate import qparams as files
from ditcast.calibrate.gptq import grams
from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.methods import METHODS
from ditcast.calibrate.qparams import LayerScales, QParams
from ditcast.calibrate.ranges import OBSERVERS, Observer, State
from ditcast.calibrate.simulate import Simulation, quantized
from ditcast.errors import BundleError
from ditcast.models import Adapter
from ditcast.models.base import Layer, first_skips
from ditcast.progress import say
from ditcast.recipe import TEMPORAL, Bits, Recipe

CHUNK = 32  # rows that pass through a part at once
BATCH = 8  # rows of an iteration: at equal time, more iterations beat larger batches

Scales = dict[str, LayerScales]
Unit = Callable[[Tensor], Tensor]  # the output of a part for some of the rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Calibration inputs (M, C, H, W) with the timestep, label and bin (M,) of each."""

    sample: Tensor
    timesteps: Tensor
    labels: Tensor
    bins: Tensor


class Walk:
    """The parts of one model under reconstruction."""

    def __init__(
        self, adapter: Adapter, recipe: Recipe, base: QParams, rows: Rows, bits: dict[str, Bits]
    ) -> None:
        """`base` holds what is found already; `bits` are those of the layers to be found."""
        self.adapter, self.recipe, self.base, self.rows = adapter, recipe, base, rows
        self.bits, self.method = bits, METHODS[recipe.method]
        self.naive = any(name.startswith(TEMPORAL) for name in bits)
        self.now = rows.bins  # of the rows at hand

    @torch.no_grad()
    def run(self, folder: Path, advance: Callable[[], None]) -> Scales:
        """The scales of all layers; those of parts that are in `folder` are taken from there.

        `advance` is called once for every part.
        """
        found: Scales = {}
        plain = QParams(balance=self.base.balance)
        exact, rounded = self._features(plain), self._features(self.base)
        parts = self.adapter.parts
        with quantized(self.adapter, plain):
            wanted = given = self._through(lambda rows: self.adapter.stem(self.rows.sample[rows]))
        exact_skips, skips = first_skips(parts, wanted), first_skips(parts, given)
        for i, part in enumerate(parts):
            names = self._layers(i, found)
            with quantized(self.adapter, plain):
                wanted = self._through(self._unit(i, part.enter(wanted, exact_skips), exact))
            part.leave(wanted, exact_skips)
            unit = self._unit(i, part.enter(given, skips), rounded, inside=self.naive)
            file, held = folder / f"part-{i:03}.safetensors", Scales()
            if file.is_file():
                held = _read(file)
            if names and not held:
                held = self._part(names, unit, wanted, seed=i)
                files.save(QParams(layers=held), file.with_suffix(".tmp"))
                file.with_suffix(".tmp").replace(file)
            with self._layered(held):
                given = self._through(unit)
            part.leave(given, skips)
            found |= held
            advance()
        return found

    def _layers(self, index: int, found: Scales) -> list[str]:
        """The layers of a part that are to be found, and those of the TIB that feed only it.

        The naive baseline optimizes embedding layers inside their blocks.
        """
        prefix = f"{self.adapter.parts[index].name}."
        names = [name for name in self.bits if name.startswith(prefix)]
        if not self.naive:
            return names
        ran: list[str] = []

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del args
            ran.extend(name for name, linear in temporal.items() if linear is module)

        temporal = self.adapter.temporal_linears()
        hooks = [linear.register_forward_pre_hook(hook) for linear in temporal.values()]
        self.adapter.temporal.part(index, self.rows.timesteps[:1], self.rows.labels[:1])
        for handle in hooks:
            handle.remove()
        return names + [name for name in ran if name in self.bits and name not in found]

    def _features(self, qparams: QParams) -> Tensor:
        """The temporal features of every row, (M, F), as the network takes them."""
        rows, found = self.rows, []
        with quantized(self.adapter, qparams):
            for t in rows.timesteps.unique_consecutive():
                labels, inverse = rows.labels[rows.timesteps == t].unique(return_inverse=True)
                found.append(self.adapter.temporal(t[None], labels)[0][inverse])
        return torch.cat(found)

    def _unit(self, index: int, given: Tensor, features: Tensor, *, inside: bool = False) -> Unit:
        """A part from its inputs and the features (M, F); `inside` it the TIB makes its own."""
        part = self.adapter.parts[index]

        def unit(rows: Tensor) -> Tensor:
            self.now = self.rows.bins[rows]
            if inside:
                t, y = self.rows.timesteps[rows], self.rows.labels[rows]
                own = self.adapter.temporal.part(index, t, y)
                taken = part.join(own, features, rows)
            else:
                taken = part.take(features, rows)
            found: Tensor = part.module(given[rows], taken)
            return found

        return unit

    def _through(self, unit: Unit) -> Tensor:
        """A unit's outputs for all rows."""
        rows = torch.arange(len(self.rows.sample))
        return torch.cat([unit(some) for some in rows.split(CHUNK)])

    @contextlib.contextmanager
    def _layered(self, scales: Scales) -> Iterator[Simulation]:
        """The balanced model with some layers quantized, which know the bins of the rows."""
        with quantized(self.adapter, QParams(balance=self.base.balance, layers=scales)) as found:
            for name, held in scales.items():
                if held.activation is not None and not name.startswith(TEMPORAL):
                    self._follow(found.layers[name], held.activation)
            yield found

    def _follow(self, layer: QuantizedLayer, scale: Tensor | Callable[[], Tensor]) -> None:
        """Let a layer round its input by the scale of each row's bin."""

        def rows() -> tuple[Tensor, None]:
            values = scale() if callable(scale) else scale
            return (values[self.now] if values.dim() else values[None]), None

        layer.rows, layer.folded, layer.scale = rows, False, torch.ones(())

    def _part(self, names: list[str], unit: Unit, wanted: Tensor, seed: int) -> Scales:
        """Reconstruct one part: roundings, then or together with them the input scales."""
        layers = self.adapter.layers() | self.adapter.temporal_linears()
        with quantized(self.adapter, QParams(balance=self.base.balance)):
            bits = {name: self.bits[name] for name in names}
            start = self.method.nearest(layers, bits, self.recipe.group)
            roundings = adaround.start(layers, start, self._grams(layers, names, unit))
        first = {name: replace(start[name], codes=r.hard()) for name, r in roundings.items()}
        scales = self._ranges(first, unit) if self.method.learn else {}
        learned = {name: nn.Parameter(scale.log()) for name, scale in scales.items()}
        with self._layered(start) as found:
            for name, parameter in learned.items():
                self._follow(found.layers[name], parameter.exp)
            adaround.reconstruct(
                unit,
                wanted,
                found.layers,
                roundings,
                learned,
                iterations=self.recipe.iterations,
                batch=BATCH,
                seed=self.recipe.seed + seed,
            )
        done = {name: replace(start[name], codes=r.hard()) for name, r in roundings.items()}
        if self.method.learn:
            scales = {name: self._all_bins(p.data.exp()) for name, p in learned.items()}
        else:
            scales = self._ranges(done, unit)
        return {
            name: replace(held, activation=scales[name]) if name in scales else held
            for name, held in done.items()
        }

    def _grams(self, layers: dict[str, Layer], names: list[str], unit: Unit) -> dict[str, Tensor]:
        """What error compensation knows of the inputs of these layers."""
        if self.recipe.init == "nearest":
            return {}
        with grams({name: layers[name] for name in names}) as found:
            self._through(unit)
        return found

    def _ranges(self, scales: Scales, unit: Unit) -> dict[str, Tensor]:
        """Input scales, () or (B,), of the denoiser's layers, measured with weights rounded."""
        observer = OBSERVERS[self.method.observer]
        names = [n for n in scales if self.bits[n].activation < 16 and not n.startswith(TEMPORAL)]
        measured: dict[str, list[float]] = {name: [] for name in names}
        states: dict[str, State] = {}
        with self._layered(scales) as simulation, contextlib.ExitStack() as hooks:
            for name in names:
                watch = functools.partial(_observe, states, observer, name)
                handle = simulation.layers[name].register_forward_pre_hook(watch)
                hooks.callback(handle.remove)
            for group in self._groups():
                states.update((name, {}) for name in names)
                for some in group.split(CHUNK):
                    unit(some)
                    states.update((name, observer.end_batch(states[name])) for name in names)
                for name in names:
                    wide = self.bits[name]
                    scale = self.method.input_scale(states[name], self.recipe.percentile, wide)
                    measured[name].append(scale)
        if self.recipe.fsc != "all":
            return {name: torch.tensor(of[0]) for name, of in measured.items()}
        found, held = {}, self.rows.bins.unique()
        for name, of in measured.items():
            found[name] = torch.ones(int(self.base.edges.numel()) + 1)
            found[name][held] = torch.tensor(of)
        return {name: self._all_bins(scale) for name, scale in found.items()}

    def _all_bins(self, scale: Tensor) -> Tensor:
        """A bin without rows, as of a reuse step, has the scale of the step before it."""
        if not scale.dim():
            return scale
        held = self.rows.bins.unique()  # ascending in the timestep, so the next one is earlier
        of = torch.searchsorted(held, torch.arange(len(scale))).clamp(max=len(held) - 1)
        return scale[held[of]]

    def _groups(self) -> list[Tensor]:
        """The rows whose inputs share one scale: those of each bin, or all of them, shuffled."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        order = torch.randperm(len(self.rows.bins), generator=generator)
        if self.recipe.fsc != "all":
            return [order]
        return [order[self.rows.bins[order] == b] for b in self.rows.bins.unique()]


def _read(file: Path) -> Scales:
    """What an interrupted run found of a part; nothing where it cannot be read."""
    try:
        return files.load(file).layers
    except BundleError as err:
        say(f"reconstructing: making a part again, what was left of it is unreadable ({err})")
        return {}


def _observe(
    states: dict[str, State],
    observer: Observer,
    name: str,
    module: nn.Module,
    args: tuple[Tensor, ...],
) -> None:
    del module
    states[name] = observer.observe(states[name], args[0])
