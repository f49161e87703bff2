"""One message to every site, and the answers as they come, until the deadline. Knows no network.

The sites that are connected are looked up again all the time: a site may leave and come back as another node. A site
that leaves before it answers gets its message again when it is back: a repeated round ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from coterie.deploy.answers import error_in
from coterie.deploy.events import Exchanged, Late
from coterie.deploy.sites import Sites
from coterie.engines.checks import is_number
from coterie.flower.message import Message
from coterie.text import plain_text
from coterie.types import ClientId

_CLOCKS = 60.0  # seconds by which a site's clock may differ from the server's over one message
_RETRY = 5.0  # seconds before a message that Flower itself answered is sent again


@dataclass(frozen=True)
class Arrival:
    """The outcome of one site's message: its answer, or the reason why there is none; seconds since it was sent."""

    client: ClientId
    answer: Message | str
    bytes_down: int
    seconds: float

    @property
    def bytes_up(self) -> int:
        return len(self.answer.body) if isinstance(self.answer, Message) else 0


@dataclass(frozen=True)
class Sent:
    """A message that was sent; ``at`` is when, in the clock's seconds, ``limit`` the bytes that its answer may have."""

    client: ClientId
    kind: str
    rnd: int
    bytes_down: int
    at: float
    limit: int
    node: int = 0


@dataclass(frozen=True)
class _Lost:
    """A site without a message under way: since when, when to try again, and why."""

    since: float
    again: float
    reason: str


@dataclass
class Unanswered:
    """What earlier exchanges left open: messages by ticket, and sites that were given up and have not come back."""

    messages: dict[str, Sent] = field(default_factory=dict)
    away: set[ClientId] = field(default_factory=set)


class Exchange:
    """Sends ``messages`` of one kind; iterating over it yields an arrival per site, as they come.

    A site that is not connected, or leaves, has ``greeting`` seconds to come back before it is given up.
    """

    def __init__(
        self,
        sites: Sites,
        kind: str,
        rnd: int,
        messages: Mapping[ClientId, Message],
        limits: Mapping[ClientId, int],
        earlier: Unanswered,
    ) -> None:
        self.sites, self.messages, self.earlier = sites, messages, earlier
        self.started = sites.clock()
        self.sent = {c: Sent(c, kind, rnd, len(m.body), self.started, limits[c]) for c, m in messages.items()}
        self.waiting: dict[str, Sent] = {}  # by ticket
        self.lost = {c: _Lost(self.started, self.started, "the site is not connected") for c in messages}
        self.first_lost: dict[ClientId, float] = {}

    def __iter__(self) -> Iterator[Arrival]:
        deadline = self.started + self.sites.agreement.deadline
        self.sites.refresh()
        self._send()
        while (self.waiting or self.lost) and self.sites.clock() < deadline:
            self._note_late()
            answers = self.sites.receive(_limits(self.waiting))
            for ticket, answer in answers:
                sent = self.waiting.pop(ticket)
                if isinstance(answer, str):
                    self._lose(sent, answer)
                else:
                    yield self._arrived(sent, answer)
            for client in self._given_up():
                yield self._arrived(self.sent[client], self.lost.pop(client).reason)
            self.sites.refresh()
            self._follow()
            self._send()
            if (self.waiting or self.lost) and not answers:
                self.sites.sleep(self.sites.transport.pause)
        self.earlier.messages |= self.waiting
        for sent in [*self.waiting.values(), *(self.sent[c] for c in self.lost)]:
            yield self._arrived(sent, f"no reply within {self.sites.agreement.deadline:g} s ([federation] deadline)")

    def _send(self) -> None:
        """Send again to the lost sites that are connected; where Flower itself answered, only after a while."""
        now = self.sites.clock()
        due = [c for c, lost in self.lost.items() if c in self.sites.nodes and now >= lost.again]
        group = str(self.sent[due[0]].rnd) if due else ""
        to = [(self.sites.nodes[c], self.sent[c].kind, self.messages[c]) for c in due]
        tickets = self.sites.transport.send(to, self.sites.agreement.ttl, group)
        for client, ticket in zip(due, tickets, strict=True):
            if ticket is None:
                self.lost[client] = _Lost(self.lost[client].since, now + _RETRY, "Flower did not take the message")
            else:
                self.waiting[ticket] = replace(self.sent[client], node=self.sites.nodes[client])
                self.earlier.away.discard(client)
                del self.lost[client]

    def _lose(self, sent: Sent, reason: str) -> None:
        """Flower itself answered, for example because the node is gone."""
        now = self.sites.clock()
        self.lost[sent.client] = _Lost(self.first_lost.setdefault(sent.client, now), now + _RETRY, reason)

    def _follow(self) -> None:
        """Take back the messages of sites that are another node now, to send them again."""
        now = self.sites.clock()
        moved = [t for t, sent in self.waiting.items() if self.sites.nodes.get(sent.client, sent.node) != sent.node]
        for ticket in moved:
            sent = self.earlier.messages[ticket] = self.waiting.pop(ticket)
            self.lost[sent.client] = _Lost(now, now, "the site came back as another node")

    def _given_up(self) -> list[ClientId]:
        """The sites that were away for too long. Those given up before get no second wait."""
        now = self.sites.clock()
        away = set() if self.sites.asking else self.earlier.away
        late = [c for c, lost in self.lost.items() if c in away or now - lost.since > self.sites.agreement.greeting]
        self.earlier.away |= set(late)
        return late

    def _arrived(self, sent: Sent, answer: Message | str) -> Arrival:
        seconds, at_site = self.sites.clock() - sent.at, None
        if isinstance(answer, Message):
            reported = answer.head.get("seconds")
            at_site = reported if is_number(reported, high=seconds + _CLOCKS) else None
            answer = error_in(answer) or answer
        if isinstance(answer, str):
            answer = plain_text(answer)
        arrival = Arrival(sent.client, answer, sent.bytes_down, seconds)
        error = answer if isinstance(answer, str) else None
        up = arrival.bytes_up
        self.sites.note(Exchanged(sent.kind, sent.rnd, sent.client, error, sent.bytes_down, up, seconds, at_site))
        return arrival

    def _note_late(self) -> None:
        """Drop the answers to earlier messages that arrive now, and note them."""
        for ticket, answer in self.sites.receive(_limits(self.earlier.messages)):
            sent = self.earlier.messages.pop(ticket)
            if isinstance(answer, str):
                continue  # from Flower itself: the node is gone, or the message is too old
            text = f"an answer of {sent.client} for round {sent.rnd} arrived too late and was dropped"
            self.sites.note(Late(sent.client, sent.rnd, text, sent.kind))


def _limits(sent: Mapping[str, Sent]) -> dict[str, int]:
    """The bytes that the answers may have, by ticket."""
    return {ticket: message.limit for ticket, message in sent.items()}
