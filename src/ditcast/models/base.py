"""What every model family gives to calibration and export."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ditcast.errors import ConfigError
from ditcast.manifest import FORMAT_VERSION, Manifest, ModelInfo
from ditcast.recipe import Recipe

Layer = nn.Linear | nn.Conv2d
ALL = slice(None)  # rows


class Part(NamedTuple):
    """One piece of the network in order: `module(h, part.take(features)) -> h`.

    The module's layers are the denoiser's under `name`, such as `blocks.3`. Its own features,
    `columns`, are `vectors` of equal length, such as a block's six modulations; none where it has
    no features. Those that it has in common with other parts, `shared`, such as a caption, lie
    behind the columns of all parts. A U-Net's parts leave their outputs on a stack of skips, and
    take them from there.
    """

    name: str
    module: nn.Module
    columns: slice
    vectors: int
    takes_skip: bool = False
    leaves_skip: bool = False
    shared: slice | None = None

    def take(self, features: Tensor, rows: Tensor | slice = ALL) -> Tensor:
        """What the module takes of some rows of the features (N, F) of the whole network."""
        return self.join(features[rows, self.columns], features, rows)

    def join(self, own: Tensor, features: Tensor, rows: Tensor | slice = ALL) -> Tensor:
        """The part's own features of these rows, and behind them those that it shares."""
        return own if self.shared is None else torch.cat([own, features[rows, self.shared]], dim=1)

    def enter(self, h: Tensor, skips: list[Tensor]) -> Tensor:
        """The part's input: the stream, and if it takes one, the newest skip as more channels."""
        return torch.cat([h, skips.pop()], dim=1) if self.takes_skip else h

    def leave(self, h: Tensor, skips: list[Tensor]) -> None:
        """Keep the part's output for a later part, if it leaves one."""
        if self.leaves_skip:
            skips.append(h)


def first_skips(parts: tuple[Part, ...], h: Tensor) -> list[Tensor]:
    """The stack of skips behind the stem, whose output is the first; empty without skips."""
    return [h] if any(part.takes_skip for part in parts) else []


def run_parts(parts: tuple[Part, ...], h: Tensor, features: Tensor, skips: list[Tensor]) -> Tensor:
    """Parts one after the other, with the features (N, F) of the whole network."""
    for part in parts:
        h = part.module(part.enter(h, skips), part.take(features))
        part.leave(h, skips)
    return h


def features_size(parts: tuple[Part, ...]) -> int:
    """F: the columns of all parts, and those that they share."""
    ends: list[int] = [(part.shared or part.columns).stop for part in parts]
    return max(ends)


def vector_slices(parts: tuple[Part, ...]) -> list[slice]:
    """The columns of every vector of the features, in order."""
    found = []
    for part in filter(lambda part: part.vectors, parts):
        width = (part.columns.stop - part.columns.start) // part.vectors
        starts = range(part.columns.start, part.columns.stop, width)
        found += [slice(start, start + width) for start in starts]
    return found


def check_names(named: int | None, *expected: int) -> None:
    """Refuse a `classes.json` that does not name the classes; `named` is None where there is none.

    Raises:
        ConfigError: another number of names.
    """
    if named is not None and named not in expected:
        raise ConfigError(
            f"model: classes.json has {named} names, expected "
            f"{' or '.join(map(str, expected))}, one per class"
        )


def frequencies(time_proj: Any) -> Tensor:
    """Those of a diffusers `Timesteps`, computed as there but once: no runtime has to repeat it."""
    half = time_proj.num_channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
    return torch.exp(exponent / (half - time_proj.downscale_freq_shift))


def sinusoid(timesteps: Tensor, frequencies: Tensor, *, cosine_first: bool = True) -> Tensor:
    """The waves of timesteps (T,) at H frequencies, cosines and sines: (T, 2 H)."""
    angles = timesteps[:, None] * frequencies[None]
    waves = [torch.sin(angles), torch.cos(angles)]
    return torch.cat(waves[::-1] if cosine_first else waves, dim=-1)


