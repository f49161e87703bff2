"""A site's side of a session: what it answers in each step, and what it refuses."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
import torch

from coterie.secure import masks, shamir
from coterie.secure.fixed_point import Integers
from coterie.secure.identity import Identity
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
    from_hex,
    signed_keys,
    signed_survivors,
)
from coterie.secure.session import SecureSumError, Session, Site, check_connected, neighbours_of, points_of

T = TypeVar("T")


@dataclass
class Member:
    """One site in one session. Each step is answered once: the same message again gets the same answer, another none.

    Every step raises :class:`SecureSumError` for what this site does not agree to.
    """

    session: Session
    site: Site
    identity: Identity
    _mask_key: bytes = field(default_factory=masks.secret_key, repr=False)
    _seal_key: bytes = field(default_factory=masks.secret_key, repr=False)
    _seed: bytes = field(default_factory=lambda: secrets.token_bytes(shamir.SECRET_BYTES), repr=False)
    _received: dict[str, object] = field(default_factory=dict, repr=False)
    _answered: dict[str, object] = field(default_factory=dict, repr=False)
    _neighbours: tuple[Site, ...] = ()
    _graph: Mapping[Site, tuple[Site, ...]] = field(default_factory=dict, repr=False)
    _own_shares: tuple[bytes, bytes] = field(default=(b"", b""), repr=False)

    def __post_init__(self) -> None:
        self.session.check()
        if self.site not in self.session.members:
            raise SecureSumError(f"{self.site} is not in the group")

    def keys(self) -> Keys:
        """Step 1: new public keys, signed."""
        return self._once("keys", self.session, self._make_keys)

    def shares(self, roster: Roster) -> Shares:
        """Step 2: shares of both secrets, sealed for each neighbour. Checks everybody's signature first."""
        self._need("keys")
        return self._once("shares", roster, lambda: self._make_shares(roster))

    def values(self, inbox: Inbox, vector: Callable[[], Integers]) -> Masked:
        """Step 3: the masked vector. ``vector`` is called only if this site agrees."""
        self._need("shares")
        return self._once("values", inbox, lambda: self._make_values(inbox, vector))

    def survivors(self, survivors: Survivors) -> Confirmed:
        """Step 4: this site's signature under the list of those whose vectors arrived."""
        self._need("values")
        return self._once("survivors", survivors, lambda: self._make_confirmation(survivors))

    def reveal(self, confirmations: Confirmations) -> Revealed:
        """Step 5: one kind of share for each neighbour and itself, once enough sites have signed the same list."""
        self._need("survivors")
        return self._once("reveal", confirmations, lambda: self._make_reveal(confirmations))

    @property
    def agreed(self) -> tuple[Site, ...]:
        """The survivors that this site signed."""
        return cast(Survivors, self._received["survivors"]).sites

    def _once(self, step: str, message: object, make: Callable[[], T]) -> T:
        if step not in self._received:
            answer = make()
            self._received[step], self._answered[step] = message, answer
        elif self._received[step] != message:
            raise SecureSumError(f"the server has sent another message for the step {step!r} of this session before")
        return cast(T, self._answered[step])

    def _need(self, step: str) -> None:
        if step not in self._answered:
            raise SecureSumError(f"the step {step!r} of this session has not been done here")

    def _make_keys(self) -> Keys:
        pairs, seals = masks.public_key(self._mask_key).hex(), masks.public_key(self._seal_key).hex()
        seed = hashlib.sha256(self._seed).hexdigest()
        return Keys(pairs, seals, seed, self.identity.sign(signed_keys(self.session, self.site, pairs, seals, seed)))

    def _make_shares(self, roster: Roster) -> Shares:
        self._check_list(roster.keys, self.session.members, "keys")
        if roster.keys[self.site] != self._answered["keys"]:
            raise SecureSumError("the server has changed the keys of this site")
        for site, keys in sorted(roster.keys.items()):
            signed = signed_keys(self.session, site, keys.masks, keys.seals, keys.seed)
            self.identity.check(site, signed, keys.signature)
        publics = {site: keys.masks for site, keys in roster.keys.items()}
        self._graph = neighbours_of(publics, self.session.neighbours)
        self._neighbours = self._graph[self.site]
        points = points_of(roster.keys)
        own = [points[site] for site in self._holders]
        needed = self.session.shares_needed(len(own))
        of_seed, of_key = shamir.split(self._seed, needed, own), shamir.split(self._mask_key, needed, own)
        both = {site: (of_seed[points[site]], of_key[points[site]]) for site in self._holders}
        self._own_shares = both[self.site]
        boxes = {to: self._seal_for(roster, to, self.site, to) for to in self._neighbours}
        return Shares({to: masks.seal(key, b"".join(both[to])).hex() for to, key in boxes.items()})

    def _make_values(self, inbox: Inbox, vector: Callable[[], Integers]) -> Masked:
        roster = cast(Roster, self._received["shares"])
        self._check_list(inbox.dealers, roster.keys, "shares")
        masked = vector()
        if masked.shape != (self.session.length,):
            raise SecureSumError(f"this site's vector has {masked.size} values, the session's {self.session.length}")
        masked = masked + masks.mask(masks.derived(self._seed, self.session.digest, "self"), self.session.length)
        for other in sorted({*self._neighbours} & {*inbox.dealers}):
            key = pair_key(self.session, self._mask_key, roster.keys[other].masks, self.site, other)
            pair = masks.mask(key, self.session.length)
            masked = masked + pair if self.site < other else masked - pair
        return Masked(torch.from_numpy(masked.view(np.int64)))

    def _make_confirmation(self, survivors: Survivors) -> Confirmed:
        self._check_list(survivors.sites, cast(Inbox, self._received["values"]).dealers, "values")
        check_connected(self._graph, survivors.sites, survivors.sites)
        return Confirmed(self.identity.sign(signed_survivors(self.session, survivors.sites)))

    def _make_reveal(self, confirmations: Confirmations) -> Revealed:
        roster, inbox = cast(Roster, self._received["shares"]), cast(Inbox, self._received["values"])
        self._check_list(confirmations.signatures, self.agreed, "signatures", own=False)
        for site, signature in sorted(confirmations.signatures.items()):
            self.identity.check(site, signed_survivors(self.session, self.agreed), signature)
        check_connected(self._graph, self.agreed, confirmations.signatures)
        seeds, keys = {}, {}
        for site in {*self._holders} & {*inbox.dealers}:
            share = self._share_of(site, roster, inbox)
            if share is None:
                continue
            if site in self.agreed:
                seeds[site] = share[0].hex()
            else:
                keys[site] = share[1].hex()
        return Revealed(seeds, keys)

    def _share_of(self, site: Site, roster: Roster, inbox: Inbox) -> tuple[bytes, bytes] | None:
        """This site's shares of the seed and of the mask key of ``site``; None where they were not sealed rightly."""
        if site == self.site:
            return self._own_shares
        try:
            sealed = bytes.fromhex(inbox.sealed.get(site, ""))
        except ValueError:
            return None
        plain = masks.unseal(self._seal_for(roster, site, site, self.site), sealed)
        size = shamir.SHARE_BYTES
        return (plain[:size], plain[size:]) if plain is not None and len(plain) == 2 * size else None

    def _seal_for(self, roster: Roster, other: Site, dealer: Site, holder: Site) -> bytes:
        """The key of the box that ``dealer`` seals for ``holder``, one of which is this site, the other ``other``."""
        public = from_hex(roster.keys[other].seals, masks.KEY_BYTES)
        return _exchanged(self._seal_key, public, self.session, "shares", dealer, holder)

    @property
    def _holders(self) -> tuple[Site, ...]:
        return (*self._neighbours, self.site)

    def _check_list(self, sites: Collection[Site], of: Collection[Site], what: str, *, own: bool = True) -> None:
        """Raises :class:`SecureSumError` unless ``sites`` are enough, among ``of``, and this site is one of them."""
        if len(set(sites)) != len(sites) or not {*sites} <= {*of}:
            raise SecureSumError(f"the server's list of those that sent {what} names others than the step before")
        if len(sites) < self.session.needed:
            raise SecureSumError(
                f"only {len(sites)} of {len(self.session.members)} sites sent {what}; {self.session.needed} are needed"
            )
        if own and self.site not in sites:
            raise SecureSumError(f"the server's list of those that sent {what} leaves this site out")


def pair_key(session: Session, secret: bytes, public: str, one: Site, other: Site) -> bytes:
    """The key of the mask that ``one`` and ``other`` share, by either's secret key and the other's public one."""
    return _exchanged(secret, from_hex(public, masks.KEY_BYTES), session, "pair", *sorted((one, other)))


def _exchanged(secret: bytes, public: bytes, session: Session, purpose: str, *sites: Site) -> bytes:
    try:
        return masks.shared_key(secret, public, session.digest, purpose, *sites)
    except ValueError as fault:
        raise SecureSumError("a site's public key is not one of X25519") from fault
