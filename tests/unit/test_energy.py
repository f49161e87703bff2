"""Energy is read from the machine's counters where they can be read, and is an estimate that says so where not."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coterie.energy import Counter, Energy, Meter, divided, energy_of, meter_of, nvml, rapl

CPU = torch.device("cpu")
LIMIT = 5_000_000  # microjoules


def zone(root: Path, name: str, label: str, energy: str, limit: str = str(LIMIT)) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file, text in (("name", label), ("energy_uj", energy), ("max_energy_range_uj", limit)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_the_packages_are_added_up_and_may_wrap(tmp_path: Path) -> None:
    first, second = (
        zone(tmp_path, "intel-rapl:0", "package-0", "4000000"),
        zone(tmp_path, "intel-rapl:1", "package-1", "7"),
    )
    zone(tmp_path, "intel-rapl:0:0", "core", "1000000")  # a part of package-0
    zone(tmp_path, "intel-rapl:2", "psys", "1000000")  # the packages are a part of it
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", "1000000")  # the same package by another way
    meter = meter_of([CPU], tmp_path)
    assert len(meter.counters) == 2
    before = meter.read()
    second.write_text("2000007\n")
    assert meter.since(before) == pytest.approx(2.0)
    first.write_text("1000000\n")  # from 4 J over 5 J to 1 J
    assert meter.since(before) == pytest.approx(4.0)


@pytest.mark.parametrize(("seconds", "joules"), [(100, 30.0), (1059, 30.0), (1061, None), (5000, None)])
def test_a_counter_that_may_have_wrapped_once_more_is_not_believed(seconds: float, joules: float | None) -> None:
    """At 500 W, the most that a processor takes, 30 J more than the wrap of 530 kJ take 1060.06 s."""
    values, times = iter([10.0, 40.0]), iter([0.0, seconds])
    meter = Meter((Counter(lambda: next(values), wraps=530_000.0),), clock=lambda: next(times))
    assert meter.since(meter.read()) == joules


def test_a_machine_without_counters_has_no_joules(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        meter = meter_of([CPU], folder)
        assert (meter.counters, meter.since(meter.read())) == ((), None)


@pytest.mark.parametrize("energy", ["", "many", "-1", "\xff"])
def test_a_counter_that_is_no_number_is_none(energy: str, tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", energy)
    assert rapl(tmp_path) == ()


def test_a_counter_that_may_not_be_read_is_none_and_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", "4")
    meter, read = meter_of([CPU], tmp_path), Path.read_text
    before = meter.read()

    def denied(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)  # root may read any file, so its mode would not do
    assert meter.since(before) is None
    assert rapl(tmp_path) == ()
    monkeypatch.undo()
    os.unlink(path)
    assert meter.since(before) is None


def test_a_counter_that_goes_back_is_not_believed() -> None:
    values = iter([5.0, 3.0])
    meter = Meter((Counter(lambda: next(values)),))
    assert meter.since(meter.read()) is None


class NVMLError(Exception):
    """As in pynvml."""


def test_a_gpus_counter_is_read_if_the_library_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu, millijoules = torch.device("cuda:0"), [1500, 1500, 4000]
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert nvml(gpu) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-ab"))
    asked: list[str] = []
    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules.pop(0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    zone(tmp_path, "intel-rapl:0", "package-0", "4")
    assert len(meter_of([gpu], tmp_path / "none").counters) == 1
    millijoules.insert(0, 1500)
    meter = meter_of([gpu], tmp_path, alone=False)
    assert len(meter.counters) == 1
    assert meter.since(meter.read()) == 2.5
    assert {*asked} == {"GPU-12-ab"}

    def fails(handle: str) -> int:
        raise NVMLError

    library.nvmlDeviceGetTotalEnergyConsumption = fails
    assert nvml(gpu) is None
    assert meter_of([gpu], tmp_path) == Meter()  # the processor alone would be too little
    assert meter_of([torch.device("mps")], tmp_path) == Meter()
    assert len(meter_of([CPU, CPU], tmp_path).counters) == 1


def test_clients_of_one_pass_share_its_joules_by_their_operations() -> None:
    assert divided(6.0, [1.0, 2.0], 9.0) == [Energy(2.0, "shared"), Energy(4.0, "shared")]
    assert divided(6.0, [2.0], 9.0) == [Energy(6.0, "measured")]
    assert divided(None, [1000.0, 500.0], 3.0) == [Energy(3.0, "estimate"), Energy(1.5, "estimate")]
    assert divided(None, [1000.0], 0.0) == [None]
    assert divided(6.0, [0.0, 0.0], 9.0) == [None, None]


def test_without_a_counter_energy_is_an_estimate_if_that_is_set() -> None:
    assert energy_of(2.0, 1000.0, 5.0) == Energy(2.0, "measured")
    assert energy_of(None, 1000.0, 5.0) == Energy(5.0, "estimate")
    assert energy_of(None, 1000.0, 0.0) is None
