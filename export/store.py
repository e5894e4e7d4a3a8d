"""One external weights file for all graphs of a target; equal tensors are stored once."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.errors import BundleError
from ditcast.export.trace import INLINE_BYTES, IR_VERSION, replace
from ditcast.manifest import WEIGHTS
from ditcast.models import LoadedModel

ALIGNMENT = 4096  # a page, so that a runtime can map the file
E4M3: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN)
PACKED = "/int4"  # end of the name of a constant that is stored with 4 bits per value


class WeightStore:
    """The weights file of a target while it is written."""

    def __init__(self, folder: Path) -> None:
        """Start an empty file in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = (folder / WEIGHTS).open("wb")
        self._known: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> WeightStore:
        """The file is closed at exit."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def add(self, name: str, array: NDArray[Any]) -> onnx.TensorProto:
        """Append a tensor, unless an equal one is there, and return the reference to it."""
        data = np.ascontiguousarray(array)
        raw = data.reshape(-1).view(np.uint8).data
        key = hashlib.sha256(raw).digest()
        if key not in self._known:
            self._file.seek(-self._file.tell() % ALIGNMENT, 1)
            self._known[key] = (self._file.tell(), data.nbytes)
            self._file.write(raw)
        offset, length = self._known[key]
        kind = onnx.helper.np_dtype_to_tensor_dtype(data.dtype)
        return reference(name, kind, data.shape, offset, length)

    def save(self, graph: gs.Graph, path: Path) -> None:
        """Write a graph, its large constants as references into the weights file."""
        self._file.flush()
        references = []
        for tensor in graph.tensors().values():
            narrow = tensor.name.endswith(PACKED)
            if isinstance(tensor, gs.Constant) and (narrow or tensor.values.nbytes > INLINE_BYTES):
                added = self.add(tensor.name, _packed(tensor.values) if narrow else tensor.values)
                if narrow:
                    added.data_type = onnx.TensorProto.INT4
                    added.dims[:] = tensor.values.shape
                references.append(added)
                by_name = gs.Variable(tensor.name, tensor.values.dtype, tensor.values.shape)
                replace(tensor, by_name)
        proto = gs.export_onnx(graph)
        proto.graph.initializer.extend(references)
        del proto.graph.value_info[:]
        self.save_proto(proto, path)

    def save_proto(self, proto: onnx.ModelProto, path: Path) -> None:
        """Write a model whose large initializers are references already, and check it."""
        self._file.flush()
        proto.producer_name, proto.ir_version = "ditcast", IR_VERSION
        path.write_bytes(proto.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(path))


def as_int4(constant: gs.Constant) -> gs.Constant:
    """The same int8 constant, marked to be stored with 4 bits per value.

    graphsurgeon has no type for it.
    """
    return gs.Constant(constant.name + PACKED, constant.values)


def _packed(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Two codes in [-8, 7] to a byte, the first in the low half, as ONNX has them."""
    flat = np.bitwise_and(values.ravel(), 0xF).astype(np.uint8)
    packed = flat[::2].copy()
    odd = flat[1::2]
    packed[: len(odd)] += np.multiply(odd, 16, dtype=np.uint8)
    found: NDArray[np.uint8] = packed
    return found


def reference(
    name: str, data_type: int, shape: tuple[int, ...], offset: int, length: int
) -> onnx.TensorProto:
    """An initializer whose bytes lie in the weights file."""
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def check_disk(bundle: Bundle, model: LoadedModel, targets: int) -> None:
    """Refuse a disk that is too small: a target needs at most the parameters in float.

    Raises:
        BundleError: there is less space.
    """
    needed = targets * 4 * bundle.manifest.model.parameters
    free = shutil.disk_usage(bundle.path).free
    if free < needed:
        raise BundleError(
            f"export: the disk of {bundle.path} has {free / 2**20:.0f} MiB free, expected at "
            f"least {needed / 2**20:.0f} MiB for {model.source}; free some space and run again"
        )
