"""The engine of a real federation: the clients are sites that answer messages over a transport.

Knows no network. The Runner uses it as it uses the local engine. A site that does not answer before the deadline is
left out of the round with the reason, and an answer that comes later is dropped and noted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from coterie.compute.workplace import Steps
from coterie.data.truncation import Truncation
from coterie.deploy.answers import Outcome, decoded
from coterie.deploy.events import Unreadable
from coterie.deploy.exchange import Arrival, Exchange, Unanswered
from coterie.deploy.limits import EVALUATION, bank_limit
from coterie.deploy.sites import Sites
from coterie.energy import SOURCES, Energy
from coterie.engines.bank_checks import bank_fault
from coterie.engines.base import Delivery, Evaluation, Stream
from coterie.engines.checks import evaluation_fault, is_number
from coterie.engines.encode_once import EncodedOnce
from coterie.flower.message import Message
from coterie.methods.base import Method
from coterie.text import plain_text
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, ExportedAs, Instruction, Json, Reply

T = TypeVar("T")


@dataclass
class RemoteEngine:
    """See the module. ``since`` is the round that this attempt starts from, ``keep`` the oldest that it needs.

    It needs the rounds ``kept_rounds`` too. ``started`` is called with ``since`` before a site goes back to it.
    """

    sites: Sites
    since: int = 0
    keep: int = 0
    kept_rounds: tuple[int, ...] = ()
    started: Callable[[int], None] = lambda rnd: None
    _earlier: Unanswered = field(default_factory=Unanswered)

    @property
    def spec(self) -> BaseSpec:
        return next(iter(self.sites.known.values())).spec

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        return self.sites.clients

    def train(
        self,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        limits: Mapping[ClientId, int] | None = None,
    ) -> Stream[Delivery]:
        """Every client's delivery for round ``rnd``, as it comes; at the deadline an error for each that is missing."""
        limits = limits or dict.fromkeys(instructions, sys.maxsize)
        for arrival in self._exchange("train", instructions, rnd, {}, limits):
            reply, error = _reply(arrival.answer)
            yield (
                arrival.client,
                Delivery(
                    reply,
                    error,
                    arrival.bytes_down,
                    arrival.bytes_up,
                    arrival.seconds,
                    energy=energy_in(arrival.answer),
                ),
            )

    def evaluate(
        self,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        splits: tuple[str, ...],
        usage: bool = False,
    ) -> Stream[Evaluation]:
        """The scores of the clients that answer."""
        details: dict[str, Json] = {"splits": list(splits), "usage": usage}
        modules = {target.name for target in self.spec.targets}
        rows = {c.id: c.num_train + c.num_validation + c.num_test for c in self.clients}

        def fault(client: ClientId, evaluation: Evaluation) -> str | None:
            return evaluation_fault(evaluation, splits, modules, rows[client])

        limits = dict.fromkeys(instructions, EVALUATION)
        for client, answer in self._values(Evaluation, "evaluate", instructions, rnd, details, limits, fault):
            observed = answer.observed if usage else None
            yield (
                client,
                replace(answer, observed=observed, samples=(), note=plain_text(answer.note) if answer.note else None),
            )

    def banks(
        self, method: Method, instructions: Mapping[ClientId, Instruction], rnd: int, export: ExportedAs = "last"
    ) -> Stream[Bank]:
        """The banks of the clients whose site sends them; every site writes its own bank to its disk."""
        spec, labels = self.spec, {client.id: client.labels or () for client in self.clients}

        def fault(client: ClientId, bank: Bank) -> str | None:
            return bank_fault(bank, spec, labels[client])

        limits = {c: bank_limit(spec, len(labels[c]), method.max_rank, ins) for c, ins in instructions.items()}
        yield from self._values(Bank, "query.bank", instructions, rnd, {"export": export}, limits, fault)

    def truncation(self) -> Truncation:
        """Nothing that the server knows: `coterie site check` says it at each site."""
        return Truncation()

    def watch(self, report: Callable[[Steps], None]) -> None:
        """Do nothing: clients train at their sites, whose logs say how far they are."""

    def restore(self, rnd: int) -> None:
        """Note in every message that the site has to go back to its state after round ``rnd``, which it does once."""
        self.since = rnd
        self.started(rnd)

    def state_rounds(self, rnd: int) -> Mapping[str, Mapping[ClientId, int]]:
        """Nothing for the server to check: each site keeps its own state."""
        return {}

    def prune(self, rnd: int, kept_rounds: Collection[int] = ()) -> None:
        """Note in the next messages which states no checkpoint needs any more."""
        self.keep, self.kept_rounds = max(0, rnd), tuple(sorted(kept_rounds))

    def close(self) -> None:
        """Do nothing: whoever started the sites ends them."""

    def _exchange(
        self,
        kind: str,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        details: Mapping[str, Json],
        limits: Mapping[ClientId, int],
    ) -> Iterator[Arrival]:
        encoded = EncodedOnce(instructions)
        yield from self.exchange(kind, {c: encoded.take(c) for c in sorted(instructions)}, rnd, details, limits)

    def exchange(
        self,
        kind: str,
        bodies: Mapping[ClientId, bytes],
        rnd: int,
        details: Mapping[str, Json],
        limits: Mapping[ClientId, int],
    ) -> Iterator[Arrival]:
        """Send a message with each of ``bodies``; the outcome for every client, as it comes."""
        since, keep, kept_rounds = self.since, self.keep, self.kept_rounds
        messages = {
            client: self.sites.agreement.message(
                kind, client, rnd, details, body, since=since, keep=keep, kept_rounds=kept_rounds
            )
            for client, body in sorted(bodies.items())
        }
        yield from Exchange(self.sites, kind, rnd, messages, limits, self._earlier)

    def _values(
        self,
        kind: type[T],
        name: str,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        details: Mapping[str, Json],
        limits: Mapping[ClientId, int],
        fault_in: Callable[[ClientId, T], str | None],
    ) -> Iterator[tuple[ClientId, T]]:
        """The values of the answers. An answer that is unreadable or has a fault is noted and left out."""
        for arrival in self._exchange(name, instructions, rnd, details, limits):
            client, answer = arrival.client, arrival.answer
            if isinstance(answer, str) or not answer.body:
                continue  # noted already; a site may also keep its bank to itself
            value, fault = decoded(kind, answer.body)
            if value is not None:
                fault = fault_in(client, value)
            if value is not None and fault is None:
                yield client, value
            else:
                reason = plain_text(str(fault))
                self.sites.note(Unreadable(name, rnd, client, reason))


def energy_in(answer: Message | str) -> Energy | None:
    """What the site says that its round took; None where it does not, or says it wrongly."""
    said = None if isinstance(answer, str) else answer.head.get("energy")
    if not isinstance(said, Mapping) or not is_number(said.get("joules")):
        return None
    source = next((known for known in SOURCES if known == said.get("source")), None)
    return Energy(float(said["joules"]), source) if source else None


def _reply(answer: Message | str) -> Outcome[Reply]:
    return (None, answer) if isinstance(answer, str) else decoded(Reply, answer.body)
