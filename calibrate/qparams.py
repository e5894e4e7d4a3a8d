"""What calibration found: scales, codes, factors and stored features, in one file."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.calibrate.codes import grouped, to_e4m3, weight_codes
from ditcast.errors import ConfigError
from ditcast.recipe import Bits, Rule


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerScales:
    """One quantized Linear (O, I), or Conv2d with its window flattened: I = C * kh * kw.

    Its codes are integers, or with `bits.e4m3` numbers of float8 e4m3, to the nearest.

    `weight` is (O,) per output channel, or (O, G) per group of inputs. `codes` (O, I) int8 are
    the weight's where they were learned; None is to the nearest. `activation` is the
    input's scale, () or one per bin (B,); `zero_point` its codes of zero, in the signed range;
    both are None where the input stays in float. `peak` (T,) is the largest magnitude of the
    input at each of the recipe's steps, noisiest first, 0 where the layer did not run: for the
    report, nothing is computed with it.
    """

    bits: Bits
    weight: Tensor
    codes: Tensor | None = None
    activation: Tensor | None = None
    zero_point: Tensor | None = None
    peak: Tensor | None = None

    def weight_codes(self, weight: Tensor) -> Tensor:
        """The codes (O, I) of the layer's weight, as float32."""
        if self.codes is not None:
            return self.codes.float()
        if self.bits.e4m3:
            return to_e4m3(weight.reshape(len(weight), -1) / grouped(weight, self.weight))
        return weight_codes(weight, self.weight, self.bits.weight)

    @property
    def stepwise(self) -> bool:
        """Whether the input has one scale per bin of timesteps."""
        return self.activation is not None and self.activation.dim() > 0


class OutputScales(NamedTuple):
    """Of the TIB's outputs: scale and zero point (B, V) per bin and vector, and their bits."""

    scale: Tensor
    zero_point: Tensor
    bits: int


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredFeatures:
    """Temporal features of T timesteps and L labels as codes: cache-based maintenance.

    `codes` (T, L, F) are int8, or int16 where activations are float; `scale` and `zero_point`
    (T, L, V) hold one pair per (step, label, vector). `module` (T, P) says where the quantized
    TIB is used instead (disturbance-aware selection); None where it is nowhere.
    """

    timesteps: Tensor
    labels: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    module: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class QParams:
    """Everything that the quantized model is made of, besides the model.

    `edges` (B - 1,) are the ascending bounds of the bins over the timestep. `balance` maps a
    layer to the factors (I,) of its input, by which its weight is divided.
    """

    layers: dict[str, LayerScales] = field(default_factory=dict)
    edges: Tensor = field(default_factory=lambda: torch.zeros(0))
    balance: dict[str, Tensor] = field(default_factory=dict)
    outputs: OutputScales | None = None
    stored: StoredFeatures | None = None

    def __bool__(self) -> bool:
        """Whether anything is quantized."""
        return bool(self.layers) or self.stored is not None


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
    numbers = {name: [part for part in name.split(".") if part.isdecimal()] for name in names}
    return ", ".join(name for name in names if set(numbers[name]) <= {"0"})


# Sections of the file are `layers|NAME|field`, `balance|NAME`, `outputs|field`, `stored|field`.
_LAYER = ("weight", "activation", "zero_point", "peak")
_STORED = ("timesteps", "labels", "codes", "scale", "zero_point", "module")


def save(qparams: QParams, path: Path) -> None:
    """Write as safetensors; equal values give equal bytes."""
    found: dict[str, Any] = {"edges": qparams.edges.numpy()}
    for name, layer in qparams.layers.items():
        found[f"layers|{name}|bits"] = np.array(layer.bits, np.int32)
        if layer.codes is not None:
            found[f"layers|{name}|codes"] = _packed(layer.codes.numpy(), layer.bits.weight)
            found[f"layers|{name}|inputs"] = np.array(layer.codes.shape[1], np.int32)
        for key in _LAYER:
            if getattr(layer, key) is not None:
                found[f"layers|{name}|{key}"] = getattr(layer, key).numpy()
    for name, factor in qparams.balance.items():
        found[f"balance|{name}"] = factor.numpy()
    if qparams.outputs is not None:
        found["outputs|scale"] = qparams.outputs.scale.numpy()
        found["outputs|zero_point"] = qparams.outputs.zero_point.numpy()
        found["outputs|bits"] = np.array(qparams.outputs.bits, np.int32)
    if qparams.stored is not None:
        for key in _STORED:
            if getattr(qparams.stored, key) is not None:
                found[f"stored|{key}"] = getattr(qparams.stored, key).numpy()
    tensors.save({key: np.array(value, order="C") for key, value in found.items()}, path)


def load(path: Path) -> QParams:
    """Read what `save` wrote."""
    arrays, _ = tensors.load(path)
    found = {key: torch.from_numpy(array) for key, array in arrays.items()}
    names = [key.split("|")[1] for key in found if key.endswith("|weight")]
    stored = {key: found.get(f"stored|{key}") for key in _STORED}
    outputs = [found[key] for key in ("outputs|scale", "outputs|zero_point") if key in found]
    return QParams(
        layers={name: _layer(found, f"layers|{name}|") for name in names},
        edges=found["edges"],
        balance={key.split("|")[1]: t for key, t in found.items() if key.startswith("balance|")},
        outputs=OutputScales(outputs[0], outputs[1], int(found["outputs|bits"]))
        if outputs
        else None,
        stored=StoredFeatures(**stored) if stored["codes"] is not None else None,  # type: ignore[arg-type]
    )


def of_bundle(bundle: Bundle) -> QParams:
    """What a calibrated bundle holds; nothing where it was not quantized.

    Raises:
        BundleError: the file is damaged.
    """
    section = bundle.manifest.quantization
    if section is None:
        return QParams()
    bundle.check(section.file)
    return load(bundle.file(section.file))


def _layer(found: dict[str, Tensor], prefix: str) -> LayerScales:
    weight_bits, input_bits, *e4m3 = found[f"{prefix}bits"].tolist()
    bits, codes = Bits(weight_bits, input_bits, any(e4m3)), found.get(f"{prefix}codes")
    if codes is not None:
        inputs = int(found[f"{prefix}inputs"])
        codes = torch.from_numpy(_unpacked(codes.numpy(), bits.weight, inputs))
    weight, activation, zero_point, peak = (found.get(prefix + key) for key in _LAYER)
    assert weight is not None
    return LayerScales(
        bits=bits,
        weight=weight,
        codes=codes,
        activation=activation,
        zero_point=zero_point,
        peak=peak,
    )


def _packed(codes: NDArray[np.int8], bits: int) -> NDArray[np.int8]:
    """Two codes of 4 bits to a byte, the second one above the first."""
    if bits > 4:
        return codes
    pairs = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return (pairs[:, ::2] & 15) | (pairs[:, 1::2] << 4)


def _unpacked(packed: NDArray[np.int8], bits: int, inputs: int) -> NDArray[np.int8]:
    if bits > 4:
        return packed
    pairs = np.stack([packed << 4 >> 4, packed >> 4], axis=-1)
    return pairs.reshape(len(packed), -1)[:, :inputs]
