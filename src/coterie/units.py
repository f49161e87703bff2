"""Quantities as text: sizes and durations."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB")


def size(value: float) -> str:
    """Bytes with about three digits: ``999 B``, ``1.5 KiB``, ``300 MiB``, ``5120 GiB``."""
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def operations(gflop: float) -> str:
    """Billions of floating-point operations in words: ``0.5 GFLOP``, ``12.3 TFLOP``, ``450 PFLOP``."""
    return _in_thousands(gflop, ("GFLOP", "TFLOP", "PFLOP"))


def energy(joules: float) -> str:
    """Joules with about three digits: ``0.52 J``, ``12.3 kJ``, ``450 MJ``."""
    return _in_thousands(joules, ("J", "kJ", "MJ"))


def _in_thousands(value: float, units: tuple[str, ...]) -> str:
    """``value``, of the first of ``units``, in the one that leaves it below 1000. Each is 1000 times the one before."""
    power = next((i for i in range(len(units) - 1) if value < 1000 ** (i + 1)), len(units) - 1)
    value /= 1000**power
    return f"{value:.0f} {units[power]}" if value >= 100 else f"{value:.3g} {units[power]}"


def duration(seconds: float) -> str:
    """Seconds in words: ``3.2 s``, ``59 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float) -> str:
    """Seconds as on a clock: ``2:03``, ``1:02:03``."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
