"""How FedLEASE weighs its experts, by the setting ``routing``."""

from __future__ import annotations

from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.types import GateSpec


def gate_of(settings: FedLEASESettings, own: int) -> GateSpec:
    """The gate of a client whose cluster is ``own``."""
    match settings.routing:
        case "adaptive":
            return GateSpec("slot_top_k", {"own": own})
        case "top_k":
            return GateSpec("top_k", {"k": settings.top_k})
        case "dense":
            return GateSpec("softmax")
        case "own":
            return GateSpec("constant")


def slots_of(settings: FedLEASESettings, experts: int) -> int:
    """The outputs of a router over so many experts."""
    return 2 * experts - 1 if settings.routing == "adaptive" else experts
