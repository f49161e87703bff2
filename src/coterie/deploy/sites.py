"""Who is there: the sites of a run, by what they say of themselves.

Every node is asked who it is, and taken in if that fits the deal of the run: a site may come, go, and come back as
another node. Knows no network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from coterie.data.clients import SAFE_ID
from coterie.deploy.answers import answered
from coterie.engines.checks import plain_text, site_fault
from coterie.flower.message import Message, Transport
from coterie.types import BaseSpec, ClientId, ClientInfo, CoterieError, Json

Note = Callable[[dict[str, Json]], None]
_GRACE = 60.0  # seconds after the deadline for which Flower keeps a message, so that late answers are seen
_ASK_AGAIN = 30.0  # seconds before a node that was refused is asked again who it is


@dataclass(frozen=True)
class Hello:
    """How a site introduces itself: what the server may know of it, and what has to fit."""

    info: ClientInfo
    spec: BaseSpec
    terms: str  # hash of the terms that it agreed to
    base: str  # SHA-256 of the base's files
    versions: Mapping[str, str | None]


@dataclass(frozen=True)
class Deal:
    """What all sites of a run have in common; ``terms`` is sent with every message, ``sites`` may be empty (anyone).

    ``keys`` is the site that owns a key, by the key's SHA-256; empty without authentication. ``attempt`` counts the
    starts of the run's server, so that a site can tell a message of a server that is gone. ``closed``: the run has
    begun, and its ``sites`` are all that it can have, for this reason; "" while it is open.
    """

    run: str
    terms: Mapping[str, Json]
    terms_hash: str
    attempt: int = 1
    sites: tuple[ClientId, ...] = ()
    closed: str = ""
    keys: Mapping[str, ClientId] = field(default_factory=dict)
    deadline: float = 3600.0
    greeting: float = 60.0
    base: str = ""

    @property
    def ttl(self) -> float:
        """Seconds for which Flower keeps a message."""
        return self.deadline + _GRACE

    def message(
        self,
        kind: str,
        client: ClientId = "",
        rnd: int = 0,
        ask: Mapping[str, Json] | None = None,
        blob: bytes = b"",
        *,
        since: int = 0,
        keep: int = 0,
    ) -> Message:
        """A message of this run; ``ask`` is what its kind has beside what all have.

        ``since`` is the round whose state this attempt starts from, ``keep`` the oldest that is still needed.
        """
        head: dict[str, Json] = {"kind": kind, "client": client, "round": rnd, "run": self.run, "attempt": self.attempt}
        head |= {"since": since, "keep": keep, "patience": self.deadline, "terms": dict(self.terms), **(ask or {})}
        return Message(head, blob)


@dataclass
class Roster:
    """The sites of a run. ``known`` are those that ever said hello, ``nodes`` those that are there, and where.

    ``note`` hears who came, who came back, and who was refused, and why.
    """

    transport: Transport
    deal: Deal
    note: Note = lambda event: None
    known: dict[ClientId, Hello] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    nodes: dict[ClientId, int] = field(default_factory=dict)
    _greeted: dict[int, float] = field(default_factory=dict)  # node: when
    _hellos: dict[str, int] = field(default_factory=dict)  # ticket: node
    _refused: dict[int, str] = field(default_factory=dict)  # node: why
    _replaced: dict[int, int] = field(default_factory=dict)  # node: a later one that is the same site
    _settled: set[ClientId] | None = None  # before the run begins, those that it began with earlier

    @property
    def asking(self) -> bool:
        """Whether some node was asked a short while ago who it is, and has not answered."""
        since = self.clock() - self.deal.greeting
        return any(self._greeted.get(node, -math.inf) >= since for node in self._hellos.values())

    def gather(self, at_least: int, wait: float) -> None:
        """Wait until all sites of the deal said hello, or after ``wait`` seconds ``at_least``.

        Raises :class:`CoterieError` that names those who are missing.
        """
        end = self.clock() + wait
        self._settled = set(self.known)
        wanted = set(self.deal.sites)
        while True:
            self.look()
            there = self.nodes.keys() & wanted if wanted else self.nodes.keys()
            if (wanted and there == wanted) or (not wanted and len(there) >= max(1, at_least)):
                break
            if self.clock() >= end:
                if there and len(there) >= (at_least or len(wanted)):
                    break
                missing = ", ".join(sorted(wanted - there)) or f"{at_least - len(there)} more"
                raise CoterieError(
                    f"{len(there)} sites are there after {wait:g} s; missing: {missing}. See whether "
                    "`coterie join` runs there, or lower [federation] at_least"
                )
            self.sleep(self.transport.pause)
        for client in self.known.keys() - self._settled - self.nodes.keys():  # gone again before it began
            del self.known[client]
        self._settled = None

    def look(self) -> None:
        """Ask every node that is new who it is, and take in who answered."""
        nodes = self.transport.nodes()
        self.nodes = {c: n for c, n in self.nodes.items() if n in nodes}
        self._greeted = {n: at for n, at in self._greeted.items() if n in nodes}
        self._hellos = {ticket: n for ticket, n in self._hellos.items() if n in nodes}
        self._replaced = {n: by for n, by in self._replaced.items() if n in nodes and by in nodes}
        now, settled = self.clock(), {*self.nodes.values(), *self._hellos.values(), *self._replaced}
        due = {n for n in nodes if now - self._greeted.get(n, -math.inf) > _ASK_AGAIN}
        new = [n for n in nodes if n in due and n not in settled]
        hello = self.deal.message("query.hello")
        tickets = self.transport.send([(n, "query.hello", hello) for n in new], self.deal.ttl, "hello")
        for node, ticket in zip(new, tickets, strict=True):
            if ticket is not None:
                self._hellos[ticket] = node
                self._greeted[node] = now
        for ticket, answer in self.transport.receive(list(self._hellos)):
            self._take_in(self._hellos.pop(ticket), answer, nodes)

    def _take_in(self, node: int, answer: Message | str, nodes: Mapping[int, str]) -> None:
        hello, fault = answered(Hello, answer)
        fault = fault or self._unfit(hello, nodes.get(node, ""))
        if hello is None or fault:
            if self._refused.get(node) != fault:  # said once
                self.note({"event": "refused", "node": str(node), "reason": str(fault)})
            self._refused[node] = str(fault)
            return  # it may be mended: asked again after a while
        client = hello.info.id
        back = client in self.known
        self.known[client] = hello
        before = self.nodes.get(client)
        if before is not None:  # one that Flower does not miss yet, or a second of that name: the latest is the site
            same = [before, *(n for n, by in self._replaced.items() if by == before)]
            self._replaced |= dict.fromkeys(same, node)
        self.nodes[client] = node
        self._refused.pop(node, None)
        about: dict[str, Json] = {
            "versions": _plain_versions(hello.versions),
            "base": hello.base,
            "rows": hello.info.num_train,
            "instead_of": str(before) if before is not None else None,
        }
        self.note({"event": "back" if back else "joined", "client": client, "node": str(node), **about})

    def _unfit(self, hello: Hello | None, key: str) -> str | None:
        if hello is None:
            return "no hello"
        deal, client = self.deal, hello.info.id
        if not SAFE_ID.fullmatch(client):
            return f"the client id {plain_text(client, 100)!r} cannot name a folder"
        if not SAFE_ID.fullmatch(hello.base):
            return f"{client} holds a base whose hash is none"
        if fault := site_fault(hello.info, hello.spec):
            return f"{client} cannot be what it says: {fault}"
        if deal.closed and client not in deal.sites:
            return f"{client} was not there at the start, and {deal.closed}"
        if deal.sites and client not in deal.sites:
            return f"{client} is not among [federation] sites"
        if deal.keys and deal.keys.get(key) != client:
            return f"the node says that it is {client}, and its key is {deal.keys.get(key, 'unknown')}'s"
        if hello.terms != deal.terms_hash:
            return f"{client} understood other terms than were sent; install the same version of coterie there"
        known = self._bound_by(client)
        if client in known and hello.info != known[client].info:
            return f"the rows or labels of {client} are not those that it began with; restore them, or start a new run"
        if fault := _other_base(hello, deal.base, known):
            return fault
        if known and hello.spec != next(iter(known.values())).spec:
            return f"the base of {client} has other targets"
        return None

    def _bound_by(self, client: ClientId) -> dict[ClientId, Hello]:
        """What a hello of ``client`` has to agree with. Before the run begins it may take back what it said itself,
        and who has gone again counts no more."""
        settled = self.known.keys() if self._settled is None else self._settled
        return {c: h for c, h in self.known.items() if c in settled or (c != client and c in self.nodes)}


def _other_base(hello: Hello, agreed: str, known: Mapping[ClientId, Hello]) -> str | None:
    bases = {agreed: ""} if agreed else {}
    bases |= {h.base: f" as {c}" for c, h in sorted(known.items(), reverse=True)}
    for wanted, whose in bases.items():
        if hello.base != wanted:
            return (
                f"{hello.info.id} holds another base ({hello.base[:12]}, not {wanted[:12]}{whose}); give both the same "
                "model files, and start `coterie join` again where they were wrong"
            )
    return None


def _plain_versions(versions: Mapping[str, str | None]) -> dict[str, str | None]:
    """What a site says of its libraries, as it is noted."""
    some = list(versions.items())[:50]
    return {plain_text(name, 50): version and plain_text(version, 50) for name, version in some}
