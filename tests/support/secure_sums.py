"""Secure sums of a few sites in this process, with sites that vanish before any step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from coterie.secure.fixed_point import Integers
from coterie.secure.identity import Identity, identities
from coterie.secure.session import Session
from coterie.secure.steps import Ask, Party, in_process

KNOWN = identities([f"s{i}" for i in range(12)])  # keys are slow to make


def session(sites: int, **changes: Any) -> Session:
    settings: dict[str, Any] = {
        "run": "run 1",
        "rnd": 1,
        "group": "all",
        "members": tuple(f"s{i}" for i in range(sites)),
        "length": 5,
        "layout": ("five numbers",),
        "most_examples": 0,
        "total": float(sites),
        "bound": 1.0,
        "bits": 40,
        "threshold": 2 / 3,
        "min_group": 3,
        "neighbours": 0,
    }
    return Session(**settings | changes)


def vectors(of: Session) -> dict[str, Integers]:
    """Any 64 bits for each member: the sum is modulo 2^64."""
    draw = np.random.default_rng(0)
    return {site: draw.integers(0, 2**64, of.length, dtype=np.uint64) for site in of.members}


def parties(of: Session, own: Mapping[str, Integers], known: Mapping[str, Identity] = KNOWN) -> dict[str, Party]:
    return {site: Party(site, known[site], lambda _, site=site: own[site]) for site in of.members}  # type: ignore[misc]


def vanishing(ask: Ask, gone: Mapping[str, Collection[str]]) -> Ask:
    """As ``ask``, but the sites of ``gone[step]`` are away from that step on."""
    away: set[str] = set()

    def asked(step: str, messages: Mapping[str, bytes]) -> dict[str, bytes]:
        away.update(gone.get(step, ()))
        return dict(ask(step, {site: blob for site, blob in messages.items() if site not in away}))

    return asked


def opened(of: Session, own: Mapping[str, Integers], gone: Mapping[str, Collection[str]]) -> Any:
    """The result of one session, whose sites vanish as ``gone`` says."""
    from coterie.secure.steps import sums

    return sums({"one": of}, vanishing(in_process(parties(of, own)), gone))["one"]
