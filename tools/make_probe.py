"""Make the two graphs in `runtime/backends/` that tell a backend what this CPU does with integers.

`probe.onnx` is one u8 x s8 MatMul whose pair sums overflow 16 bits: some CPUs without VNNI
multiply u8 by s8 with a saturating instruction. With the largest codes on both sides the exact
result is 255 * 127 * 64; a saturating kernel gives about half of it.

`rate.onnx` is a large MatMul in float (`0/MatMul`) and with weights of 7 and 8 bits: their rates
are the roofline of an audit. CPUs whose kernels saturate have a faster one for 7 bits. The weights
are fills, so that the file stays small; every runtime folds them when it loads.

    python tools/make_probe.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

ROWS, INNER, OUTER = 32, 64, 16
RATE = (512, 1024, 4096)  # rows, inner and outer size, as in a large transformer
FOLDER = Path(__file__).parent.parent / "runtime" / "backends"


def probe() -> None:
    """Write `probe.onnx`."""
    constants = _quantizer(np.float32(1), np.uint8(0)) | {
        "codes": np.full((INNER, OUTER), 127, np.int8),
        "weight_scale": np.ones(OUTER, np.float32),
        "bias": np.zeros((1, 1, OUTER), np.float32),
    }
    nodes = [
        *_restored(),
        helper.make_node("DequantizeLinear", ["codes", "weight_scale"], ["weight"], axis=1),
        helper.make_node("MatMul", ["restored", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    _save("probe", nodes, constants, (1, ROWS, INNER), {"y": (1, ROWS, OUTER)})


def rate() -> None:
    """Write `rate.onnx`."""
    rows, inner, outer = RATE
    constants = _quantizer(np.float32(0.02), np.uint8(128)) | {
        "shape": np.array([inner, outer], np.int64),
        "weight_scale": np.ones(outer, np.float32),
    }

    def fill(name: str, value: Any) -> NodeProto:
        tensor = numpy_helper.from_array(np.array([value]))
        return helper.make_node("ConstantOfShape", ["shape"], [name], value=tensor)

    nodes = [
        *_restored(),
        fill("float_weight", np.float32(1)),
        helper.make_node("MatMul", ["x", "float_weight"], ["0/MatMul"], name="0/MatMul"),
    ]
    for bits in (7, 8):
        codes, weight, product = f"codes{bits}", f"weight{bits}", f"{bits}/MatMul"
        nodes += [
            fill(codes, np.int8(2 ** (bits - 1) - 1)),
            helper.make_node("DequantizeLinear", [codes, "weight_scale"], [weight], axis=1),
            helper.make_node("MatMul", ["restored", weight], [product], name=product),
        ]
    outputs = dict.fromkeys(("0/MatMul", "7/MatMul", "8/MatMul"), (1, rows, outer))
    _save("rate", nodes, constants, (1, rows, inner), outputs)


def _quantizer(scale: np.float32, zero_point: np.uint8) -> dict[str, Any]:
    return {"scale": scale, "zero_point": zero_point}


def _restored() -> list[NodeProto]:
    """Input x, quantized and restored."""
    return [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["restored"]),
    ]


def _save(
    name: str,
    nodes: list[NodeProto],
    constants: dict[str, Any],
    shape: tuple[int, ...],
    outputs: Mapping[str, tuple[int, ...]],
) -> None:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(key, TensorProto.FLOAT, size)
            for key, size in outputs.items()
        ],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10, producer_name="ditcast")
    onnx.checker.check_model(model)
    (FOLDER / f"{name}.onnx").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    probe()
    rate()
