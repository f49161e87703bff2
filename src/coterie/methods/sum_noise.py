"""``[privacy] noise_at = "sum"``: each client adds a part of the noise, and a secure sum has the whole of it.

Of a group of n clients, at least ``needed`` are in any sum that is opened (:mod:`coterie.secure.session`), and fewer
than ``colluding`` n of these work with the server: they know their own noise and can take it off. The others are at
least m = needed - (ceil(colluding n) - 1). Each client cuts its whole update u_i to ``clip`` and adds Gaussian noise of
the standard deviation

    noise_multiplier * clip / sqrt(m)

to each value. So the sum over those that are left, less what the colluding ones know, has noise of at least
noise_multiplier * clip: that of the Gaussian mechanism. With more clients left, it has more.

Sums are over integers, in steps h of a grid. A client rounds its update toward zero, which makes it no longer, and its
noise, whatever the update, to the nearest step: it sends [u_i / h] + round(g_i / h). So no rounding error depends on
both. A sum of rounded Gaussians has the distribution of a rounded (Gaussian + (m - 1) uniform variables), which is made
from the Gaussian mechanism's output without the data, up to a distance in total variation below exp(-pi^2 s^2 / 2) per
value, s the standard deviation in steps. s is at least ``_STEPS``: that is less than 10^-500.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coterie.methods.privacy import PrivacySettings, client_multiplier, cut
from coterie.methods.releases import Release
from coterie.ops.noise import Noise
from coterie.secure import fixed_point
from coterie.secure.session import SecureSumError, Session
from coterie.types import ClientId, CoterieError, Reply, Tensors

MOST_BITS = 48  # the noise, a float64, has no finer digits
_STEPS = 16.0  # least standard deviation of a client's noise, in steps of the grid
_RANGE = 18.0  # in standard deviations: no value of the noise is that large (see SecureNoise)
_BEYOND = 10.0  # a Gaussian vector of d values is longer than sqrt(d) + this in one of 10^21 cases
_ROUNDING = 1e-9


@dataclass(frozen=True)
class SumNoise:
    """The noise of secure sums. ``source`` draws a client's own; the server has none."""

    settings: PrivacySettings
    multiplier: float
    source: Noise | None = None

    def colluding(self, members: int) -> int:
        """The most clients of a sum over ``members`` that may work with the server."""
        return max(0, math.ceil(self.settings.colluding * members - _ROUNDING) - 1)

    def deviation(self, members: int, needed: int) -> float:
        """The standard deviation of one client's noise in a sum over ``members``, of which ``needed`` have to be left.

        Of its update, which the sum weighs: with a weight p, p times that.
        """
        return self.multiplier * self.settings.clip / math.sqrt(needed - self.colluding(members))

    def bound(self, members: int, needed: int) -> float:
        """The range of the grid: more than any value of a client."""
        return self.settings.clip + _RANGE * self.deviation(members, needed)

    def check(self, members: int, needed: int, bits: int) -> None:
        """Raises :class:`CoterieError` where the grid is too coarse for the noise."""
        steps = self._steps(1 / members, members, needed, self.bound(members, needed), bits)
        if steps < _STEPS:
            raise CoterieError(
                f"[secure_aggregation] bits = {bits}: the noise of a client in a sum over {members} is {steps:.3g} "
                f"steps of the grid, and {_STEPS:g} are needed; raise bits or [privacy] noise_multiplier"
            )

    def longest(self, session: Session, survivors: int) -> float:
        """More than the length of the mean of as many clients, if each does as it should."""
        noise = self.deviation(len(session.members), session.needed) / math.sqrt(survivors)
        return self.settings.clip + noise * (math.sqrt(session.length) + _BEYOND)

    def update(self, reply: Reply, start: Tensors) -> Tensors:
        """What ``reply`` changes beside ``start``, at most ``clip`` long."""
        return cut(self.settings, reply.tensors, start)

    def encoded(self, client: ClientId, update: Tensors, share: float, session: Session) -> fixed_point.Integers:
        """A client's ``update``, of which ``share`` counts, with its noise, as integers: the same ones each time.

        Raises :class:`SecureSumError` where the session's grid is too coarse, or too narrow for a value.
        """
        assert self.source is not None
        members, needed = len(session.members), session.needed
        if self._steps(share, members, needed, session.bound, session.bits) < _STEPS:
            raise SecureSumError("the session's grid is too coarse for the noise of this client")
        values = share * np.concatenate([value.flatten().numpy() for value in update.values()])
        about = hashlib.sha256(f"{session.terms} {session.rnd} ".encode() + values.tobytes()).hexdigest()
        purpose = self.source.purpose(about, session.rnd)
        drawn = [self.source.normal(tuple(value.shape), purpose, client, str(key)) for key, value in update.items()]
        noise = share * self.deviation(members, needed) * np.concatenate([one.flatten().numpy() for one in drawn])
        try:
            return fixed_point.encode_noisy(values, noise, session.bound, session.bits)
        except ValueError as fault:
            raise SecureSumError(f"this client's update with its noise does not fit the sum: {fault}") from fault

    def _steps(self, share: float, members: int, needed: int, bound: float, bits: int) -> float:
        return share * self.deviation(members, needed) * 2.0 ** (bits - 1) / bound


def sum_noise(
    settings: PrivacySettings, releases: Sequence[Release], rounds: int, source: Noise | None = None
) -> SumNoise | None:
    """The noise of the secure sums of a run of so many ``rounds``; None where sums have none of their own."""
    if not settings.by_sum:
        return None
    return SumNoise(settings, client_multiplier(settings, releases, rounds), source)
