"""The messages of a secure sum, as one of four sites sends them to the server and as the server sends them to it.

An honest session is run once. Then any message can be tried for the honest one, with all others as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import secure_sums
from coterie.secure.collector import Opened
from coterie.secure.member import Member
from coterie.secure.steps import STEPS, Party, in_process, sums

SITE, GONE = "s0", "s3"  # GONE vanishes before it sends its vector: its mask key is revealed


class Recorded:
    """The bytes of an honest session, by step and site, and what the site ``SITE`` held before each step."""

    def __init__(self) -> None:
        self.session = secure_sums.session(4)
        own = secure_sums.vectors(self.session)
        self.parties = secure_sums.parties(self.session, own)
        self.sent: dict[str, dict[str, bytes]] = {}
        self.answered: dict[str, dict[str, bytes]] = {}
        self.before: dict[str, dict[str, Member]] = {}
        opened = sums({"one": self.session}, secure_sums.vanishing(self._ask, {"values": [GONE]}))["one"]
        assert isinstance(opened, Opened)

    def _ask(self, step: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
        self.before[step] = _copied(self.parties[SITE])
        self.sent[step] = dict(messages)
        self.answered[step] = dict(in_process(self.parties)(step, messages))
        return self.answered[step]


def _copied(party: Party) -> dict[str, Member]:
    members: Mapping[str, Any] = party._members
    return {
        name: replace(member, _received=dict(member._received), _answered=dict(member._answered))
        for name, member in members.items()
    }


@cache
def recorded() -> Recorded:
    return Recorded()


def make_answer(step: str, path: Path) -> None:
    path.write_bytes(recorded().answered[step][SITE])


def read_answer(step: str, path: Path) -> object:
    """The server's side, to the end: the answer of ``SITE`` in ``step`` is that in ``path``."""
    of = recorded()
    answers = {**of.answered, step: {**of.answered[step], SITE: path.read_bytes()}}
    result = sums({"one": of.session}, lambda now, messages: {site: answers[now][site] for site in answers[now]})
    assert isinstance(result["one"], Opened | str)
    return result


def make_message(step: str, path: Path) -> None:
    path.write_bytes(recorded().sent[step][SITE])


def read_message(step: str, path: Path) -> object:
    """The side of ``SITE``: it gets the message in ``path`` in ``step``, after honest ones before."""
    of = recorded()
    party = replace(of.parties[SITE], refusals=[], _members={})
    party._members.update(_copied(replace(party, _members=of.before[step])))
    return party.answer(step, path.read_bytes())


__all__ = ["STEPS", "make_answer", "make_message", "read_answer", "read_message"]
