"""The replies of a round: clients train, and what they send is checked before it counts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from coterie.engines.base import Delivery, Engine
from coterie.engines.bounds import Sizes, large_updates, reply_limit, update_sizes, usual_rate
from coterie.engines.checks import fault_of
from coterie.methods.base import Method
from coterie.runs.entries import ClientRound
from coterie.runs.events import ClientDone
from coterie.runs.log import Log
from coterie.runs.secure import Sums, filled, received, tensors_stay
from coterie.runs.settings import RoundSettings
from coterie.types import ClientId, ClientInfo, Instruction, Reply, Tensors

S = TypeVar("S")  # the method's state


@dataclass
class Collected:
    """What the clients of a round sent.

    ``replies``: those that are used. ``failed``: why the others are not. ``entries``: every client's entry in the
    record. ``instructions``, ``starts``: what clients were sent, and what they started from; the latter where
    ``[robust]`` or secure sums need it.
    """

    instructions: dict[ClientId, Instruction]
    replies: dict[ClientId, Reply] = field(default_factory=dict)
    entries: dict[ClientId, ClientRound] = field(default_factory=dict)
    failed: dict[ClientId, str] = field(default_factory=dict)
    starts: dict[ClientId, Tensors] = field(default_factory=dict)

    def leave_out(self, client: ClientId, fault: str) -> None:
        """Use nothing of what ``client`` sent, its statistics included."""
        self.replies.pop(client, None)
        self.failed[client] = fault
        self.entries[client] = replace(self.entries[client], said={})


@dataclass(frozen=True)
class Training(Generic[S]):
    """Has clients train a round, and checks their replies."""

    method: Method[S]
    engine: Engine
    settings: RoundSettings
    sums: Sums | None
    log: Log

    def collect(self, state: S, cohort: Sequence[ClientInfo], rnd: int) -> Collected:
        """What ``cohort`` sends in round ``rnd``, which begins with ``state``."""
        made = Collected({**self.method.configure(state, cohort, rnd)})
        infos = {client.id: client for client in cohort}
        sizes: dict[ClientId, Sizes] = {}
        limits = {client.id: reply_limit(self.method.expects(state, client, rnd)) for client in cohort}
        with closing(self.engine.train(self.method, made.instructions, rnd, limits)) as deliveries:
            for client, delivery in deliveries:
                self.log.note([delivery.note] if delivery.note else [], rnd)
                delivery = received(self.sums, self.method, delivery)
                fault = delivery.error or self._fault(state, delivery.reply, infos[client], rnd)
                made.entries[client] = self._entry(delivery)
                if fault is not None:
                    made.leave_out(client, fault)
                elif delivery.reply is not None:
                    sizes |= self._take(made, state, infos[client], delivery.reply, rnd)
                self.log.listen(ClientDone(rnd, client, made.entries[client], fault))
        optim = self.method.plan.optim
        steps = {client: optim.steps_on(infos[client].num_train) for client in sizes}
        rate, factors = usual_rate(optim, rnd), self.method.fastest(rnd)
        for client, fault in large_updates(sizes, steps, self.settings.update_bound, rate, factors).items():
            made.leave_out(client, fault)
        return made

    def _take(self, made: Collected, state: S, client: ClientInfo, reply: Reply, rnd: int) -> dict[ClientId, Sizes]:
        """Use ``reply``; how large its update is, where no clip bounds that."""
        reply = filled(self.sums, reply, self.method.expects(state, client, rnd))
        start = self.method.started_from(self.engine.spec, state, client, made.instructions[client.id], reply)
        made.replies[client.id] = reply
        if self.method.plan.robust.active or self.sums:
            made.starts[client.id] = start
        clipped = self.sums or self.method.plan.privacy.by_server
        return {} if clipped else {client.id: update_sizes(reply, start)}

    def _fault(self, state: S, reply: Reply | None, client: ClientInfo, rnd: int) -> str | None:
        if reply is None:
            return "no reply"
        expected = {} if tensors_stay(self.sums) else self.method.expects(state, client, rnd)
        info = self.method.expects_info(state, client, rnd)
        optim, together = self.method.plan.optim, self.engine.clients if self.method.needs_all_rows else [client]
        rows = [each.num_train for each in together]  # of every client that it trains on
        return fault_of(reply, expected, self.settings.norm_bound, client.num_train, info, optim, rows)

    def _entry(self, delivery: Delivery) -> ClientRound:
        """A client's entry in the record, without energy where nobody may know how much it trained."""
        statistics = dict(delivery.reply.info) if delivery.reply else {}
        energy = None if self.sums or self.method.plan.privacy.active else delivery.energy
        return ClientRound(delivery.bytes_down, delivery.bytes_up, delivery.seconds, statistics, energy)
