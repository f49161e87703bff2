"""``[privacy] unit = "example"``: how a client's steps are sampled, hidden and counted, so that no row of it shows.

Every step of a client's training draws each of its rows with probability lot / rows, cuts each drawn row's gradient to
``clip``, and adds noise of ``noise_multiplier * clip`` to their sum (DP-SGD; Abadi et al., arXiv 1607.00133). A client
that has a budget calculates its noise for its own number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from coterie.methods.privacy import PrivacySettings
from coterie.ops.accounting import Noised, multiplier_for
from coterie.ops.noise import Noise
from coterie.requests import Optim


@dataclass(frozen=True)
class RowPrivacy:
    """What one client's training of one round is accounted as: so many ``rows``, with these settings and no others."""

    clip: float
    multiplier: float
    noise: Noise
    optim: Optim
    rows: int

    @property
    def lot(self) -> int:
        return lot(self.optim, self.rows)


def lot(optim: Optim, rows: int) -> int:
    """The rows of a step, as expected."""
    return min(rows, optim.batch_size * optim.accumulate)


def step_of(multiplier: float, optim: Optim, rows: int) -> Noised:
    """One step of a client with so many ``rows``, as the accountant sees it."""
    drawn = lot(optim, rows)
    return Noised(multiplier) if drawn >= rows else Noised(multiplier, "poisson", rows, drawn)


def row_multiplier(settings: PrivacySettings, optim: Optim, rows: int, rounds: int) -> float:
    """``noise_multiplier``, or the least with which all steps of so many ``rounds`` keep to ``epsilon``."""
    if settings.noise_multiplier:
        return settings.noise_multiplier
    planned = (step_of(1.0, optim, rows),) * (optim.steps_on(rows) * rounds)
    return multiplier_for(settings.epsilon, settings.delta, planned)
