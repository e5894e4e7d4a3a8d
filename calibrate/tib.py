"""The TIB quantized: TIAR and FSC (TFMQ-DM, Huang et al. 2024, arXiv 2311.16503).

The Temporal Information Block is reconstructed as one unit from timesteps and labels alone
(TIAR), and its activations have one range per timestep (FSC). A class-conditional TIB depends
on pairs (timestep, label), of which both see a sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ditcast.calibrate.adaround import reconstruct, start
from ditcast.calibrate.codes import affine
from ditcast.calibrate.gptq import grams
from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.qparams import LayerScales, OutputScales, QParams
from ditcast.calibrate.simulate import quantized
from ditcast.models import Adapter
from ditcast.models.base import features_size, vector_slices
from ditcast.sampling import with_null

TARGET_BYTES = 1 << 29  # of the features that reconstruction compares with
LABELS = 64  # that the TIB is calibrated on at most, besides the null label
BATCH = 32  # pairs of a timestep and a label
OUTPUTS = "outputs"

Scales = dict[str, LayerScales]


def draw_labels(adapter: Adapter, timesteps: Tensor, seed: int) -> Tensor:
    """The labels (L,) that the TIB is calibrated on, null among them if there is one, sorted."""
    features, classes = features_size(adapter.parts), adapter.num_classes
    affordable = TARGET_BYTES // (4 * features * len(timesteps)) - 1
    count = max(1, min(classes, LABELS, affordable))
    drawn = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.tensor(with_null(drawn.tolist(), adapter.null_label)).sort().values


def tiar(
    adapter: Adapter,
    scales: Scales,
    timesteps: Tensor,
    labels: Tensor,
    *,
    init: str,
    iterations: int,
    seed: int,
    advance: Callable[[], None],
) -> Scales:
    """Temporal information aware reconstruction: the sum over outputs of ||e - e_q||^2."""
    linears = adapter.temporal_linears()
    with grams({name: linears[name] for name in scales if init == "gptq"}) as found:
        targets = torch.cat([adapter.temporal.own(t[None], labels)[0] for t in timesteps])
    roundings = start(linears, scales, found)

    def forward(rows: Tensor) -> Tensor:
        t, y = timesteps[rows // len(labels)], labels[rows % len(labels)]
        parts = [adapter.temporal.part(i, t, y) for i in range(len(adapter.parts))]
        return torch.cat(parts, dim=-1)

    with rounded(adapter, scales) as layers:
        reconstruct(
            forward,
            targets,
            layers,
            roundings,
            {},
            iterations=iterations,
            batch=BATCH,
            seed=seed,
            advance=advance,
        )
    return {name: replace(scales[name], codes=r.hard()) for name, r in roundings.items()}


def ranges(
    adapter: Adapter, scales: Scales, bins: list[Tensor], labels: Tensor
) -> tuple[Scales, OutputScales | None]:
    """Ranges of the inputs of the TIB's Linears and of its outputs, by minimum and maximum.

    `bins` are the timesteps of each bin, ascending: one bin holds all of them, or each has its
    own (finite set calibration). They are measured with the weights rounded, and so are the peaks
    of the inputs at each timestep. Outputs have the bits of the narrowest input; None where all
    inputs stay in float. The papers' figures round them, the released code does not: recipe key
    `tib_outputs`.
    """
    bits = {name: held.bits.activation for name, held in scales.items()}
    bits[OUTPUTS] = min(bits.values(), default=16)
    if bits[OUTPUTS] == 16:
        return scales, None
    ranges, sizes = _of_timesteps(adapter, scales, torch.cat(bins), labels), list(map(len, bins))
    pairs, peaks = {}, {}
    for name, (low, high) in ranges.items():
        lows = torch.stack([values.amin(dim=0) for values in low.split(sizes)])
        highs = torch.stack([values.amax(dim=0) for values in high.split(sizes)])
        pairs[name] = affine(lows, highs, bits[name])
        peaks[name] = torch.maximum(-low, high).flip(0)  # noisiest first
    measured = {
        name: replace(held, activation=pairs[name][0], zero_point=pairs[name][1], peak=peaks[name])
        if bits[name] < 16
        else held
        for name, held in scales.items()
    }
    return measured, OutputScales(pairs[OUTPUTS][0], pairs[OUTPUTS][1], bits[OUTPUTS])


def _of_timesteps(
    adapter: Adapter, scales: Scales, timesteps: Tensor, labels: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Minimum and maximum (T,) of the inputs at each timestep, and (T, V) of the outputs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in [*scales, OUTPUTS]}
    with rounded(adapter, scales) as layers:
        for t in timesteps:
            now: dict[str, list[Tensor]] = {name: [] for name in scales}
            with _watching(layers, now):
                features = adapter.temporal.own(t[None], labels)[0]
            vectors = [_range(features[:, c]) for c in vector_slices(adapter.parts)]
            now[OUTPUTS] = [torch.stack(vectors, dim=-1)]  # (2, V)
            for name, found in now.items():
                low, high = torch.stack(found).unbind(dim=1)
                seen[name].append(torch.stack([low.amin(dim=0), high.amax(dim=0)]))
    pairs = {name: torch.stack(of).unbind(dim=1) for name, of in seen.items()}
    return {name: (low, high) for name, (low, high) in pairs.items()}


def _range(x: Tensor) -> Tensor:
    return torch.stack([x.min(), x.max()])


@contextlib.contextmanager
def _watching(layers: Mapping[str, nn.Module], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """While active, the range of every input of the layers is kept."""

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            seen[name].append(_range(args[0]))

        return layers[name].register_forward_pre_hook(hook)

    hooks = [watch(name) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def rounded(adapter: Adapter, scales: Scales) -> Iterator[dict[str, QuantizedLayer]]:
    """While active, the TIB's weights are rounded and its activations are float."""
    alone = {n: replace(held, activation=None, zero_point=None) for n, held in scales.items()}
    with quantized(adapter, QParams(layers=alone)) as simulation:
        yield simulation.layers
