"""The quantized model in torch: what is calibrated, compared with, and traced for export."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ditcast.calibrate.codes import fake_quantize
from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.qparams import QParams, StoredFeatures
from ditcast.models import Adapter
from ditcast.models.base import Layer, Temporal, features_size, vector_slices
from ditcast.recipe import TEMPORAL


class StepScales:
    """The scales of the step at hand, for the layers that have one per bin of timesteps.

    The TIB learns its bin from its timesteps; the denoiser's layers read their scales in the
    columns of the features that lie behind the model's own.
    """

    def __init__(self, qparams: QParams) -> None:
        """`names` are the denoiser's stepwise layers, in the order of their columns."""
        self.layers, self.edges = qparams.layers, qparams.edges
        self.names = [
            name
            for name, layer in qparams.layers.items()
            if layer.stepwise and not name.startswith(TEMPORAL)
        ]
        self.bins = torch.zeros(0)
        self.columns = torch.zeros(0)

    def find(self, timesteps: Tensor) -> Tensor:
        """The bin (T,) of each timestep."""
        self.bins = (timesteps[:, None] >= self.edges).sum(dim=1)
        return self.bins

    def table(self) -> Tensor:
        """Scales of the denoiser's stepwise layers, (B, layers)."""
        scales = [self.layers[name].activation for name in self.names]
        return torch.stack([scale for scale in scales if scale is not None], dim=1)

    def rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of every row at hand."""
        layer = self.layers[name]
        if name in self.names:
            return self.columns[:, self.names.index(name)], None
        assert layer.activation is not None
        zero = layer.zero_point
        return layer.activation[self.bins], None if zero is None else zero[self.bins]


class StoredModule(nn.Module):
    """Cache-based maintenance: the parts' own features of stored timesteps and labels, from codes.

    A timestep or label that is not stored makes the index run over its end, an error in torch
    and in every runtime, never another one's features. Without `by_label` one label's are those of
    all.
    """

    def __init__(self, stored: StoredFeatures, vector_of: Tensor, *, by_label: bool) -> None:
        """`vector_of` is the vector that each of these features belongs to."""
        super().__init__()
        self.stored, self.vector_of, self.by_label = stored, vector_of, by_label

    def forward(self, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """(T,) and (U,) -> (T, U, ...)."""
        held = self.stored
        step, label = _position(held.timesteps, timesteps), torch.zeros_like(class_labels)
        if self.by_label:
            label = _position(held.labels, class_labels)

        def take(values: Tensor) -> Tensor:
            return values.index_select(0, step).index_select(1, label)

        scale, zero = (take(t)[..., self.vector_of] for t in (held.scale, held.zero_point))
        return (take(held.codes).float() - zero) * scale


def _position(held: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted value lies in `held`, over its end where it does not."""
    same = held[None] == wanted[:, None]
    return torch.where(same.any(dim=1), same.int().argmax(dim=1), len(held))


def _owners(columns: list[slice]) -> Tensor:
    """For each feature that lies in some of these columns, in order, in which of them."""
    widths = torch.tensor([c.stop - c.start for c in columns])
    return torch.arange(len(columns)).repeat_interleave(widths)


