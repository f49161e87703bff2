"""The engine of a real federation: the clients are sites that answer messages over a transport.

Knows no network. The Runner uses it as it uses the local engine. Who is there is asked anew before every exchange: a
site may come, go, and come back as another node. A site that does not answer before the deadline is left out of the
round with the reason, and an answer that comes later is dropped and noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coterie.deploy.answers import decoded, error_in
from coterie.deploy.sites import Roster
from coterie.engines.base import Delivery, Evaluation, Stream
from coterie.engines.checks import bank_fault, evaluation_fault, is_number, plain_text
from coterie.engines.encode_once import Blobs
from coterie.flower.message import Message
from coterie.methods.base import Method
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, Instruction, Json, Reply

_TRY_AGAIN = 5.0  # seconds before a message that Flower gave an answer of its own to is sent again


@dataclass(frozen=True)
class _Sent:
    client: ClientId
    kind: str
    rnd: int
    bytes_down: int
    at: float
    node: int = 0


@dataclass(frozen=True)
class _Lost:
    """A site without a message under way: since when, when to try the next time, and why."""

    since: float
    again: float
    why: str


_Outcome = tuple[ClientId, int, Message | str, int, float]  # client, bytes down, answer or reason, bytes up, seconds


@dataclass
class RemoteEngine:
    """See the module. ``since`` and ``keep``: which of the sites' states this attempt starts from, and needs."""

    roster: Roster
    since: int = 0
    keep: int = 0
    _late: dict[str, _Sent] = field(default_factory=dict)
    _missed: set[ClientId] = field(default_factory=set)  # given up, and not back since

    # what the runner asks ---------------------------------------------------------------------------------------------

    @property
    def spec(self) -> BaseSpec:
        return next(iter(self.roster.known.values())).spec

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        allowed = self.roster.deal.sites
        return tuple(self.roster.known[c].info for c in sorted(self.roster.known) if not allowed or c in allowed)

    def train(self, method: Method[Any], instructions: Mapping[ClientId, Instruction], rnd: int) -> Stream[Delivery]:
        """Every client's delivery for round ``rnd``, as it comes; at the deadline an error for each that is missing."""
        for client, sent, answer, up, seconds in self._exchange("train", instructions, rnd, {}):
            reply, error = (None, answer) if isinstance(answer, str) else decoded(Reply, answer.body)
            yield client, Delivery(reply, error, sent, up, seconds)

    def evaluate(
        self,
        method: Method[Any],
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        splits: tuple[str, ...],
        usage: bool = False,
    ) -> Stream[Evaluation]:
        """The scores of the clients that answer."""
        ask: dict[str, Json] = {"splits": list(splits), "usage": usage}
        modules = {target.name for target in self.spec.targets}

        def fault(client: ClientId, made: Evaluation) -> str | None:
            return evaluation_fault(made, splits, modules)

        for client, made in self._decoded_answers(Evaluation, "evaluate", instructions, rnd, ask, fault):
            kept = made.observed if usage else None
            yield client, replace(made, observed=kept, note=plain_text(made.note) if made.note else None)

    def banks(self, method: Method[Any], instructions: Mapping[ClientId, Instruction], rnd: int) -> Stream[Bank]:
        """The banks of the clients whose site gives them away; every site writes its own to its own disk."""

        def fault(client: ClientId, bank: Bank) -> str | None:
            return bank_fault(bank, self.spec, self.roster.known[client].info.labels)

        yield from self._decoded_answers(Bank, "query.bank", instructions, rnd, {}, fault)

    def restore(self, rnd: int) -> None:
        """Every message of this attempt tells its site to go back to its state after round ``rnd`` first, once."""
        self.since = rnd

    def held(self, rnd: int) -> dict[str, Json]:
        """Nothing that the server could check: sites hold their own."""
        return {}

    def prune(self, rnd: int) -> None:
        """The next messages tell the sites which states no checkpoint needs any more."""
        self.keep = max(0, rnd)

    def close(self) -> None:
        """Nothing: who started the sites ends them."""

    # messages ---------------------------------------------------------------------------------------------------------

    def _message(self, kind: str, client: ClientId, rnd: int, ask: Mapping[str, Json], blob: bytes) -> Message:
        return self.roster.deal.message(kind, client, rnd, ask, blob, since=self.since, keep=self.keep)

    def _exchange(
        self, kind: str, instructions: Mapping[ClientId, Instruction], rnd: int, ask: Mapping[str, Json]
    ) -> Iterator[_Outcome]:
        """What came of every client's message, as it comes.

        A site that goes away before it answers is sent its message again when it is back, at once where that is as
        another node: a round done again ends with the same bits. It has ``greeting`` seconds for that; after those the
        round goes on without it.
        """
        self._note_late()
        blobs = Blobs(instructions.values())
        messages = {c: self._message(kind, c, rnd, ask, blobs.of(ins)) for c, ins in sorted(instructions.items())}
        started = self.roster.clock()
        sent = {c: _Sent(c, kind, rnd, len(message.body), started) for c, message in messages.items()}
        waiting: dict[str, _Sent] = {}
        lost = {c: _Lost(started, started, "the site is not connected") for c in messages}
        first: dict[ClientId, float] = {}  # when a site was lost first
        self.roster.look()
        waiting |= self._send(messages, sent, lost)
        while (waiting or lost) and self.roster.clock() < started + self.roster.deal.deadline:
            found = [(t, answer) for t, answer in self.roster.transport.receive(list(waiting)) if t in waiting]
            for ticket, answer in found:
                one = waiting.pop(ticket)
                if isinstance(answer, str):
                    now = self.roster.clock()
                    lost[one.client] = _Lost(first.setdefault(one.client, now), now + _TRY_AGAIN, answer)
                else:
                    yield self._done(one, answer)
            for client in self._given_up(lost):
                yield self._done(sent[client], lost.pop(client).why)
            self.roster.look()
            for ticket in [t for t, one in waiting.items() if self.roster.nodes.get(one.client, one.node) != one.node]:
                one = self._late[ticket] = waiting.pop(ticket)
                lost[one.client] = _Lost(self.roster.clock(), self.roster.clock(), "the site came back as another node")
            waiting |= self._send(messages, sent, lost)
            if (waiting or lost) and not found:
                self.roster.sleep(self.roster.transport.pause)
        self._late |= waiting
        for one in [*waiting.values(), *(sent[c] for c in lost)]:
            yield self._done(one, f"no reply within {self.roster.deal.deadline:g} s ([federation] deadline)")

    def _send(
        self,
        messages: Mapping[ClientId, Message],
        sent: Mapping[ClientId, _Sent],
        lost: dict[ClientId, _Lost],
    ) -> dict[str, _Sent]:
        """Send to those of ``lost`` whose site is there, and take them out of it; their tickets.

        Where Flower gave an answer of its own a while passes before the next try.
        """
        now = self.roster.clock()
        due = [c for c, gone in lost.items() if c in self.roster.nodes and now >= gone.again]
        group = str(sent[due[0]].rnd) if due else ""
        to = [(self.roster.nodes[c], sent[c].kind, messages[c]) for c in due]
        tickets = self.roster.transport.send(to, self.roster.deal.ttl, group)
        made = {}
        for client, ticket in zip(due, tickets, strict=True):
            if ticket is None:
                lost[client] = _Lost(lost[client].since, now + _TRY_AGAIN, "Flower did not take the message")
            else:
                made[ticket] = replace(sent[client], node=self.roster.nodes[client])
                self._missed.discard(client)
                del lost[client]
        return made

    def _given_up(self, lost: Mapping[ClientId, _Lost]) -> list[ClientId]:
        """Who was away for too long. Who was given up before, and has not been back since, is not waited for."""
        now = self.roster.clock()
        known = set() if self.roster.asking else self._missed
        away = [c for c, gone in lost.items() if c in known or now - gone.since > self.roster.deal.greeting]
        self._missed |= set(away)
        return away

    def _done(self, sent: _Sent, answer: Message | str) -> _Outcome:
        seconds = self.roster.clock() - sent.at
        at_site: Json = None
        if isinstance(answer, Message):
            told = answer.head.get("seconds")
            at_site = told if is_number(told) else None
            answer = error_in(answer) or answer
        if isinstance(answer, str):
            answer = plain_text(answer)
        up = len(answer.body) if isinstance(answer, Message) else 0
        error = answer if isinstance(answer, str) else None
        event = {"event": "exchange", "kind": sent.kind, "round": sent.rnd, "client": sent.client, "failed": error}
        event |= {"bytes_down": sent.bytes_down, "bytes_up": up, "seconds": seconds, "site_seconds": at_site}
        self.roster.note(event)
        return sent.client, sent.bytes_down, answer, up, seconds

    def _note_late(self) -> None:
        for ticket, answer in self.roster.transport.receive(list(self._late)):
            sent = self._late.pop(ticket)
            if isinstance(answer, str):
                continue  # Flower's own: of a node that is gone, or a message that is too old
            what = f"an answer of {sent.client} for round {sent.rnd}"
            text = f"{what} came when it was no longer waited for, and was dropped"
            self.roster.note(
                {"event": "late", "client": sent.client, "round": sent.rnd, "kind": sent.kind, "text": text}
            )

    def _decoded_answers(
        self,
        kind: type[Any],
        name: str,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        ask: Mapping[str, Json],
        fault_in: Callable[[ClientId, Any], str | None],
    ) -> Iterator[tuple[ClientId, Any]]:
        """What the answers hold. One that cannot be read, or that ``fault_in`` finds a fault in, is noted and left."""
        for client, _, answer, _, _ in self._exchange(name, instructions, rnd, ask):
            if isinstance(answer, str) or not answer.body:
                continue  # noted by _done; a site may also keep its bank to itself
            value, fault = decoded(kind, answer.body)
            fault = fault or fault_in(client, value)
            if fault is None:
                yield client, value
            else:
                self.roster.note(
                    {"event": "unreadable", "kind": name, "round": rnd, "client": client, "reason": plain_text(fault)}
                )
