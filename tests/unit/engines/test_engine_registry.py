"""Engines by name: only the one that a config names is imported, and packages may add theirs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import sites
from coterie import plugins
from coterie.engines import local, registry
from coterie.engines.base import Needs
from coterie.engines.registry import engine_named, engine_names
from coterie.types import CoterieError

ENGINES = {"coterie.engines.local", "coterie.engines.flower_sim", "coterie.engines.together"}


def loaded_by(source: str) -> set[str]:
    """The modules that a fresh Python has loaded after ``source``."""
    script = f"{source}\nimport sys\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n"))


def test_engines_are_listed_without_importing_them_and_a_local_run_loads_neither_flower_nor_grpc_nor_ray(
    tmp_path: Path,
) -> None:
    path, out = sites.config(tmp_path, method="fedit", rows=4, others=2), tmp_path / "out"
    loaded = loaded_by(
        "import sys\nfrom coterie.engines.registry import engine_names\n"
        "assert {'local', 'flower-sim'} <= set(engine_names())\n"
        f"assert not {ENGINES} & set(sys.modules)\n"
        f"from coterie.__main__ import main\nsys.argv = ['coterie', 'run', {str(path)!r}, '--out', "
        f"{str(out)!r}, '--set', 'run.rounds=1']\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert (out / "summary.json").exists()
    assert "coterie.engines.registry" in loaded
    assert "coterie.engines.local" in loaded
    assert not {"flwr", "grpc", "ray", "coterie.flower.app", "coterie.engines.flower_sim"} & loaded


def test_only_modules_that_make_an_engine_are_engines() -> None:
    assert [name for name in engine_names() if name not in plugins.installed(registry.GROUP)] == ["flower-sim", "local"]
    assert engine_named("local") is local.make
    for name in ("flower_sim", "checks", "client", "..local", ""):
        with pytest.raises(CoterieError, match=r"unknown engine .*; the engines are flower-sim, local"):
            engine_named(name)


def added(monkeypatch: pytest.MonkeyPatch, name: str, source: str, folder: Path) -> None:
    """As if a package were installed that adds the engine ``name``, a module of that ``source``."""
    (folder / "their_engine.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "their_engine", raising=False)
    point = EntryPoint(name, "their_engine", registry.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    plugins.installed.cache_clear()
    monkeypatch.setattr(registry, "installed", plugins.installed.__wrapped__)


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    plugins.installed.cache_clear()


def test_an_installed_package_adds_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added(monkeypatch, "theirs", "def make(*of):\n    return 'theirs', of", tmp_path)
    assert engine_names() == ["flower-sim", "local", "theirs"]
    assert engine_named("theirs")(1, 2) == ("theirs", (1, 2))
    assert engine_named("local") is local.make


def test_an_installed_engine_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Needs(("json", "nowhere_to_be_found"), "pip install nowhere")
    added(monkeypatch, "theirs", f"from coterie.engines.base import Needs\nNEEDS = {needs}\nmake = None", tmp_path)
    with pytest.raises(CoterieError, match=r"^\[engine\] theirs needs nowhere_to_be_found: pip install nowhere$"):
        engine_named("theirs")


def test_an_installed_engine_cannot_take_a_name_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added(monkeypatch, "local", "make = None", tmp_path)
    with pytest.raises(CoterieError, match="which Coterie has already"):
        engine_named("another")
