"""The server's side of secure sums over sites: a message per step to each site that is in a sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coterie.deploy.remote import RemoteEngine
from coterie.deploy.secure_site import run_name
from coterie.flower.message import Message
from coterie.methods.secure import Members
from coterie.secure.session import Session, Site
from coterie.secure.steps import Ask

_KEYS_BYTES = 2**12  # per pair of sites and session: keys, sealed shares, signatures, in hexadecimal digits
_BESIDE = 2**20
_VALUE_BYTES = 8


@dataclass(frozen=True)
class RemoteSums:
    """Reaches the sites of ``engine``, which keep their tensors, for secure sums."""

    engine: RemoteEngine
    tensors_stay: bool = True

    @property
    def run(self) -> str:
        agreement = self.engine.sites.agreement
        return run_name(agreement.run, agreement.attempt, agreement.digest)

    def carrier(self, sessions: Mapping[str, Session], clients: Members) -> Ask:
        """What takes a step to each site that is in a sum, in one message."""
        limit = _BESIDE + sum(_VALUE_BYTES * s.length + _KEYS_BYTES * len(s.members) for s in sessions.values())

        def ask(step: str, messages: Mapping[Site, bytes]) -> dict[Site, bytes]:
            limits = dict.fromkeys(messages, limit)
            arrivals = self.engine.exchange("query.sum", messages, clients.rnd, {"step": step}, limits)
            return {each.client: each.answer.body for each in arrivals if isinstance(each.answer, Message)}

        return ask
