"""Joules: what the machine's own counters read, and an estimate from operations where there are none.

Linux counts the energy of processor packages (RAPL, under /sys/class/powercap; often for root alone), NVIDIA's driver
that of a GPU since it was loaded (read with ``pynvml`` of the package nvidia-ml-py, if it is installed; Coterie does
not need it). Both count everything that the device does, for other processes too. A counter that cannot be read is
never an error.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Source = Literal["measured", "shared", "estimate"]
SOURCES: tuple[Source, ...] = ("measured", "shared", "estimate")
_POWERCAP = Path("/sys/class/powercap")
_NVML = "pynvml"
_MOST_WATTS = 500.0  # that a processor package takes


@dataclass(frozen=True)
class Energy:
    """Joules, and where they come from.

    ``measured``: the machine's counters, over this client's round. ``shared``: the same over clients that trained
    together, divided by their operations. ``estimate``: operations times ``[engine] joules_per_tflop``.
    """

    joules: float
    source: Source


@dataclass(frozen=True)
class Counter:
    """A counter of energy that only rises. ``read`` returns joules, None if it cannot be read.

    ``wraps``: the joules after which it starts at 0 again; 0: never.
    """

    read: Callable[[], float | None]
    wraps: float = 0.0

    def between(self, start: float | None, end: float | None, seconds: float) -> float | None:
        """The joules from one reading to another; None if one is missing, or if they do not say how many there were.

        Some joules and once more those after which it wraps look the same. They are told apart by what a processor can
        take in so many ``seconds``.
        """
        if start is None or end is None or (end < start and not self.wraps):
            return None
        joules = end - start + (self.wraps if end < start else 0.0)
        return None if self.wraps and joules + self.wraps <= _MOST_WATTS * seconds else joules


@dataclass(frozen=True)
class Reading:
    """What every counter of a meter says, None for one that cannot be read, ``at`` so many seconds."""

    values: tuple[float | None, ...]
    at: float


@dataclass(frozen=True)
class Meter:
    """The counters of what a client computes on."""

    counters: tuple[Counter, ...] = ()
    clock: Callable[[], float] = time.monotonic

    def read(self) -> Reading:
        """What every counter says now."""
        return Reading(tuple(counter.read() for counter in self.counters), self.clock())

    def since(self, before: Reading) -> float | None:
        """The joules since :meth:`read` returned ``before``; None without counters, or if one does not say."""
        now = self.read()
        pairs = zip(self.counters, before.values, now.values, strict=True)
        made = [counter.between(start, end, now.at - before.at) for counter, start, end in pairs]
        known = [joules for joules in made if joules is not None]
        return sum(known) if known and len(known) == len(made) else None


def meter_of(devices: Collection[torch.device], powercap: Path = _POWERCAP, alone: bool = True) -> Meter:
    """The counters for ``devices``: of a CPU its packages, of GPUs their own and, if they can be read, the packages.

    ``alone``: nothing else of this run computes at the same time; otherwise packages are left out.
    """
    packages = rapl(powercap) if alone else ()
    others = [device for device in devices if device.type != "cpu"]
    gpus = [nvml(device) if device.type == "cuda" else None for device in others]
    read = [gpu for gpu in gpus if gpu]
    return Meter((*read, *packages)) if len(read) == len(gpus) else Meter()


def rapl(powercap: Path = _POWERCAP) -> tuple[Counter, ...]:
    """The counters of the processor packages that can be read: ``intel-rapl:0``, ... (AMD's have these names too)."""
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name = _text(zone / "name") or ""
        energy, most = zone / "energy_uj", _number(zone / "max_energy_range_uj")
        if zone.name.count(":") == 1 and name.startswith("package") and most and _number(energy) is not None:
            found.append(Counter(lambda energy=energy: _joules(energy), most / 1e6))  # type: ignore[misc]
    return tuple(found)


def nvml(device: torch.device) -> Counter | None:
    """The counter of a GPU of NVIDIA; None if there is no ``pynvml``, or it cannot read this GPU."""
    try:
        library = importlib.import_module(_NVML)
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except ImportError:
        return None
    except (library.NVMLError, AttributeError, RuntimeError, AssertionError):  # AttributeError: a torch without uuid
        return None

    def read() -> float | None:
        try:
            return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except library.NVMLError:
            return None

    return Counter(read) if read() is not None else None


def energy_of(joules: float | None, gflop: float, joules_per_tflop: float) -> Energy | None:
    """What a client's round took: ``joules`` if they were measured, else the estimate, None without either."""
    if joules is not None:
        return Energy(joules, "measured")
    return Energy(gflop / 1e3 * joules_per_tflop, "estimate") if gflop and joules_per_tflop else None


def divided(joules: float | None, gflops: Sequence[float], joules_per_tflop: float) -> list[Energy | None]:
    """What each of several clients took that trained together: a part of ``joules`` by its operations."""
    total = sum(gflops)
    if joules is None or len(gflops) == 1:
        return [energy_of(joules, gflop, joules_per_tflop) for gflop in gflops]
    return [Energy(joules * gflop / total, "shared") if total else None for gflop in gflops]


def _joules(path: Path) -> float | None:
    value = _number(path)
    return None if value is None else value / 1e6


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
