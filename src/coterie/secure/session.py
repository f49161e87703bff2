"""What all sites of one secure sum agree on, and who is whose neighbour."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from coterie.secure.fixed_point import most_members
from coterie.types import CoterieError

Site = str
FEWEST = 3  # sites of a sum: of two, each can compute the other's vector from it


class SecureSumError(CoterieError):
    """Why a site takes no part in a step, or why the server cannot open a sum."""


@dataclass(frozen=True)
class Session:
    """One sum: over the vectors [``length``] of ``members``, for a ``group`` in round ``rnd`` of ``run``.

    ``layout`` names what the vector holds, in order. A site weighs its vector with its number of examples, at
    most ``most_examples`` (0: with 1), divided by ``total``. ``bound`` and ``bits`` are those of
    :mod:`coterie.secure.fixed_point`. All of it is in :attr:`digest`, which every key and signature depends on: a
    server that says something else to one site spoils the sum.

    ``start`` has a digest of what each tensor of the layout starts from, and ``instruction`` one of what all members
    were sent alike ("" where each gets its own). Sites check them against what they received.
    """

    run: str
    rnd: int
    group: str
    members: tuple[Site, ...]
    length: int
    layout: tuple[str, ...]
    most_examples: int
    total: float
    bound: float
    bits: int
    threshold: float
    min_group: int
    neighbours: int
    start: tuple[str, ...] = ()
    instruction: str = ""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names in the layout, without their shapes."""
        return tuple(text.rpartition(" ")[0] for text in self.layout)

    @property
    def terms(self) -> str:
        """A digest of all but the run, the round and the group's name."""
        parts = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("run", "rnd", "group")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).digest()

    @property
    def needed(self) -> int:
        """The sites that have to be left after every step."""
        return needed_of(len(self.members), self.threshold, self.min_group)

    def shares_needed(self, holders: int) -> int:
        """The shares that give a secret back, of as many as ``holders``."""
        return _part(self.threshold, holders)

    def check(self) -> None:
        """Raises :class:`SecureSumError` for a session that no site may take part in."""
        if len(set(self.members)) != len(self.members) or self.length < 1 or not 0 < self.total < math.inf:
            raise SecureSumError("the session names a site twice, or has no values")
        if len(set(self.tensors)) != len(self.tensors):
            raise SecureSumError("the session names a tensor twice")
        if self.min_group < FEWEST:
            raise SecureSumError(
                f"the session would open a sum of {self.min_group}, and of fewer than {FEWEST} each member can compute "
                "the others' updates"
            )
        if not 0.5 < self.threshold <= 1:
            raise SecureSumError(f"the session's threshold is {self.threshold:g}; it must be above 0.5 and at most 1")
        if len(self.members) < self.needed:
            raise SecureSumError(f"the group has {len(self.members)} sites, and {self.needed} are needed")
        if not 1 < self.bits < 63 or not 0 < self.bound < math.inf or len(self.members) > most_members(self.bits):
            raise SecureSumError(f"{len(self.members)} numbers of {self.bits} bits could overflow 64 bits")


def needed_of(members: int, threshold: float, min_group: int) -> int:
    """The sites of a group of ``members`` without which its sum is not opened."""
    return max(min_group, _part(threshold, members))


def _part(share: float, of: int) -> int:
    return math.ceil(share * of - 1e-9)


def neighbours_of(keys: Mapping[Site, str], wanted: int) -> dict[Site, tuple[Site, ...]]:
    """Every site's neighbours: all others, or ``wanted`` of them (rounded up to an even number; 0: all).

    The sites stand in a circle, in an order that depends on everybody's ``keys``, and a site's neighbours are the
    nearest on both sides. So the graph is regular and connected, and no one site decides who stands beside whom.
    """
    sites, each_side = sorted(keys), math.ceil(wanted / 2)
    if not wanted or 2 * each_side >= len(sites) - 1:
        return {site: tuple(other for other in sites if other != site) for site in sites}
    seed = hashlib.sha256(json.dumps(sorted(keys.items())).encode()).digest()
    circle = sorted(sites, key=lambda site: hashlib.sha256(seed + site.encode()).digest())
    n = len(circle)
    steps = [step for step in range(-each_side, each_side + 1) if step]
    return {site: tuple(sorted(circle[(i + step) % n] for step in steps)) for i, site in enumerate(circle)}


def check_connected(
    neighbours: Mapping[Site, Collection[Site]], survivors: Collection[Site], signers: Collection[Site]
) -> None:
    """Raises :class:`SecureSumError` where the survivors fall apart into parts whose sums could be told apart.

    Only pairs with at least one of ``signers`` count: a signer has seen every survivor's shares, so the pair's mask is
    in its vector. Between two others a server may have left it out.
    """
    seen, todo = set(), [min(survivors)]
    while todo:
        site = todo.pop()
        if site not in seen:
            seen.add(site)
            todo += [o for o in neighbours[site] if o in survivors and (site in signers or o in signers)]
    if len(seen) < len({*survivors}):
        raise SecureSumError(
            f"the {len(survivors)} sites that are left share too few masks: the sum of some of them could be opened "
            "alone; raise [secure_aggregation] neighbours"
        )


def points_of(sites: Collection[Site]) -> dict[Site, int]:
    """The point at which each of ``sites`` holds its shares."""
    return {site: number for number, site in enumerate(sorted(sites), start=1)}
