"""The NVIDIA GPU of this machine, by the driver's own library: nothing has to be installed."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

MAJOR, MINOR = 75, 76  # of CUdevice_attribute: the compute capability
NAME_BYTES = 256


class Gpu(NamedTuple):
    """A device: its name, its compute capability, and its memory in MiB."""

    name: str
    capability: str
    memory_mib: int


def find_gpu(driver: str = "libcuda.so.1") -> Gpu | None:
    """The first GPU, or None where there is no driver or no device."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return None
    device, size = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(NAME_BYTES)
    attributes = [ctypes.c_int(), ctypes.c_int()]
    calls = [
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetName(name, NAME_BYTES, device),
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(attributes[0]), MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(attributes[1]), MINOR, device),
    ]
    if any(calls):
        return None
    capability = ".".join(str(value.value) for value in attributes)
    return Gpu(name.value.decode(), capability, size.value >> 20)
