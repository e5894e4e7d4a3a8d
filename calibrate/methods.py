"""Post-training quantization methods, one line each in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ditcast.calibrate.codes import SMALLEST, e4m3_scale, weight_scale
from ditcast.calibrate.qparams import LayerScales
from ditcast.calibrate.ranges import OBSERVERS, State
from ditcast.models.base import Layer
from ditcast.recipe import Bits


class Method(NamedTuple):
    """How one method finds its scales and roundings.

    `observer` estimates the ranges of inputs, `search` looks for weight scales instead of taking
    the largest magnitude, `reconstruct` learns roundings block by block, and `learn` then
    learns the input scales beside them.
    """

    observer: str
    search: bool = False
    reconstruct: bool = False
    learn: bool = False

    def nearest(
        self, layers: Mapping[str, Layer], bits: Mapping[str, Bits], group: int
    ) -> dict[str, LayerScales]:
        """The layers of `bits` with weights rounded to the nearest and inputs still in float."""
        return {
            name: LayerScales(
                bits=wide,
                weight=e4m3_scale(layers[name].weight.data)
                if wide.e4m3
                else weight_scale(
                    layers[name].weight.data, search=self.search, bits=wide.weight, group=group
                ),
            )
            for name, wide in bits.items()
        }

    def input_scale(self, state: State, percentile: float, bits: Bits) -> float:
        """The scale of inputs that the observer has seen; not zero where they were all zeros."""
        top = bits.input_top()
        return max(OBSERVERS[self.observer].bound(state, percentile, top), SMALLEST) / top


# `tfmq` is the released TFMQ-DM code's base (moving min-max ranges, roundings only), `brecq`
# that of BRECQ and PTQ4DiT (ranges learned too).
METHODS: dict[str, Method] = {
    "absmax": Method("absmax"),
    "minmax": Method("minmax"),
    "percentile": Method("percentile"),
    "mse": Method("mse", search=True),
    "tfmq": Method("minmax", search=True, reconstruct=True),
    "brecq": Method("mse", search=True, reconstruct=True, learn=True),
}
