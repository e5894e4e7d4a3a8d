"""What each target's graphs look like. To add one: a line in `TARGETS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.stage import choose_precision
from ditcast.errors import ConfigError, UnsupportedError
from ditcast.export.tensorrt import INT4, cannot_hold, weight_only
from ditcast.manifest import REFERENCE
from ditcast.models import Adapter, LoadedModel
from ditcast.progress import tell
from ditcast.recipe import PRECISIONS, Bits, Recipe


class Target(NamedTuple):
    """The integers of one symmetric scale (type and zero point), and whether it has a graph loop.

    A target without integers, `dtype` None, is in full precision. One that `unfolds` has integer
    convolutions as MatMuls over their windows. One that is `typed` takes its precision from the
    graph, and multiplies 8-bit floats too: see `export.tensorrt`. One that `multiplies` has
    forecasts as products: see `export.forecast`; others fuse the sum, and do not branch well.
    """

    dtype: type[np.generic] | None
    zero_point: int
    loop: bool
    unfolds: bool = False
    typed: bool = False
    multiplies: bool = False


# u8 with zero point 128 and s8 with 0 are the same integers, shifted. ONNX Runtime's CPU
# kernels are faster with the first (1.3 to 3 times), OpenVINO's with the second (1.2 times).
TARGETS: dict[str, Target] = {
    REFERENCE: Target(None, 0, loop=True, multiplies=True),
    "onnxruntime": Target(np.uint8, 128, loop=True, unfolds=True, multiplies=True),
    "openvino": Target(np.int8, 0, loop=False),
    "tensorrt": Target(np.int8, 0, loop=True, typed=True),
}


def check_targets(targets: Sequence[str], model: LoadedModel, recipe: Recipe) -> None:
    """Refuse targets that cannot run what the recipe asks for, before the long work.

    Raises:
        ConfigError: an unknown one, one without products of 8-bit floats, or rules that do not
            fit the model's layers.
        UnsupportedError: one that cannot hold a layer's 4-bit weights.
    """
    check_products(targets, recipe)
    kinds = choose_precision(model, recipe)
    bits = {name: PRECISIONS[kind] for name, kind in kinds.items()}
    check_weights(targets, model.adapter, bits, recipe.group)


def check_products(targets: Sequence[str], recipe: Recipe) -> None:
    """Refuse targets whose kernels do not multiply what the recipe asks for.

    Raises:
        ConfigError: an unknown one, or one without products of 8-bit floats.
    """
    for target in targets:
        if target not in TARGETS:
            raise ConfigError(f"target: unknown {target!r}; expected one of {', '.join(TARGETS)}")
    floats = sorted(kind for kind in recipe.precisions() if PRECISIONS[kind].e4m3)
    able = [name for name, target in TARGETS.items() if target.typed]
    unable = [name for name in targets if name not in (REFERENCE, *able)]
    if floats and unable:
        raise ConfigError(
            f"target: got {unable[0]} with {floats[0]}, whose products it cannot run; expected "
            f"{' or '.join(able)}: give --target {able[0]}, or compile with --scheme w8a8"
        )


def check_weights(
    targets: Sequence[str], adapter: Adapter, bits: Mapping[str, Bits], group: int
) -> None:
    """Refuse targets that cannot hold the 4-bit weights of some of these layers.

    Raises:
        UnsupportedError: naming the first such layer.
    """
    typed = [target for target in targets if TARGETS[target].typed]
    able = [name for name, target in TARGETS.items() if target.dtype and not target.typed]
    layers = {**adapter.layers(), **adapter.temporal_linears()}
    for name, wide in bits.items():
        reason = cannot_hold(layers[name], wide, group) if 0 < wide.weight <= INT4 else ""
        if typed and reason:
            raise UnsupportedError(
                f"target: got {typed[0]}, but layer {name} {reason}; give --target "
                f"{' or '.join(able)}, which can hold it, or the rule "
                f"{{pattern: {name}, precision: w8a8}}"
            )


def encodings(
    adapter: Adapter, targets: Sequence[str], qparams: QParams
) -> list[tuple[list[str], QParams]]:
    """Targets that encode the same numbers together, each group with what it is quantized by."""
    floats = [target for target in targets if TARGETS[target].dtype is None or not qparams]
    typed = [target for target in targets if target not in floats and TARGETS[target].typed]
    own = weight_only(qparams, {**adapter.layers(), **adapter.temporal_linears()})
    if own is qparams:
        typed = []
    elif typed:
        tell(
            f"target {', '.join(typed)}: layers of 4-bit weights keep float inputs there; "
            "TensorRT multiplies no 4-bit weights by 8-bit inputs"
        )
    integer = [target for target in targets if target not in [*floats, *typed]]
    groups = [(floats, QParams()), (integer, qparams), (typed, own)]
    return [(names, scales) for names, scales in groups if names]
