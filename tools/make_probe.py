"""Make `runtime/backends/probe.onnx`: one u8 x s8 MatMul whose pair sums overflow 16 bits.

Some CPUs without VNNI multiply u8 by s8 with a saturating instruction. With the largest codes
on both sides the exact result is 255 * 127 * 64; a saturating kernel gives about half of it.

    python tools/make_probe.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, INNER, OUTER = 32, 64, 16
PATH = Path(__file__).parent.parent / "runtime" / "backends" / "probe.onnx"


def main() -> None:
    """Write the model."""
    one, zero = np.float32(1), np.uint8(0)
    constants: dict[str, Any] = {
        "scale": one,
        "zero_point": zero,
        "codes": np.full((INNER, OUTER), 127, np.int8),
        "weight_scale": np.ones(OUTER, np.float32),
        "bias": np.zeros((1, 1, OUTER), np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["restored"]),
        helper.make_node("DequantizeLinear", ["codes", "weight_scale"], ["weight"], axis=1),
        helper.make_node("MatMul", ["restored", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, ROWS, INNER])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, ROWS, OUTER])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10, producer_name="ditcast")
    onnx.checker.check_model(model)
    PATH.write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
