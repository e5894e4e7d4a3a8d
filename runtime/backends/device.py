"""Memory of a GPU, arrays in it, and one stream on it, by the driver's own library alone."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ditcast.errors import UnsupportedError

ALIGNMENT = 256  # in bytes, of what `allocate` gives


@dataclass(frozen=True)
class DeviceArray:
    """An array at an address of a device, in C order; whoever allocated that frees it."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        """Its parts along the first axis."""
        return self.shape[0]

    def __iter__(self) -> Iterator[DeviceArray]:
        """One part after the other."""
        return (self[part] for part in range(len(self)))

    def __getitem__(self, index: int | slice) -> DeviceArray:
        """One of its parts, or some that follow each other."""
        many = range(len(self))[index]  # an IndexError, where it has no such part
        first = many if isinstance(many, int) else many.start
        shape = self.shape[1:] if isinstance(many, int) else (len(many), *self.shape[1:])
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.address + first * size, shape, self.dtype)


class Device(Protocol):
    """What a session needs of a GPU; all copies and kernels are in order on one stream."""

    stream: int

    def allocate(self, size: int) -> int:
        """The address of `size` bytes."""
        ...

    def free(self, address: int) -> None:
        """Give an allocation back."""
        ...

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a contiguous array to an address; it is held until `wait`, and must not change."""
        ...

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copy from an address into a contiguous array, which is there after `wait`."""
        ...

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy `size` bytes from one address to another."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Set `size` bytes to zero."""
        ...

    def wait(self) -> None:
        """Until all of it is done."""
        ...

    def used(self) -> int:
        """Bytes of its memory that are in use, by this process and others."""
        ...


class CudaDevice:
    """`Device` over the first GPU, in the context that TensorRT uses as well."""

    def __init__(self) -> None:
        """Take the device's primary context.

        Raises:
            UnsupportedError: the driver refuses.
        """
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._uploaded: list[NDArray[Any]] = []
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream = stream.value or 0

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            problem = text.value.decode() if text.value else "unknown"
            raise UnsupportedError(f"GPU: {name} fails: {problem} (error {code}); see nvidia-smi")

    def allocate(self, size: int) -> int:
        """The address of `size` bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        """Give an allocation back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a contiguous array to an address; it is held until `wait`, and must not change."""
        self._uploaded.append(array)
        source, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        stream = ctypes.c_void_p(self.stream)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, stream)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copy from an address into a contiguous array, which is there after `wait`."""
        target, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        stream = ctypes.c_void_p(self.stream)
        self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, stream)

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy `size` bytes from one address to another."""
        addresses = ctypes.c_uint64(target), ctypes.c_uint64(source)
        stream = ctypes.c_void_p(self.stream)
        self._call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(size), stream)

    def clear(self, address: int, size: int) -> None:
        """Set `size` bytes to zero."""
        zero, stream = ctypes.c_ubyte(0), ctypes.c_void_p(self.stream)
        self._call("cuMemsetD8Async", ctypes.c_uint64(address), zero, ctypes.c_size_t(size), stream)

    def wait(self) -> None:
        """Until all of it is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))
        self._uploaded.clear()

    def used(self) -> int:
        """Bytes of its memory that are in use, by this process and others."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value
