"""Coterie: federated fine-tuning of Hugging Face language models with mixtures of LoRA experts.

    import coterie

    summary = coterie.run("triage.toml", "runs/triage")
    north = coterie.load("runs/triage", client="north")

It also has what a method is written with: :class:`Method`, the types that travel, and the requests. Each name is
imported when it is first used, so ``import coterie`` itself is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.adapters.model import ClientModel
    from coterie.artifacts.history import results
    from coterie.artifacts.load import load
    from coterie.comparison import compare
    from coterie.config.load import load_config
    from coterie.config.sections import Config
    from coterie.experiment import run
    from coterie.methods.base import Method
    from coterie.methods.plan import MethodSettings, Plan
    from coterie.requests import (
        Balance,
        ClientProgram,
        HoldOut,
        LastRanks,
        Observe,
        Observed,
        Optim,
        Proximal,
        Score,
        Scored,
        Train,
        Trained,
    )
    from coterie.types import (
        Bank,
        BaseSpec,
        ClientId,
        ClientInfo,
        ClientResult,
        CoterieError,
        GateSpec,
        Instruction,
        Key,
        Part,
        Personal,
        Reply,
        Tensors,
    )

__version__ = "0.1.0"
__all__ = [
    "Balance",
    "Bank",
    "BaseSpec",
    "ClientId",
    "ClientInfo",
    "ClientModel",
    "ClientProgram",
    "ClientResult",
    "Config",
    "CoterieError",
    "GateSpec",
    "HoldOut",
    "Instruction",
    "Key",
    "LastRanks",
    "Method",
    "MethodSettings",
    "Observe",
    "Observed",
    "Optim",
    "Part",
    "Personal",
    "Plan",
    "Proximal",
    "Reply",
    "Score",
    "Scored",
    "Tensors",
    "Train",
    "Trained",
    "__version__",
    "compare",
    "load",
    "load_config",
    "results",
    "run",
]
_FROM = {
    "adapters.model": ("ClientModel",),
    "artifacts.history": ("results",),
    "artifacts.load": ("load",),
    "comparison": ("compare",),
    "config.load": ("load_config",),
    "config.sections": ("Config",),
    "experiment": ("run",),
    "methods.base": ("Method",),
    "methods.plan": ("MethodSettings", "Plan"),
    "requests": (
        *("Balance", "ClientProgram", "HoldOut", "LastRanks", "Observe", "Observed", "Optim", "Proximal", "Score"),
        *("Scored", "Train", "Trained"),
    ),
    "types": (
        *("Bank", "BaseSpec", "ClientId", "ClientInfo", "ClientResult", "CoterieError", "GateSpec", "Instruction"),
        *("Key", "Part", "Personal", "Reply", "Tensors"),
    ),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> object:
    """The public name ``name``, imported now."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
