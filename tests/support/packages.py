"""Packages as pip would install them: a folder of modules and a dist-info with entry points, on ``sys.path``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from coterie.data.sources import source_named, sources
from coterie.methods.registry import method_named, methods
from coterie.nn.gates import gate_named, gates
from coterie.plugins import installed

CACHES = (installed, method_named, methods, sources, source_named, gates, gate_named)


def forget() -> None:
    """Let everything that is found by name be found anew."""
    for cache in CACHES:
        cache.cache_clear()
    importlib.invalidate_caches()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, points: dict[str, str], **modules: str) -> None:
    """Install the package ``name`` in ``folder``: ``points`` maps "group: entry" to what it names.

    The caller calls :func:`forget` before and after.
    """
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = []
    for key, value in points.items():
        group, entry = key.split(": ")
        lines += [f"[{group}]", f"{entry} = {value}"]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(str(folder))
