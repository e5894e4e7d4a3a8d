"""What TensorRT says of a graph with several nodes that it does not have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from ditcast.errors import UnsupportedError
from ditcast.runtime.backends import GraphFile
from ditcast.runtime.backends.refusals import AGAIN
from ditcast.runtime.backends.tensorrt import EngineBuilder
from tests import qdq

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt


@pytest.mark.parametrize(
    ("count", "others"),
    [
        (2, r"n1 \(FusedMatMul\)\)"),
        (5, r"n1 \(FusedMatMul\), n2 .*n3 .*n4 \(FusedMatMul\)\)"),
        (7, r"n1 \(FusedMatMul\), .*n4 \(FusedMatMul\) and 2 more\)"),
    ],
)
def test_several_refused_nodes(tmp_path: Path, count: int, others: str) -> None:
    """The first with its reason, and up to four more by their names."""
    gain, kind = qdq.tensor("g", np.ones((qdq.K, qdq.K))), "FusedMatMul"
    nodes = []
    for i in range(count):
        ends = ["x" if i == 0 else f"h{i}"], ["y" if i + 1 == count else f"h{i + 1}"]
        nodes.append(
            onnx.helper.make_node(kind, [*ends[0], "g"], ends[1], f"n{i}", domain="com.microsoft")
        )
    path = qdq.save(qdq.model(nodes, [gain], output=("n", qdq.K)), tmp_path)
    message = rf"node n0 \(FusedMatMul\): an operator that .* or {AGAIN} \(refused too: {others}$"
    with pytest.raises(UnsupportedError, match=message):
        EngineBuilder("tensorrt-rtx", ("8.9",)).build(GraphFile(path=path), {"x": {0: (1, 4, 8)}})
