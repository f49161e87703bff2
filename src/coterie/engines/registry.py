"""Finds the engine that a config names, and imports only that one.

The engine ``flower-sim`` is the module ``coterie.engines.flower_sim``, or the module that an installed package names in
its entry-point group ``coterie.engines``. It defines ``make``, and lists in ``NEEDS`` what it needs
beside Coterie's own dependencies. Importing the module must not import those libraries.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from coterie import engines
from coterie.engines.base import Engine, Needs
from coterie.plugins import check_new, installed, load
from coterie.types import CoterieError

GROUP = "coterie.engines"
Make = Callable[..., Engine]  # (config, federation, folder, root, cache); see coterie.engines.local.make
_MAKE = re.compile(r"^def make\(", re.MULTILINE)


def engine_named(name: str) -> Make:
    """The ``make`` function of the engine called ``name``.

    Raises :class:`CoterieError` for an unknown name, and where a library is missing that the engine needs.
    """
    module = _module(name)
    needs = getattr(module, "NEEDS", Needs())
    if missing := [library for library in needs.libraries if importlib.util.find_spec(library) is None]:
        raise CoterieError(f"[engine] {name} needs {' and '.join(missing)}: {needs.install}")
    make: Make = module.make
    return make


def engine_names() -> list[str]:
    """The names of all engines; none of them is imported."""
    return sorted([*_own(), *installed(GROUP)])


def _module(name: str) -> ModuleType:
    own = _own()
    check_new(GROUP, own)
    if name in own:
        return importlib.import_module(own[name])
    if name in installed(GROUP):
        module: ModuleType = load(installed(GROUP)[name])
        return module
    raise CoterieError(f"[engine] unknown engine {name!r}; the engines are {', '.join(engine_names())}")


def _own() -> dict[str, str]:
    """The modules of this package that define ``make``, by the names of their engines."""
    folder = Path(engines.__path__[0])
    modules = [file.stem for file in folder.glob("*.py") if _MAKE.search(file.read_text(encoding="utf-8"))]
    return {module.replace("_", "-"): f"{engines.__name__}.{module}" for module in modules}
