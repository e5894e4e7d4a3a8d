"""The scales of a quantized denoiser, and the simulation of what they do."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ditcast import tensors
from ditcast.calibrate.ranges import fake_quantize, weight_codes
from ditcast.errors import ConfigError
from ditcast.recipe import Rule


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerScales:
    """One quantized Linear: `activation` per tensor, `weight` (O,) per output channel.

    `bits` are those of its weight; activations have 8.
    """

    activation: float
    weight: Tensor
    bits: int


QParams = dict[str, LayerScales]


def select(names: Sequence[str], rules: Sequence[Rule]) -> dict[str, str]:
    """The precision of every layer: the first rule that matches decides.

    Raises:
        ConfigError: a rule that decides no layer, or a layer that no rule matches.
    """
    precision: dict[str, str] = {}
    used: set[int] = set()
    for name in names:
        for i, rule in enumerate(rules):
            if fnmatch.fnmatchcase(name, rule.pattern):
                precision[name] = rule.precision
                used.add(i)
                break
        else:
            raise ConfigError(
                f"rules: no rule matches layer {name!r}; end the rules with one for '*'"
            )
    for i, rule in enumerate(rules):
        if i not in used:
            raise ConfigError(
                f"rules: {rule.pattern!r} decides no layer (misspelt, or an earlier rule takes "
                f"its layers); the layers are {_summary(names)}"
            )
    return precision


def _summary(names: Sequence[str]) -> str:
    """The first block's layers and the rest, so that the line stays readable."""
    first = [name for name in names if not name.startswith("blocks.") or ".0." in name]
    return ", ".join(first)


def save(qparams: QParams, path: Path) -> None:
    """Write the scales as safetensors; equal scales give equal bytes."""
    found = {}
    for name, scales in qparams.items():
        found[f"{name}.activation_scale"] = np.array(scales.activation, np.float32)
        found[f"{name}.weight_scale"] = scales.weight.numpy()
        found[f"{name}.weight_bits"] = np.array(scales.bits, np.int32)
    tensors.save(found, path)


def load(path: Path) -> QParams:
    """Read what `save` wrote."""
    found, _ = tensors.load(path)
    names = [key.removesuffix(".weight_scale") for key in found if key.endswith(".weight_scale")]
    return {
        name: LayerScales(
            activation=float(found[f"{name}.activation_scale"]),
            weight=torch.from_numpy(found[f"{name}.weight_scale"]),
            bits=int(found[f"{name}.weight_bits"]),
        )
        for name in names
    }


@contextlib.contextmanager
def quantized(linears: dict[str, nn.Linear], qparams: QParams) -> Iterator[None]:
    """While active, the named Linears compute with fake-quantized inputs and weights.

    This is the torch simulation of the exported integer graph: the same codes, multiplied in
    float. Weights are put back at exit.
    """
    originals: list[tuple[nn.Linear, Tensor]] = []
    hooks = []
    try:
        for name, scales in qparams.items():
            linear = linears[name]
            originals.append((linear, linear.weight.data))
            codes = weight_codes(linear.weight.data, scales.weight, scales.bits)
            linear.weight.data = codes * scales.weight[:, None]

            def round_input(
                module: nn.Module, args: tuple[Tensor, ...], scale: float = scales.activation
            ) -> tuple[Tensor, ...]:
                del module
                return (fake_quantize(args[0], scale),)

            hooks.append(linear.register_forward_pre_hook(round_input))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for linear, weight in originals:
            linear.weight.data = weight
