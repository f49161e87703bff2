"""Coterie: federated fine-tuning of Hugging Face language models with mixtures of LoRA experts.

    import coterie

    summary = coterie.run("triage.toml", "runs/triage")
    north = coterie.load("runs/triage", client="north")

Everything named here is imported when it is first used: ``import coterie`` itself is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.adapters.model import ClientModel, load
    from coterie.comparison import compare
    from coterie.config.load import load_config
    from coterie.config.sections import Config
    from coterie.experiment import run
    from coterie.methods.base import Method
    from coterie.methods.plan import MethodSettings
    from coterie.requests import Observe, Score, Train
    from coterie.types import Bank, CoterieError

__version__ = "0.1.0"
__all__ = [
    "Bank",
    "ClientModel",
    "Config",
    "CoterieError",
    "Method",
    "MethodSettings",
    "Observe",
    "Score",
    "Train",
    "__version__",
    "compare",
    "load",
    "load_config",
    "run",
]
_MODULES = {
    "ClientModel": "coterie.adapters.model",
    "load": "coterie.adapters.model",
    "compare": "coterie.comparison",
    "load_config": "coterie.config.load",
    "Config": "coterie.config.sections",
    "run": "coterie.experiment",
    "Method": "coterie.methods.base",
    "MethodSettings": "coterie.methods.plan",
    **dict.fromkeys(("Observe", "Score", "Train"), "coterie.requests"),
    **dict.fromkeys(("Bank", "CoterieError"), "coterie.types"),
}


def __getattr__(name: str) -> object:
    """The public name ``name``, imported now."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
