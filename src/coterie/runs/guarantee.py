"""What a run with ``[privacy]`` guarantees, in one record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Guarantee:
    """What a run guarantees, as its summary and its report say it.

    ``colluding``: where the noise is in secure sums, it holds if fewer than this share of a sum's clients work with the
    server.
    """

    unit: str
    epsilon: float
    delta: float
    accountant: str
    neighbours: str
    noise_multiplier: float
    clip: float
    noise_at: str
    noise_source: str
    cohort: str
    releases: Mapping[str, int]
    metrics: str
    stopped: str = ""
    colluding: float = 0.0
