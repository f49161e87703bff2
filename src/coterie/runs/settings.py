"""The settings of the rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sampling = Literal["fixed", "poisson"]


@dataclass(frozen=True)
class RoundSettings:
    """The settings of the rounds; see the config section ``[run]``."""

    rounds: int
    seed: int
    cohort: float = 1.0
    quorum: float = 0.5
    norm_bound: float = 1e4
    update_bound: float = 10.0
    max_share: float | None = None
    evaluate_every: int = 1
    keep_checkpoints: int = 2
    export: Literal["best", "last"] = "best"
    sampling: Sampling = "fixed"
    primary: str = "accuracy"  # the metric that chooses the best round