class QuantizedFeatures(Temporal):
    """The temporal features that the quantized network takes: (T,), (U,) -> (T, U, F + layers).

    They come from the TIB, from the store, or from either of them per (step, part). Factors of
    the inputs of modulated layers (channel balancing, division by the step's scale) are folded
    into their rows; behind them come the scales of the denoiser's stepwise layers.
    """

    def __init__(self, adapter: Adapter, qparams: QParams, steps: StepScales) -> None:
        """Around the TIB of `adapter`, in which quantized layers may have taken their places."""
        super().__init__(adapter.temporal.shared)
        stored = qparams.stored
        self.adapter, self.steps, self.qparams = adapter, steps, qparams
        self.part_of = _owners([part.columns for part in adapter.parts])
        self.vector_of = _owners(vector_slices(adapter.parts))
        self.by_label, self.stored = adapter.temporal.by_label, None
        if stored is not None:
            self.stored = StoredModule(stored, self.vector_of, by_label=self.by_label)
        if stored is None or stored.module is not None:
            self.temporal: Temporal = adapter.temporal
        self.factors = _Factors(adapter, qparams, steps)

    def forward(self, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Features of all pairs of a timestep (T,) and a label (U,)."""
        own = self.own(timesteps, class_labels)
        found: Tensor = self.factors(self.complete(own, class_labels), self.steps.bins)
        return found

    def own(self, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Those of all parts, as the TIB or the store gives them; the bins of the timesteps."""
        bins, stored = self.steps.find(timesteps), self.qparams.stored
        if self.stored is None:
            features = self._module(timesteps, class_labels, bins)
        else:
            features = self.stored(timesteps, class_labels)
            if stored is not None and stored.module is not None:
                step = _position(stored.timesteps, timesteps)
                chosen = stored.module.index_select(0, step)[:, self.part_of]
                module = self._module(timesteps, class_labels, bins)
                features = torch.where(chosen[:, None], module, features)
        return features

    def part(self, index: int, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """A part's own features for pairs (N,) and (N,), balanced, but with no step scales."""
        features = self.temporal.part(index, timesteps, class_labels)
        columns = self.adapter.parts[index].columns
        return self.factors.balanced(features, columns)

    def _module(self, timesteps: Tensor, class_labels: Tensor, bins: Tensor) -> Tensor:
        """What the TIB computes, rounded at its outputs where it is quantized."""
        features = self.temporal.own(timesteps, class_labels)
        if self.qparams.outputs is None:
            return features
        scale, zero, bits = self.qparams.outputs
        scale, zero = (t[bins][:, None, self.vector_of] for t in (scale, zero))
        return fake_quantize(features, scale, zero, bits)


class _Factors(nn.Module):
    """Factors folded into the rows of modulated layers, and the scales behind all rows."""

    def __init__(self, adapter: Adapter, qparams: QParams, steps: StepScales) -> None:
        super().__init__()
        features = features_size(adapter.parts)
        gain, is_scale = torch.ones(features), torch.zeros(features)
        source = torch.full((features,), len(steps.names))  # a column of ones
        self.any = False
        for name, rows in adapter.modulated().items():
            shift = slice(rows.shift, rows.shift + rows.width)
            scale = slice(rows.scale, rows.scale + rows.width)
            is_scale[scale] = 1
            if name in qparams.balance:
                gain[shift] = gain[scale] = qparams.balance[name]
                self.any = True
            if name in steps.names:
                source[shift] = source[scale] = steps.names.index(name)
        self.table = steps.table() if steps.names else None
        self.gain, self.is_scale, self.source = gain, is_scale, source

    def forward(self, features: Tensor, bins: Tensor) -> Tensor:
        """(T, U, F) -> (T, U, F + layers)."""
        if self.table is None and not self.any:
            return features
        if self.table is None:
            return self.balanced(features, slice(None))
        scales = self.table[bins]
        divisors = torch.cat([scales, torch.ones_like(scales[:, :1])], dim=1)
        rows = self._times(features, (self.gain / divisors[:, self.source])[:, None], slice(None))
        return torch.cat([rows, scales[:, None].expand(-1, features.shape[1], -1)], dim=-1)

    def balanced(self, features: Tensor, columns: slice) -> Tensor:
        """Some columns of the features, with the factors of channel balancing alone."""
        if not self.any:
            return features
        return self._times(features, self.gain[columns], columns)

    def _times(self, features: Tensor, gain: Tensor, columns: slice) -> Tensor:
        """Norm * (1 + scale) + shift becomes `gain` times as much."""
        return features * gain + (gain - 1) * self.is_scale[columns]


class Simulation(NamedTuple):
    """The quantized layers by name, and those, balanced, that they stand for."""

    layers: dict[str, QuantizedLayer]
    originals: dict[str, Layer]

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """While active, no layer rounds its input."""
        for layer in self.layers.values():
            layer.exact = True
        yield
        for layer in self.layers.values():
            layer.exact = False


@contextlib.contextmanager
def quantized(adapter: Adapter, qparams: QParams) -> Iterator[Simulation]:
    """While active, the adapter is the quantized model; everything is put back at exit.

    This is the torch simulation of the exported integer graph, and what export traces.
    """
    steps = StepScales(qparams)
    found = Simulation({}, {**adapter.layers(), **adapter.temporal_linears()})
    with contextlib.ExitStack() as stack:
        _balance(stack, adapter, qparams.balance)
        stack.callback(setattr, adapter, "temporal", adapter.temporal)
        adapter.temporal = features = QuantizedFeatures(adapter, qparams, steps).eval()
        for name, scales in qparams.layers.items():
            rows = functools.partial(steps.rows, name) if scales.stepwise else None
            folded = scales.stepwise and name in adapter.modulated()
            layer = QuantizedLayer(found.originals[name], scales, rows, folded).eval()
            root = features if name.startswith(TEMPORAL) else adapter.denoiser
            path, _, attribute = name.rpartition(".")
            parent = root.get_submodule(path)
            stack.callback(setattr, parent, attribute, getattr(parent, attribute))
            setattr(parent, attribute, layer)
            found.layers[name] = layer
        end = features_size(adapter.parts)

        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            steps.columns = args[1][:, end:]

        for module in adapter.steps.values():
            stack.callback(module.register_forward_pre_hook(read).remove)
        yield found


def _balance(stack: contextlib.ExitStack, adapter: Adapter, balance: dict[str, Tensor]) -> None:
    """Divide the input channels of weights, and multiply the outputs of what makes them.

    What makes them is a Linear here; for modulated layers it is the temporal features.
    """
    layers, chained = adapter.layers(), adapter.chained()
    makers = [chained[name][0] for name in balance if name in chained]
    parameters = [p for name in [*balance, *makers] for p in layers[name].parameters()]
    for parameter in {id(p): p for p in parameters}.values():
        stack.callback(setattr, parameter, "data", parameter.data)
        parameter.data = parameter.data.clone()
    for name, factor in balance.items():
        layers[name].weight.data /= factor
        if name in chained:
            source, first = chained[name]
            made = slice(first, first + len(factor))
            layers[source].weight.data[made] *= factor[:, None]
            bias = layers[source].bias
            if bias is not None:
                bias.data[made] *= factor
