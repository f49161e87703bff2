"""``[privacy] unit = "example"``: how a client's steps are sampled, hidden and counted, so that no row of it shows.

Every step of a client's training draws each of its rows with probability lot / rows, cuts each drawn row's gradient to
``clip``, and adds noise of ``noise_multiplier * clip`` to their sum (DP-SGD; Abadi et al., arXiv 1607.00133). A client
that has a budget calculates its noise for its own number of rows.

What a client measures on its rows (FedAMoLE's embeddings) is a mean over rows: each row's is cut to ``embedding_clip``,
and their sum gets noise. Its multiplier is that of a step divided by q sqrt(S), with S steps of a round that draw the
share q of the rows: so it costs about what the training of a round does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coterie.methods.privacy import PrivacySettings
from coterie.methods.releases import Release
from coterie.ops.accounting import Noised, multiplier_for
from coterie.ops.noise import Noise
from coterie.requests import Optim


@dataclass(frozen=True)
class RowPrivacy:
    """What one client's round is accounted as: training on so many ``rows``, with these settings and no others.

    ``measures``: whether it also measures something on its rows in this round, once.
    """

    clip: float
    multiplier: float
    noise: Noise
    optim: Optim
    rows: int
    embedding_clip: float = 1.0
    measures: bool = False

    @property
    def lot(self) -> int:
        return lot(self.optim, self.rows)

    @property
    def measured(self) -> Noised:
        """What it measures, as the accountant sees it."""
        return measured_of(self.multiplier, self.optim, self.rows)


def lot(optim: Optim, rows: int) -> int:
    """The rows of a step, as expected."""
    return min(rows, optim.batch_size * optim.accumulate)


def step_of(multiplier: float, optim: Optim, rows: int) -> Noised:
    """One step of a client with so many ``rows``, as the accountant sees it."""
    drawn = lot(optim, rows)
    return Noised(multiplier) if drawn >= rows else Noised(multiplier, "poisson", rows, drawn)


def measured_of(multiplier: float, optim: Optim, rows: int) -> Noised:
    """What a client with so many ``rows`` measures on all of them, as the accountant sees it."""
    share = lot(optim, rows) / rows
    return Noised(multiplier / (share * math.sqrt(optim.steps_on(rows))))


def measures_in(releases: Sequence[Release], rnd: int, rounds: int) -> bool:
    """Whether a client measures something on its rows in round ``rnd`` that it sends with noise."""
    return any(release.mean_of_rows and release.sent_in(rnd, rounds) for release in releases)


def planned_of(
    multiplier: float, optim: Optim, rows: int, rounds: int, releases: Sequence[Release] = ()
) -> tuple[Noised, ...]:
    """All that so many ``rounds`` release of a client's rows, as the accountant sees it."""
    steps = (step_of(multiplier, optim, rows),) * (optim.steps_on(rows) * rounds)
    measured = sum(measures_in(releases, rnd, rounds) for rnd in range(1, rounds + 1))
    return steps + (measured_of(multiplier, optim, rows),) * measured


def row_multiplier(
    settings: PrivacySettings, optim: Optim, rows: int, rounds: int, releases: Sequence[Release] = ()
) -> float:
    """``noise_multiplier``, or the least with which all steps of so many ``rounds`` keep to ``epsilon``.

    And with them what the ``releases`` say of what is measured on rows.
    """
    if settings.noise_multiplier:
        return settings.noise_multiplier
    return multiplier_for(settings.epsilon, settings.delta, planned_of(1.0, optim, rows, rounds, releases))
