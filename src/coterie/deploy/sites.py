"""The sites of a run: who is connected, as which node, and who was refused and why.

Every node gets a request to introduce itself, and may take part if that fits the agreement of the run. A site may
come, leave, and come back as another node. Knows no network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coterie import codec
from coterie.deploy.agreement import Agreement
from coterie.deploy.answers import answered
from coterie.deploy.events import Back, Joined, Refused
from coterie.deploy.hello import Hello, plain_versions, refusal
from coterie.deploy.limits import HELLO
from coterie.flower.message import Message, Transport
from coterie.runs.events import Listener, Note
from coterie.types import ClientId, ClientInfo, CoterieError

KNOWN = "sites.safetensors"
_RETRY = 30.0  # seconds before a node that was refused gets another request


def read_known(folder: Path) -> dict[ClientId, Hello]:
    """The introductions of the sites that ever joined the run in ``folder``. Raises :class:`CoterieError`."""
    path = folder / KNOWN
    try:
        return codec.decode(dict[str, Hello], path.read_bytes()) if path.exists() else {}
    except codec.CodecError as fault:
        raise CoterieError(
            f"{path} cannot be read; if another version of coterie began this run, end it with that: {fault}"
        ) from fault


@dataclass
class Sites:
    """``known`` are the sites that ever introduced themselves, ``nodes`` the node of each site that is connected.

    ``note`` is called when a site joins, comes back or is refused.
    """

    transport: Transport
    agreement: Agreement
    note: Listener = lambda event: None
    known: dict[ClientId, Hello] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    nodes: dict[ClientId, int] = field(default_factory=dict)
    _greeted: dict[int, float] = field(default_factory=dict)  # node: when
    _greetings: dict[str, int] = field(default_factory=dict)  # ticket without an answer yet: node
    _refused: dict[int, str] = field(default_factory=dict)  # node: reason
    _replaced: dict[int, int] = field(default_factory=dict)  # node: a later one that is the same site
    _stray: bool = False  # whether a message arrived that answers none
    _initial: set[ClientId] | None = None  # until the run begins: the sites that it knew before

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        """The sites that may take part, by id, connected or not."""
        allowed = self.agreement.sites
        return tuple(self.known[c].info for c in sorted(self.known) if not allowed or c in allowed)

    @property
    def asking(self) -> bool:
        """Whether some node has not yet answered a recent request to introduce itself."""
        since = self.clock() - self.agreement.greeting
        return any(self._greeted.get(node, -math.inf) >= since for node in self._greetings.values())

    def gather(self, at_least: int, wait: float) -> None:
        """Wait until all sites of the agreement are connected, or after ``wait`` seconds at least ``at_least``.

        Raises :class:`CoterieError` that names the missing sites.
        """
        end = self.clock() + wait
        self._initial = set(self.known)
        while not self._complete(at_least):
            if self.clock() >= end:
                self._check_enough(at_least, wait)
                break
            self.sleep(self.transport.pause)
        for client in self.known.keys() - self._initial - self.nodes.keys():  # left before the run began
            del self.known[client]
        self._initial = None

    def _complete(self, at_least: int) -> bool:
        self.refresh()
        wanted = set(self.agreement.sites)
        return self.nodes.keys() >= wanted if wanted else len(self.nodes) >= max(1, at_least)

    def _check_enough(self, at_least: int, wait: float) -> None:
        wanted = set(self.agreement.sites)
        there = self.nodes.keys() & wanted if wanted else self.nodes.keys()
        if there and len(there) >= (at_least or len(wanted)):
            return
        missing = ", ".join(sorted(wanted - there)) or f"{at_least - len(there)} more"
        raise CoterieError(
            f"{len(there)} sites are connected after {wait:g} s; missing: {missing}. Check that `coterie join` runs "
            "there, or lower [federation] at_least"
        )

    def refresh(self) -> None:
        """Send every new node a request to introduce itself, and judge the answers that came."""
        nodes = self.transport.nodes()
        self._forget_all_but(nodes)
        now = self.clock()
        settled = {*self.nodes.values(), *self._greetings.values(), *self._replaced}
        due = {n for n in nodes if now - self._greeted.get(n, -math.inf) > _RETRY}
        new = [n for n in nodes if n in due and n not in settled]
        greeting = self.agreement.message("query.hello")
        tickets = self.transport.send([(n, "query.hello", greeting) for n in new], self.agreement.ttl, "hello")
        for node, ticket in zip(new, tickets, strict=True):
            if ticket is not None:
                self._greetings[ticket] = node
                self._greeted[node] = now
        for ticket, answer in self.receive(dict.fromkeys(self._greetings, HELLO)):
            self._take_in(self._greetings.pop(ticket), answer, nodes)

    def receive(self, tickets: Mapping[str, int]) -> list[tuple[str, Message | str]]:
        """The answers that have arrived, at most one per ticket. Whatever else arrives is dropped, and noted once.

        ``tickets`` has the bytes that each answer may have.
        """
        arrived: dict[str, Message | str] = {}
        for ticket, answer in self.transport.receive(tickets):
            if ticket in tickets:
                arrived.setdefault(ticket, answer)
            elif not self._stray:
                self._stray = True
                self.note(Note("a message arrived that answers no request of the server; such messages are dropped"))
        return list(arrived.items())

    def _forget_all_but(self, nodes: Mapping[int, str]) -> None:
        self.nodes = {c: n for c, n in self.nodes.items() if n in nodes}
        self._greeted = {n: at for n, at in self._greeted.items() if n in nodes}
        self._greetings = {ticket: n for ticket, n in self._greetings.items() if n in nodes}
        self._replaced = {n: by for n, by in self._replaced.items() if n in nodes and by in nodes}

    def _take_in(self, node: int, answer: Message | str, nodes: Mapping[int, str]) -> None:
        hello, reason = answered(Hello, answer)
        if hello is not None:
            reason = refusal(hello, self.agreement, nodes.get(node, ""), self._to_match(hello.info.id))
        if hello is None or reason is not None:
            self._refuse(node, str(reason))
        else:
            self._accept(node, hello)

    def _refuse(self, node: int, reason: str) -> None:
        """Note the reason once. The node gets another request later, since its site may have fixed the cause."""
        if self._refused.get(node) != reason:
            self.note(Refused(str(node), reason))
        self._refused[node] = reason

    def _accept(self, node: int, hello: Hello) -> None:
        client = hello.info.id
        back = client in self.known
        self.known[client] = hello
        before = self.nodes.get(client)
        if before is not None:  # Flower still lists the old node, or two nodes use one id: the newest counts
            same = [before, *(n for n, by in self._replaced.items() if by == before)]
            self._replaced |= dict.fromkeys(same, node)
        self.nodes[client] = node
        self._refused.pop(node, None)
        came = Back if back else Joined
        instead_of = str(before) if before is not None else None
        versions, info = plain_versions(hello.versions), hello.info
        self.note(came(client, str(node), versions, hello.base, info.num_train, instead_of, info.active))

    def _to_match(self, client: ClientId) -> dict[ClientId, Hello]:
        """The introductions that a new one of ``client`` has to match.

        Before the run begins a site may correct its own, and a site that has left no longer counts.
        """
        settled = self.known.keys() if self._initial is None else self._initial
        return {c: h for c, h in self.known.items() if c in settled or (c != client and c in self.nodes)}
