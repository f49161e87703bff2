"""The server's side of a session: what it sends in each step, and the sum at the end.

An answer that is malformed counts as none: its site has vanished. What a step may not open is not opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice

import numpy as np
import torch

from coterie.secure import masks, shamir
from coterie.secure.fixed_point import Integers
from coterie.secure.member import pair_key
from coterie.secure.messages import (
    Confirmations,
    Confirmed,
    Inbox,
    Keys,
    Masked,
    Revealed,
    Roster,
    Shares,
    Survivors,
)
from coterie.secure.session import SecureSumError, Session, Site, check_connected, neighbours_of, points_of

_TRIES = 200  # sets of shares that are tried where some are wrong


@dataclass(frozen=True)
class Opened:
    """A sum [length], modulo 2^64, over the vectors of ``survivors``. ``vanished``: the step in which each other site
    of the group was lost."""

    total: Integers
    survivors: tuple[Site, ...]
    vanished: Mapping[Site, str] = field(default_factory=dict)


@dataclass
class Collector:
    """The server in one session. The steps are called in order; each takes the answers that came.

    Every step raises :class:`SecureSumError` if too few sites are left, with how many.
    """

    session: Session
    _roster: Mapping[Site, Keys] = field(default_factory=dict)
    _neighbours: Mapping[Site, tuple[Site, ...]] = field(default_factory=dict)
    _dealers: tuple[Site, ...] = ()
    _survivors: tuple[Site, ...] = ()
    _total: Integers = field(default_factory=lambda: np.zeros(0, np.uint64))
    _vanished: dict[Site, str] = field(default_factory=dict)

    def roster(self, keys: Mapping[Site, Keys]) -> dict[Site, Roster]:
        """What follows step 1: everybody's keys, to everybody who sent some."""
        self._roster = dict(sorted(keys.items()))
        self._enough(keys, self.session.members, "keys")
        self._neighbours = neighbours_of({s: k.masks for s, k in keys.items()}, self.session.neighbours)
        return dict.fromkeys(self._roster, Roster(self._roster))

    def inboxes(self, shares: Mapping[Site, Shares]) -> dict[Site, Inbox]:
        """What follows step 2: to each site the shares that were sealed for it."""
        self._dealers = self._enough(shares, self._roster, "shares")
        return {
            site: Inbox(
                self._dealers,
                {d: shares[d].sealed[site] for d in self._dealers if d != site and site in shares[d].sealed},
            )
            for site in self._dealers
        }

    def survivors(self, masked: Mapping[Site, Masked]) -> dict[Site, Survivors]:
        """What follows step 3: the list of those whose vectors arrived. Adds the vectors up."""
        fit = {site: of.values for site, of in masked.items() if self._fits(of.values)}
        self._survivors = self._enough(fit, self._dealers, "values")
        check_connected(self._neighbours, self._survivors, self._survivors)
        self._total = np.zeros(self.session.length, np.uint64)
        for site in self._survivors:
            self._total += fit[site].numpy().view(np.uint64)
        return dict.fromkeys(self._survivors, Survivors(self._survivors))

    def confirmations(self, confirmed: Mapping[Site, Confirmed]) -> dict[Site, Confirmations]:
        """What follows step 4: the signatures, to those who signed."""
        signers = self._enough(confirmed, self._survivors, "survivors")
        check_connected(self._neighbours, self._survivors, signers)
        return dict.fromkeys(signers, Confirmations({site: confirmed[site].signature for site in signers}))

    def opened(self, revealed: Mapping[Site, Revealed]) -> Opened:
        """The sum, without masks. Raises :class:`SecureSumError` where shares are missing or do not fit."""
        self._enough(revealed, self._survivors, "reveal")
        total, digest = self._total.copy(), self.session.digest
        for site in self._survivors:
            seed = self._joined(site, {h: r.seeds[site] for h, r in revealed.items() if site in r.seeds}, own=True)
            total -= masks.mask(masks.derived(seed, digest, "self"), self.session.length)
        for gone in sorted({*self._dealers} - {*self._survivors}):
            key = self._joined(gone, {h: r.masks[gone] for h, r in revealed.items() if gone in r.masks}, own=False)
            for site in sorted({*self._neighbours[gone]} & {*self._survivors}):
                pair = pair_key(self.session, key, self._roster[site].masks, gone, site)
                pairs = masks.mask(pair, self.session.length)
                total = total - pairs if site < gone else total + pairs
        vanished = {site: step for site, step in self._vanished.items() if site not in self._survivors}
        return Opened(total, self._survivors, vanished)

    def _joined(self, site: Site, shares: Mapping[Site, str], *, own: bool) -> bytes:
        """The seed of ``site`` (``own``), or its secret mask key, from shares by their holders.

        A set of shares with a wrong one gives a secret that does not fit what the site has signed: others are tried.
        """
        points = points_of(self._roster)
        holders = {*self._neighbours[site], site}
        by_point = {points[h]: share for h, text in shares.items() if h in holders and (share := _share(text))}
        needed = self.session.shares_needed(len(holders))
        for chosen in islice(combinations(sorted(by_point), needed), _TRIES):
            try:
                secret = shamir.join({x: by_point[x] for x in chosen})
            except ValueError:
                continue
            public = hashlib.sha256(secret).digest() if own else masks.public_key(secret)
            if public.hex() == (self._roster[site].seed if own else self._roster[site].masks):
                return secret
        what = "are too few" if len(by_point) < needed else "do not fit what it signed"
        raise SecureSumError(f"the shares of {site} {what}: {len(by_point)}, and {needed} are needed")

    def _fits(self, values: torch.Tensor) -> bool:
        return values.dtype == torch.int64 and tuple(values.shape) == (self.session.length,)

    def _enough(self, answers: Collection[Site], expected: Collection[Site], step: str) -> tuple[Site, ...]:
        """The sites of ``answers``, sorted. Notes who vanished; raises where too few are left."""
        here = tuple(sorted({*answers} & {*expected}))
        self._vanished |= {site: step for site in expected if site not in here}
        if len(here) < self.session.needed:
            raise SecureSumError(
                f"{len(here)} of its {len(self.session.members)} sites were left after the step {step!r}, and "
                f"{self.session.needed} are needed"
            )
        return here


def _share(text: str) -> bytes | None:
    try:
        share = bytes.fromhex(text)
    except ValueError:
        return None
    return share if len(share) == shamir.SHARE_BYTES else None