def linears_of(module: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """All Linears of a module by name, behind a prefix."""
    return {f"{prefix}{n}": m for n, m in module.named_modules() if isinstance(m, nn.Linear)}


class Modulated(NamedTuple):
    """Where in F the rows lie that make a Linear's input: `norm * (1 + scale) + shift`."""

    shift: int
    scale: int
    width: int


class Temporal(nn.Module):
    """What gives the temporal features: (timesteps [T] float32, class_labels [U]) -> [T,U,F].

    `shared` gives those that parts share and no timestep moves: class_labels [U] -> [U,...]. Where
    the parts' own features are not `by_label`, they are equal for all labels.
    """

    by_label = True

    def __init__(self, shared: nn.Module | None = None) -> None:
        """`shared` is None where every feature is some part's own."""
        super().__init__()
        self.shared = shared

    def forward(self, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """The features of all pairs of a timestep (T,) and a label (U,)."""
        return self.complete(self.own(timesteps, class_labels), class_labels)

    def complete(self, own: Tensor, class_labels: Tensor) -> Tensor:
        """The parts' own features (T, U, ...), and behind them those that they share."""
        if self.shared is None:
            return own
        behind = self.shared(class_labels)[None].expand(own.shape[0], -1, -1)
        return torch.cat([own, behind], dim=-1)

    def own(self, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """The features of all parts, without those that they share: (T,), (U,) -> (T, U, ...)."""
        raise NotImplementedError

    def part(self, index: int, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """The own features of one part of the network for N pairs, (N,) and (N,)."""
        raise NotImplementedError


class Adapter(Protocol):
    """One model family, split at the timestep: temporal features, full step, reuse step.

    Shapes: N rows (conditional and null), T timesteps, U distinct conditions, F features.
    """

    architecture: str
    captioned: bool  # whether its labels are captions, of a file beside the model
    sample_shape: tuple[int, int, int]
    output_channels: int
    num_classes: int
    null_label: int | None  # the label of no condition; None where there can be no guidance
    slots: tuple[str, ...]  # in network order, such as `blocks.0.attn`
    temporal: Temporal
    slot_shape: tuple[int, ...]  # of a slot's output: tokens and width (S, D), or (C, H, W)
    # (sample [N,C,H,W], features [N,F], ahead [R,N,F], weights [R,slots])
    # -> (output [N,C',H,W], forecast [R,N,*slot_shape])
    denoiser: nn.Module
    steps: dict[str, nn.Module]  # step graphs by name, those of `cache.stepping.GRAPHS` it has
    stem: nn.Module  # sample -> h, what the first part takes
    parts: tuple[Part, ...]  # after the stem, in network order
    shallow: tuple[str, ...]  # the names of those that a reuse step runs

    @staticmethod
    def check(config: Mapping[str, Any]) -> None:
        """Refuse a diffusers config of this family that the adapter cannot take apart.

        Raises:
            UnsupportedError: naming the key.
        """
        ...

    def layers(self) -> dict[str, Layer]:
        """The denoiser's layers by name, in network order: what can be quantized."""
        ...

    def positions(self) -> dict[str, int]:
        """How many rows of each of these layers' products one sample makes: tokens, or pixels."""
        ...

    def temporal_linears(self) -> dict[str, nn.Linear]:
        """The Linears of the TIB by layer name, which starts with `temporal.`."""
        ...

    def modulated(self) -> dict[str, Modulated]:
        """The Linears whose input a factor can be folded into through the features."""
        ...

    def chained(self) -> dict[str, tuple[str, int]]:
        """Linears whose inputs are, channel by channel, linear in outputs of another one.

        Maps a layer to that one and to the first of those outputs.
        """
        ...


def is_near(adapter: Adapter, graph: str) -> bool:
    """Whether a step graph's last output lies behind the first layers only."""
    if graph == "full":
        return adapter.slots[0].startswith(f"{adapter.parts[0].name}.")
    return graph == "temporal" or (graph == "reuse" and len(adapter.shallow) == 1)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model from disk, or a random one, with what its pipeline folder says of it.

    `source` is what it was loaded by, `scheduler` the diffusers config of its noise schedule, and
    `fingerprint` the hash of its config and weights; `classes` is empty without `classes.json`.
    """

    source: str
    adapter: Adapter
    scheduler: dict[str, Any]
    classes: tuple[str, ...]
    fingerprint: str

    def features_size(self) -> int:
        """F, the number of temporal features."""
        return features_size(self.adapter.parts)


def describe(model: LoadedModel, recipe: Recipe) -> Manifest:
    """The manifest of a bundle that is about to be made of a model."""
    adapter = model.adapter
    packages = ("ditcast", "torch", "diffusers", "onnx", "onnx-graphsurgeon", "onnxruntime")
    return Manifest(
        format_version=FORMAT_VERSION,
        producer={name: importlib.metadata.version(name) for name in packages},
        recipe=recipe,
        model=ModelInfo(
            source=model.source,
            architecture=adapter.architecture,
            fingerprint=model.fingerprint,
            sample_shape=adapter.sample_shape,
            output_channels=adapter.output_channels,
            classes=model.classes,
            num_classes=adapter.num_classes,
            null_label=adapter.null_label,
            slots=adapter.slots,
            slot_shape=adapter.slot_shape,
            features=model.features_size(),
            parameters=count(adapter.temporal, adapter.denoiser),
            temporal_parameters=count(adapter.temporal),
        ),
        schedule=model.scheduler,
    )


def count(*modules: nn.Module) -> int:
    """Number of distinct parameters."""
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())
