"""What the machine is said to be: as the system says it, and as JSON."""

from __future__ import annotations

import json
import os
import platform
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from coterie import machine
from coterie.machine import cpu_cores, default_threads, devices, environment, native_bfloat16, processor, version


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("model name\t: X\nflags\t\t: fpu avx2 avx512_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("", None),
    ],
    ids=["x86", "arm", "without", "no flags"],
)
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpuinfo: str, native: bool | None) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert native_bfloat16() is native


def test_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Xeon: the 9th\n", encoding="utf-8")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert processor() == "Xeon: the 9th"
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")  # not on Linux
    assert processor() == environment()["machine"]["cpu"] == (platform.processor() or platform.machine())
    assert native_bfloat16() is None


@pytest.mark.parametrize(
    ("setting", "threads"),
    [("3", 3), ("16", 16), ("4,2", 4), (" 2 ", 2), (None, 8), ("", 8), ("0", 8), ("-1", 8), ("many", 8), ("²", 8)],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, setting: str | None, threads: int) -> None:
    monkeypatch.setattr(machine, "cpu_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert default_threads() == threads


def test_cores_are_those_of_the_process() -> None:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    assert cpu_cores() == (len(allowed) or os.cpu_count())
    if allowed:
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert cpu_cores() == 1
        finally:
            os.sched_setaffinity(0, allowed)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in devices():
        assert torch.empty(1, device=name).device == torch.device(name)
    pretended: dict[str, Any] = {
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device("cuda"),
        "device_count": lambda: 2,
    }
    for name, answer in pretended.items():
        monkeypatch.setattr(torch.accelerator, name, answer)
    assert devices() == ("cpu", "cuda:0", "cuda:1")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # a CUDA torch without a device
    assert devices() == ("cpu",)


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=f"H{i}", total_memory=i))
    assert environment()["machine"]["gpus"] == ["H0", "H1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment()["machine"]["gpus"] == []


def test_a_version_is_that_of_the_distribution() -> None:
    assert version("torch") in (torch.__version__, torch.__version__.partition("+")[0])  # without a build, on PyPI
    assert version("no-such-distribution") is None


def test_the_environment_is_json_with_versions_and_machine() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"versions", "machine"}
    wanted = {"coterie", "python", "torch", "transformers", "peft", "safetensors", "numpy"}
    assert set(found["versions"]) == wanted
    assert all(found["versions"].values())
    assert set(found["machine"]) == {"platform", "cpu", "cores", "memory_bytes", "gpus"}
    assert 1 <= found["machine"]["cores"] <= (os.cpu_count() or 1)
    assert found["machine"]["memory_bytes"] == psutil.virtual_memory().total


def test_the_packages_are_dependencies() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(machine.PACKAGES) <= {line.partition(">=")[0] for line in project["dependencies"]}


def test_the_peak_of_memory_can_be_counted_anew() -> None:
    block = torch.ones(30_000_000)
    high = machine.peak_memory()
    assert high > block.nbytes
    del block
    machine.reset_peak_memory()
    if Path("/proc/self/clear_refs").exists():
        assert machine.peak_memory() < high - 60_000_000
