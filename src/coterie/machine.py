"""Facts of this machine and its Python, for engines, the summary of a run, benchmarks and ``coterie doctor``."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from coterie import __version__

T = TypeVar("T")
PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")
_CPUINFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_RELEASE_EVERY = 5.0  # seconds
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, Arm


@dataclass(frozen=True)
class Check:
    """One line of ``coterie doctor`` or ``coterie site check``: what was found, whether it is enough, and the fix."""

    name: str
    value: str
    ok: bool = True
    fix: str = ""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device; ``memory`` in bytes."""

    name: str
    memory: int


def environment() -> dict[str, dict[str, object]]:
    """``versions`` and ``machine`` as JSON, for the summary of a run and for benchmarks."""
    return {"versions": dict(versions()), "machine": facts()}


def facts() -> dict[str, object]:
    """This machine's platform, processor, cores, memory and GPUs, as JSON."""
    return {
        "platform": platform.platform(),
        "cpu": processor(),
        "cores": cpu_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [gpu.name for gpu in gpus()],
    }


def versions() -> dict[str, str | None]:
    """The versions of Coterie, Python and :data:`PACKAGES`; None for a package that is not installed."""
    own = {"coterie": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in PACKAGES}


def version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[Gpu]:
    """Every CUDA device that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = (torch.cuda.get_device_properties(i) for i in range(count))
    return [Gpu(properties.name, properties.total_memory) for properties in found]


def devices() -> tuple[str, ...]:
    """The names of all devices that torch can compute on here: ``cpu``, and those of its accelerator by number."""
    if not torch.accelerator.is_available():
        return ("cpu",)
    kind = torch.accelerator.current_accelerator()
    return ("cpu", *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))) if kind else ("cpu",)


def processor() -> str:
    """The processor's name: on Linux from /proc/cpuinfo, elsewhere from Python's platform."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_cores() -> int:
    """The cores that this process may use: fewer than the machine has, in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """The CPU threads of a run whose config sets none: OMP_NUM_THREADS if it holds a number, else :func:`cpu_cores`."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": by level of nesting
    return int(first) if first.isdecimal() and int(first) else cpu_cores()


def reset_peak_memory() -> None:
    """Count :func:`peak_memory` from here on, where the system can (Linux)."""
    if os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident size


def peak_memory() -> int:
    """The largest resident size of this process so far, bytes."""
    if _STATUS.exists():
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Return memory to the system that glibc's allocator keeps: a round's passes leave gaps between what stays.

    Does nothing with other allocators.
    """
    if _TRIM is not None:
        _TRIM(0)


def releasing_memory(items: Iterable[T]) -> Iterator[T]:
    """``items``, with an occasional :func:`release_memory` in between, which takes about 50 ms."""
    released = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - released > _RELEASE_EVERY:
            release_memory()
            released = time.monotonic()


def native_bfloat16() -> bool | None:
    """Whether this processor has instructions for bfloat16; None where that is not known."""
    flags = [line.partition(":")[2].split() for line in _cpuinfo() if line.lower().startswith(("flags", "features"))]
    return bool(_BFLOAT16_FLAGS.intersection(flags[0])) if flags else None


def _cpuinfo() -> list[str]:
    return _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if _CPUINFO.exists() else []
