"""Post-training quantization methods, one line each in `METHODS`."""

from __future__ import annotations

from typing import NamedTuple


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
