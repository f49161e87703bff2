"""The engine of a real federation: the clients are sites that answer parcels over a transport.

Knows no network. The Runner uses it as it uses the local engine. Who is there is asked anew before every exchange: a
site may come, go, and come back as another node. A site that does not answer before the deadline is left out of the
round with the reason, and an answer that comes later is dropped and noted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from coterie import codec
from coterie.checks import bank_fault, evaluation_fault, is_number, plain_text, site_fault
from coterie.data.federation import SAFE_ID
from coterie.engine import Delivery, Evaluation, Stream
from coterie.engines.parcel import Parcel
from coterie.method import Method
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, CoterieError, Instruction, Json, Reply

Note = Callable[[dict[str, Json]], None]
_ASK_AGAIN = 30.0  # seconds before a node that was refused is asked again who it is
_TRY_AGAIN = 5.0  # seconds before a message that Flower gave an answer of its own to is sent again
_GRACE = 60.0  # seconds after the deadline for which Flower keeps a message, so that late answers are seen


class Transport(Protocol):
    """Carries parcels to nodes and back; see :class:`coterie.engines.flower.GridTransport`."""

    @property
    def pause(self) -> float: ...

    def nodes(self) -> Mapping[int, str]: ...

    def send(self, to: Sequence[tuple[int, str, Parcel]], ttl: float, group: str) -> list[str | None]: ...

    def receive(self, tickets: Collection[str]) -> list[tuple[str, Parcel | str]]: ...


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
    """What all sites of a run have in common; ``terms`` is sent with every parcel, ``sites`` may be empty (anyone).

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


_Outcome = tuple[ClientId, int, Parcel | str, int, float]  # client, bytes down, answer or reason, bytes up, seconds


