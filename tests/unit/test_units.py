"""Sizes and durations as text."""

from __future__ import annotations

from coterie.units import clock, duration, energy, operations, size


def test_sizes() -> None:
    assert [size(b) for b in (0, 999, 1024, 1536, 99.95 * 2**20, 300 * 2**20, 5 * 2**40)] == [
        "0 B", "999 B", "1.0 KiB", "1.5 KiB", "100.0 MiB", "300 MiB", "5120 GiB",
    ]  # fmt: skip


def test_durations() -> None:
    assert [duration(s) for s in (0, 3.21, 59.4, 125, 3725)] == ["0.0 s", "3.2 s", "59 s", "2 min 05 s", "1 h 02 min"]


def test_operations() -> None:
    assert [operations(n) for n in (0, 0.52, 12.34, 999, 12_345, 4.5e9)] == [
        "0 GFLOP", "0.52 GFLOP", "12.3 GFLOP", "999 GFLOP", "12.3 TFLOP", "4500 PFLOP",
    ]  # fmt: skip


def test_energy() -> None:
    assert [energy(j) for j in (0, 0.52, 999, 12_345, 4.5e9)] == ["0 J", "0.52 J", "999 J", "12.3 kJ", "4500 MJ"]


def test_clock() -> None:
    assert [clock(s) for s in (0, 9.4, 59.6, 61, 3599.7, 3600, 36_061)] == [
        "0:00", "0:09", "1:00", "1:01", "1:00:00", "1:00:00", "10:01:01",
    ]  # fmt: skip
