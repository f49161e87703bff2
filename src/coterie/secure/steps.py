"""The steps of several sessions together: a site gets one message per step, whatever the number of its groups.

:func:`sums` is the server's driver and :class:`Party` a site's end. Between them are bytes (:mod:`coterie.codec`), so a
simulation and a network run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from coterie import codec
from coterie.secure.collector import Collector, Opened
from coterie.secure.fixed_point import Integers
from coterie.secure.identity import Identity
from coterie.secure.member import Member
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
from coterie.secure.session import SecureSumError, Session, Site

STEPS = ("keys", "shares", "values", "survivors", "reveal")
_TO_SITE: Mapping[str, Any] = {
    "keys": dict[str, Session],
    "shares": dict[str, Roster],
    "values": dict[str, Inbox],
    "survivors": dict[str, Survivors],
    "reveal": dict[str, Confirmations],
}
_FROM_SITE: Mapping[str, Any] = {
    "keys": dict[str, Keys],
    "shares": dict[str, Shares],
    "values": dict[str, Masked],
    "survivors": dict[str, Confirmed],
    "reveal": dict[str, Revealed],
}


class Ask(Protocol):
    """Sends a step's bytes to sites; returns the answers of those that answered."""

    def __call__(self, step: str, messages: Mapping[Site, bytes]) -> Mapping[Site, bytes]: ...


def sums(sessions: Mapping[str, Session], ask: Ask) -> dict[str, Opened | str]:
    """The opened sum of each session by its name, or why it was not opened."""
    collectors = {name: Collector(session) for name, session in sessions.items()}
    messages: dict[str, Mapping[Site, Any]] = {n: dict.fromkeys(s.members, s) for n, s in sessions.items()}
    results: dict[str, Opened | str] = {}
    for step in STEPS:
        answers = _exchanged(step, messages, ask)
        messages = {}
        for name in [name for name in collectors if name not in results]:
            try:
                after = _after(step, collectors[name], answers.get(name, {}))
            except SecureSumError as fault:
                results[name] = str(fault)
            else:
                if isinstance(after, Opened):
                    results[name] = after
                else:
                    messages[name] = after
    return results


def _after(step: str, collector: Collector, answers: Mapping[Site, Any]) -> Mapping[Site, Any] | Opened:
    match step:
        case "keys":
            return collector.roster(answers)
        case "shares":
            return collector.inboxes(answers)
        case "values":
            return collector.survivors(answers)
        case "survivors":
            return collector.confirmations(answers)
        case _:
            return collector.opened(answers)


def _exchanged(step: str, messages: Mapping[str, Mapping[Site, Any]], ask: Ask) -> dict[str, dict[Site, Any]]:
    """The answers by session and site. An answer that cannot be read counts as none."""
    by_site: dict[Site, dict[str, Any]] = {}
    for name, to in messages.items():
        for site, message in to.items():
            by_site.setdefault(site, {})[name] = message
    found: dict[str, dict[Site, Any]] = {}
    if not by_site:
        return found
    for site, blob in ask(step, {site: codec.encode(of) for site, of in sorted(by_site.items())}).items():
        try:
            answers = codec.decode(_FROM_SITE[step], blob)
        except codec.CodecError:
            continue
        for name in answers.keys() & by_site.get(site, {}).keys():
            found.setdefault(name, {})[site] = answers[name]
    return found


@dataclass
class Party:
    """A site in all sessions of a round. ``vector`` makes its vector for a session, ``admit`` raises for one that it
    does not agree to, and ``may_reveal`` for survivors that it must not open a sum over."""

    site: Site
    identity: Identity
    vector: Callable[[Session], Integers]
    admit: Callable[[Session], None] = lambda session: None
    may_reveal: Callable[[Session, tuple[Site, ...]], None] = lambda session, survivors: None
    refusals: list[str] = field(default_factory=list)
    _members: dict[str, Member] = field(default_factory=dict)

    def answer(self, step: str, blob: bytes) -> bytes:
        """This site's answers in one step. Where it refuses a session, it gives none for it.

        Raises :class:`codec.CodecError` for bytes that are not a step's message, :class:`SecureSumError` where it
        refuses all.
        """
        if step not in STEPS:
            raise SecureSumError(f"there is no step {step[:40]!r}")
        messages = codec.decode(_TO_SITE[step], blob)
        answers: dict[str, object] = {}
        refused: list[str] = []
        for name, message in messages.items():
            try:
                answers[name] = self._answer(step, name, message)
            except SecureSumError as fault:
                refused.append(str(fault))
        self.refusals += refused
        if refused and not answers:
            raise SecureSumError(refused[0])
        return codec.encode(answers)

    def _answer(self, step: str, name: str, message: Any) -> object:
        if step == "keys":
            return self._begun(name, message).keys()
        if name not in self._members:
            raise SecureSumError("this site knows nothing of that session; it may have been restarted since it began")
        member = self._members[name]
        match step:
            case "shares":
                return member.shares(message)
            case "values":
                return member.values(message, lambda: self.vector(member.session))
            case "survivors":
                return member.survivors(message)
            case _:
                self.may_reveal(member.session, member.agreed)
                return member.reveal(message)

    def _begun(self, name: str, session: Session) -> Member:
        if name not in self._members:
            self.admit(session)
            taken = {tensor for member in self._members.values() for tensor in member.session.tensors}
            if both := sorted(taken & {*session.tensors}):
                raise SecureSumError(
                    f"{both[0]} is in another sum of this round; from two sums over it, the server could subtract one"
                )
            self._members[name] = Member(session, self.site, self.identity)
        if self._members[name].session != session:
            raise SecureSumError("the server has begun another session of that name")
        return self._members[name]


def in_process(parties: Mapping[Site, Party]) -> Ask:
    """Sites that are simulated in this process. One that refuses a step does not answer it."""

    def ask(step: str, messages: Mapping[Site, bytes]) -> dict[Site, bytes]:
        answers = {}
        for site, blob in messages.items():
            try:
                answers[site] = parties[site].answer(step, blob)
            except SecureSumError:
                continue  # the reason is in the party's refusals
        return answers

    return ask
