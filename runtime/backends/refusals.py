"""Why TensorRT refuses a graph, in one line: the node, its operator, the reason, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

INTEGER_OPERATORS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
AGAIN = "export its graphs with: ditcast export BUNDLE --target tensorrt"
# Seen in the log of tensorrt-rtx 1.7.1: the product of 64 outputs is multiplied by as many factors
# as all blocks have together, so that those of the first block are used for all.
WRONG_BLOCKS = (
    "int8 weights with scales in blocks, which TensorRT builds into a product with wrong factors; "
    f"use one scale per output channel, or int4; {AGAIN}"
)
# (what the library says, the reason, what to do)
REASONS = (
    (
        "Non-zero zero point",
        "a zero point that is not 0",
        f"TensorRT takes symmetric int8 only, as target tensorrt has it; {AGAIN}",
    ),
    (
        r"input has type Int32 but must have",
        "an int32 tensor behind DequantizeLinear, such as a bias",
        f"keep biases in float; {AGAIN}",
    ),
    (
        r"only the quantization axis may be blocked",
        "blocks of scales along another axis than the one that is quantized",
        f"put them along the inputs of the weight; {AGAIN}",
    ),
    (
        r"HW-specific datatypes: (?P<what>\w+)",
        "{what} is a type that this device does not multiply",
        "int4 needs compute capability 8.0 or newer, fp8 needs 8.9, fp4 needs 12.0: build for one "
        "of these, or compile with --scheme w8a8",
    ),
    (
        r"Failed to import initializer: (?P<what>\S+)\s*$",
        "initializer {what} has a type that TensorRT does not hold (uint4, int16 and others)",
        f"use int8, or int4 for weights; {AGAIN}",
    ),
    (
        r"out of memory|OutOfMemory|bad_alloc",
        "out of memory",
        "use a smaller batch (compile with --batch), or a machine with more",
    ),
)
_SHOWN = 300
_LISTED = 5


def refused(errors: Sequence[Any]) -> str:
    """What the parser's errors say; each has `node_name`, `node_operator` and `desc`.

    The first one's reason, and the nodes of others, of which five are named at most.
    """
    if not errors:
        return f"the parser gave no reason; {AGAIN}"
    name, operator, text = errors[0].node_name(), errors[0].node_operator(), errors[0].desc()
    nodes = [*dict.fromkeys(f"{e.node_name()} ({e.node_operator()})" for e in errors)]
    others, beyond = nodes[1:_LISTED], len(nodes) - _LISTED
    more = f" (refused too: {', '.join(others)}" if others else ""
    more += f" and {beyond} more)" if beyond > 0 else ")" if others else ""
    node = f"node {name} ({operator}): " if name else ""
    return f"{node}{_reason(operator, text)}{more}"


def explain(text: str) -> str:
    """What an error of the builder says."""
    return _reason("", text)


def _reason(operator: str, text: str) -> str:
    """The reason and the remedy of one error."""
    if operator in INTEGER_OPERATORS:
        return (
            "an operator of ONNX Runtime's, which TensorRT does not have; write it as a float "
            f"product between QuantizeLinear and DequantizeLinear; {AGAIN}"
        )
    for pattern, reason, remedy in REASONS:
        if (match := re.search(pattern, text)) is not None:
            return f"{reason.format_map(match.groupdict())}; {remedy}"
    if "Plugin not found" in text or text == "false":
        return f"an operator that TensorRT does not have; replace it by standard ones, or {AGAIN}"
    return f"{' '.join(text.split())[:_SHOWN]}; {AGAIN}"