@dataclass
class RemoteEngine:
    """See the module. ``note`` hears what happens on the network; ``known`` are the sites that ever said hello."""

    transport: Transport
    deal: Deal
    note: Note = lambda event: None
    known: dict[ClientId, Hello] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    since: int = 0
    keep: int = 0
    _nodes: dict[ClientId, int] = field(default_factory=dict)
    _greeted: dict[int, float] = field(default_factory=dict)  # node: when
    _hellos: dict[str, int] = field(default_factory=dict)  # ticket: node
    _refused: dict[int, str] = field(default_factory=dict)  # node: why
    _late: dict[str, _Sent] = field(default_factory=dict)
    _missed: set[ClientId] = field(default_factory=set)  # given up, and not back since
    _settled: set[ClientId] | None = None  # before the run begins, those that it began with earlier

    # what the runner asks ---------------------------------------------------------------------------------------------

    @property
    def spec(self) -> BaseSpec:
        return next(iter(self.known.values())).spec

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        allowed = self.deal.sites
        return tuple(self.known[c].info for c in sorted(self.known) if not allowed or c in allowed)

    def train(self, method: Method[Any], instructions: Mapping[ClientId, Instruction], rnd: int) -> Stream[Delivery]:
        """Every client's delivery for round ``rnd``, as it comes; at the deadline an error for each that is missing."""
        for client, sent, answer, up, seconds in self._exchange("train", instructions, rnd, {}):
            reply, error = (None, answer) if isinstance(answer, str) else _decoded(Reply, answer.blob)
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
            return bank_fault(bank, self.spec, self.known[client].info.labels)

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

    # who is there -----------------------------------------------------------------------------------------------------

    def gather(self, at_least: int, wait: float) -> None:
        """Wait until all sites of the deal said hello, or after ``wait`` seconds ``at_least``.

        Raises :class:`CoterieError` that names those who are missing.
        """
        end = self.clock() + wait
        self._settled = set(self.known)
        wanted = set(self.deal.sites)
        while True:
            self._greet()
            there = self._nodes.keys() & wanted if wanted else self._nodes.keys()
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
        for client in self.known.keys() - self._settled - self._nodes.keys():  # gone again before it began
            del self.known[client]
        self._settled = None
        self._check_bases()

    def _check_bases(self) -> None:
        bases = {c: h.base for c, h in sorted(self.known.items())}
        if len(set(bases.values())) > 1:
            told = ", ".join(f"{c}: {base[:12]}" for c, base in bases.items())
            raise CoterieError(f"the sites hold different bases ({told}); give all the same model files")

    def _greet(self) -> None:
        """Ask every node that is new who it is, and take in who answered."""
        nodes = self.transport.nodes()
        self._nodes = {c: n for c, n in self._nodes.items() if n in nodes}
        self._greeted = {n: at for n, at in self._greeted.items() if n in nodes}
        now, mapped, asked = self.clock(), set(self._nodes.values()), set(self._hellos.values())
        due = {n for n in nodes if now - self._greeted.get(n, -math.inf) > _ASK_AGAIN}
        new = [n for n in nodes if n in due and n not in mapped and n not in asked]
        tickets = self.transport.send(
            [(n, "query.hello", self._parcel("query.hello", "", 0, {})) for n in new], self._ttl, "hello"
        )
        for node, ticket in zip(new, tickets, strict=True):
            if ticket is not None:
                self._hellos[ticket] = node
                self._greeted[node] = now
        for ticket, answer in self.transport.receive(list(self._hellos)):
            self._take_in(self._hellos.pop(ticket), answer, nodes)

    def _take_in(self, node: int, answer: Parcel | str, nodes: Mapping[int, str]) -> None:
        hello, fault = _answered(Hello, answer)
        fault = fault or self._unfit(hello, nodes.get(node, ""))
        if hello is None or fault:
            if self._refused.get(node) != fault:  # said once
                self.note({"event": "refused", "node": str(node), "reason": str(fault)})
            self._refused[node] = str(fault)
            return  # it may be mended: asked again after a while
        client = hello.info.id
        back = client in self.known
        self.known[client] = hello
        self._nodes[client] = node
        self._refused.pop(node, None)
        about = {"versions": _plain_versions(hello.versions), "base": hello.base, "rows": hello.info.num_train}
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
        bases = {h.base: f" as {c}" for c, h in sorted(known.items(), reverse=True)}
        bases = {deal.base: ""} if deal.base else bases
        if bases and hello.base not in bases:
            wanted, whose = min(bases.items())
            return (
                f"{client} holds another base ({hello.base[:12]}, not {wanted[:12]}{whose}); give both the same model "
                "files, and start `coterie join` again where they were wrong"
            )
        if known and hello.spec != next(iter(known.values())).spec:
            return f"the base of {client} has other targets"
        return None

    def _bound_by(self, client: ClientId) -> dict[ClientId, Hello]:
        """What a hello of ``client`` has to agree with. Before the run begins it may take back what it said itself,
        and who has gone again counts no more."""
        settled = self.known.keys() if self._settled is None else self._settled
        return {c: h for c, h in self.known.items() if c in settled or (c != client and c in self._nodes)}

    # parcels ----------------------------------------------------------------------------------------------------------

    @property
    def _ttl(self) -> float:
        return self.deal.deadline + _GRACE

    def _parcel(self, kind: str, client: ClientId, rnd: int, ask: Mapping[str, Json], blob: bytes = b"") -> Parcel:
        deal = self.deal
        head = {"kind": kind, "client": client, "round": rnd, "run": deal.run, "attempt": deal.attempt}
        head |= {"since": self.since, "keep": self.keep, "patience": deal.deadline, "terms": dict(deal.terms), **ask}
        return Parcel(head, blob)

    def _exchange(
        self, kind: str, instructions: Mapping[ClientId, Instruction], rnd: int, ask: Mapping[str, Json]
    ) -> Iterator[_Outcome]:
        """What came of every client's message, as it comes.

        A site that goes away before it answers is sent its message again when it is back, at once where that is as
        another node: a round done again ends with the same bits. It has ``greeting`` seconds for that; after those the
        round goes on without it.
        """
        self._note_late()
        parcels = {c: self._parcel(kind, c, rnd, ask, codec.encode(ins)) for c, ins in sorted(instructions.items())}
        started = self.clock()
        sent = {c: _Sent(c, kind, rnd, len(parcel.blob), started) for c, parcel in parcels.items()}
        waiting: dict[str, _Sent] = {}
        lost = {c: _Lost(started, started, "the site is not connected") for c in parcels}
        first: dict[ClientId, float] = {}  # when a site was lost first
        self._greet()
        waiting |= self._send(parcels, sent, lost)
        while (waiting or lost) and self.clock() < started + self.deal.deadline:
            found = [(t, answer) for t, answer in self.transport.receive(list(waiting)) if t in waiting]
            for ticket, answer in found:
                one = waiting.pop(ticket)
                if isinstance(answer, str):
                    now = self.clock()
                    lost[one.client] = _Lost(first.setdefault(one.client, now), now + _TRY_AGAIN, answer)
                else:
                    yield self._done(one, answer)
            for client in self._given_up(lost):
                yield self._done(sent[client], lost.pop(client).why)
            self._greet()
            for ticket in [t for t, one in waiting.items() if self._nodes.get(one.client, one.node) != one.node]:
                one = self._late[ticket] = waiting.pop(ticket)
                lost[one.client] = _Lost(self.clock(), self.clock(), "the site came back as another node")
            waiting |= self._send(parcels, sent, lost)
            if (waiting or lost) and not found:
                self.sleep(self.transport.pause)
        self._late |= waiting
        for one in [*waiting.values(), *(sent[c] for c in lost)]:
            yield self._done(one, f"no reply within {self.deal.deadline:g} s ([federation] deadline)")

    def _send(
        self,
        parcels: Mapping[ClientId, Parcel],
        sent: Mapping[ClientId, _Sent],
        lost: dict[ClientId, _Lost],
    ) -> dict[str, _Sent]:
        """Send to those of ``lost`` whose site is there, and take them out of it; their tickets.

        Where Flower gave an answer of its own a while passes before the next try.
        """
        now = self.clock()
        due = [c for c, gone in lost.items() if c in self._nodes and now >= gone.again]
        tickets = self.transport.send(
            [(self._nodes[c], sent[c].kind, parcels[c]) for c in due], self._ttl, str(sent[due[0]].rnd) if due else ""
        )
        made = {}
        for client, ticket in zip(due, tickets, strict=True):
            if ticket is None:
                lost[client] = _Lost(lost[client].since, now + _TRY_AGAIN, "Flower did not take the message")
            else:
                made[ticket] = replace(sent[client], node=self._nodes[client])
                self._missed.discard(client)
                del lost[client]
        return made

    def _given_up(self, lost: Mapping[ClientId, _Lost]) -> list[ClientId]:
        """Who was away for too long. Who was given up before, and has not been back since, is not waited for."""
        now = self.clock()
        known = set() if self._hellos else self._missed
        away = [c for c, gone in lost.items() if c in known or now - gone.since > self.deal.greeting]
        self._missed |= set(away)
        return away

    def _done(self, sent: _Sent, answer: Parcel | str) -> _Outcome:
        seconds = self.clock() - sent.at
        at_site: Json = None
        if isinstance(answer, Parcel):
            told = answer.head.get("seconds")
            at_site = told if is_number(told) else None
            answer = _error_in(answer) or answer
        if isinstance(answer, str):
            answer = plain_text(answer)
        up = len(answer.blob) if isinstance(answer, Parcel) else 0
        error = answer if isinstance(answer, str) else None
        event = {"event": "exchange", "kind": sent.kind, "round": sent.rnd, "client": sent.client, "failed": error}
        event |= {"bytes_down": sent.bytes_down, "bytes_up": up, "seconds": seconds, "site_seconds": at_site}
        self.note(event)
        return sent.client, sent.bytes_down, answer, up, seconds

    def _note_late(self) -> None:
        for ticket, answer in self.transport.receive(list(self._late)):
            sent = self._late.pop(ticket)
            if isinstance(answer, str):
                continue  # Flower's own: of a node that is gone, or a message that is too old
            text = f"an answer of {sent.client} for round {sent.rnd} came after its deadline, and was dropped"
            self.note({"event": "late", "client": sent.client, "round": sent.rnd, "kind": sent.kind, "text": text})

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
            if isinstance(answer, str) or not answer.blob:
                continue  # noted by _done; a site may also keep its bank to itself
            value, fault = _decoded(kind, answer.blob)
            fault = fault or fault_in(client, value)
            if fault is None:
                yield client, value
            else:
                self.note(
                    {"event": "unreadable", "kind": name, "round": rnd, "client": client, "reason": plain_text(fault)}
                )


def _decoded(kind: type[Any], blob: bytes) -> tuple[Any, str | None]:
    try:
        return codec.decode(kind, blob), None
    except codec.CodecError as fault:
        return None, plain_text(f"the reply cannot be read: {str(fault)[:300]}")


def _answered(kind: type[Any], answer: Parcel | str) -> tuple[Any, str | None]:
    if isinstance(answer, str):
        return None, plain_text(answer)
    if error := _error_in(answer):
        return None, error
    return _decoded(kind, answer.blob)


def _error_in(answer: Parcel) -> str | None:
    """Why a site gives no answer, in its own words."""
    error = answer.head.get("error")
    if error is None:
        return None
    return (plain_text(error) if isinstance(error, str) else "") or "an error without a text"


def _plain_versions(versions: Mapping[str, str | None]) -> dict[str, str | None]:
    """What a site says of its libraries, as it is noted."""
    some = list(versions.items())[:50]
    return {plain_text(name, 50): version and plain_text(version, 50) for name, version in some}
