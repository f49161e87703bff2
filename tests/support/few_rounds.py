"""Settings of every method for a run of three rounds over a handful of rows: small, and what is special switched on."""

from __future__ import annotations

from typing import Any

from coterie.methods.registry import method_named
from coterie.requests import Optim

ROUNDS = 3
OPTIM = Optim(learning_rate=0.01, batch_size=4, epochs=1)
SETTINGS: dict[str, dict[str, Any]] = {
    "fedlease": {"warmup_rounds": 1, "experts": 3, "download": "used", "download_threshold": 0.25},
    "fedamole": {"experts": 6, "dropout_masks": "per_expert", "padding": "counted"},
    "hetlora": {"prune": 0.7, "penalty": 1.0},
    "smartfed": {
        "router": "paper",
        "active": 3,
        "budgets": {"mood-0": 1},
        "fresh_rank": 2,
        "train_experts": ("two",),
        "drop_below": 0.1,
    },
}


def ranks_of(name: str) -> tuple[int, ...]:
    """Different ranks for the clients of a method that allows it."""
    return (2, 3, 1) if method_named(name).mixed_ranks else ()
