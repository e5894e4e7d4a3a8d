"""What each target's graphs look like. To add one: a line in `TARGETS`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ditcast.manifest import REFERENCE


class Target(NamedTuple):
    """The integers of one symmetric scale (type and zero point), and whether it has a graph loop.

    A target without integers, `dtype` None, is in full precision. One that `unfolds` has integer
    convolutions as MatMuls over their windows.
    """

    dtype: type[np.generic] | None
    zero_point: int
    loop: bool
    unfolds: bool = False


# u8 with zero point 128 and s8 with 0 are the same integers, shifted. ONNX Runtime's CPU
# kernels are faster with the first (1.3 to 3 times), OpenVINO's with the second (1.2 times).
TARGETS: dict[str, Target] = {
    REFERENCE: Target(None, 0, loop=True),
    "onnxruntime": Target(np.uint8, 128, loop=True, unfolds=True),
    "openvino": Target(np.int8, 0, loop=False),
}
