"""What machine and versions a measurement was made on."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ditcast.settings import cores

VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
PACKAGES = ("ditcast", "numpy", "onnxruntime", "openvino", "pillow", "pydantic", "safetensors")


def peak_memory_mib() -> float:
    """Peak resident memory of this process so far, in MiB.

    Linux hands `ru_maxrss` down to child processes; `VmHWM` is the process's own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def available_memory_mib() -> float:
    """Memory that a process can still get without swapping, in MiB; 0 where unknown."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 0.0
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 1024


def _cpu() -> dict[str, str]:
    """What the system says of the last processor."""
    path = Path("/proc/cpuinfo")
    info = path.read_text() if path.exists() else ""
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines.items()}


def cpu_name() -> str:
    """What the processor calls itself."""
    return _cpu().get("model name", platform.processor())


def cpu_flags() -> list[str]:
    """The vector extensions that decide how fast integers and floats are multiplied."""
    flags = _cpu().get("flags", "").split()
    return [flag for flag in VECTOR_FLAGS if flag in flags]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe() -> dict[str, Any]:
    """Processor, cores, memory, operating system, versions and date."""
    return {
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "date": datetime.date.today().isoformat(),
    }
