"""What the server and the sites of a session send to each other. Bytes are written as hexadecimal digits."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from coterie.secure.session import SecureSumError, Session, Site


@dataclass(frozen=True)
class Keys:
    """Step 1, from a site: its public keys for masks and for seals, and the SHA-256 of its seed, signed."""

    masks: str
    seals: str
    seed: str
    signature: str


@dataclass(frozen=True)
class Roster:
    """Step 2, to a site: the keys of everybody who takes part."""

    keys: Mapping[Site, Keys]


@dataclass(frozen=True)
class Shares:
    """Step 2, from a site: its sealed shares, by the neighbour that can open them."""

    sealed: Mapping[Site, str]


@dataclass(frozen=True)
class Inbox:
    """Step 3, to a site: who has sent shares, and the sealed shares that this site's neighbours sent to it."""

    dealers: tuple[Site, ...]
    sealed: Mapping[Site, str]


@dataclass(frozen=True)
class Masked:
    """Step 3, from a site: its masked vector [length], the 64 bits of each integer as int64."""

    values: Tensor


@dataclass(frozen=True)
class Survivors:
    """Step 4, to a site: whose masked vectors arrived."""

    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Confirmed:
    """Step 4, from a site: its signature under the list."""

    signature: str


@dataclass(frozen=True)
class Confirmations:
    """Step 5, to a site: the signatures under the list."""

    signatures: Mapping[Site, str]


@dataclass(frozen=True)
class Revealed:
    """Step 5, from a site: its shares of the seeds of survivors, and of the mask keys of those that vanished."""

    seeds: Mapping[Site, str]
    masks: Mapping[Site, str]


def signed_keys(session: Session, site: Site, masks: str, seals: str, seed: str) -> bytes:
    """What a site's signature under its keys covers."""
    return json.dumps(["coterie secure sum, keys", session.digest.hex(), site, masks, seals, seed]).encode()


def signed_survivors(session: Session, sites: Collection[Site]) -> bytes:
    """What a site's signature under the list of survivors covers."""
    return json.dumps(["coterie secure sum, survivors", session.digest.hex(), sorted(sites)]).encode()


def from_hex(text: str, size: int) -> bytes:
    """The ``size`` bytes in ``text``. Raises :class:`SecureSumError` for anything else."""
    try:
        data = bytes.fromhex(text)
    except ValueError as fault:
        raise SecureSumError("a message has text in place of bytes") from fault
    if len(data) != size:
        raise SecureSumError(f"a message has {len(data)} bytes in place of {size}")
    return data
