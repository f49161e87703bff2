"""The secure sums of a round: which there are, who opens them, and what comes of it.

In a simulation the clients' replies are in this process, and :class:`Simulated` takes every client's side. In a real
federation the replies come without tensors, and the sites keep theirs (:mod:`coterie.deploy`). Both run the same code
of :mod:`coterie.secure` over bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from coterie.engines.base import Delivery
from coterie.methods.base import Method
from coterie.methods.findings import AggregationError, Finding
from coterie.methods.parts import label_space
from coterie.methods.robust import Group
from coterie.methods.secure import (
    Members,
    SecureAggregationSettings,
    Sum,
    applied,
    check_members,
    in_no_sum,
    sessions_of,
    too_small,
)
from coterie.methods.secure_client import check_session, update_of, vector_of, without_statistics
from coterie.methods.secure_start import begun
from coterie.methods.sum_noise import SumNoise, sum_noise
from coterie.ops.noise import Noise, noise_from
from coterie.runs.agreed import Agreed
from coterie.secure.fixed_point import Integers
from coterie.secure.identity import Identity, identities
from coterie.secure.session import Session, needed_of
from coterie.secure.steps import Ask, Party, in_process, sums
from coterie.types import ClientId, ClientInfo, CoterieError, Instruction, Key, Reply, Tensors


class Sums(Protocol):
    """Reaches the clients of a round's secure sums.

    ``run`` names the run and its attempt: no two sessions are alike. ``tensors_stay``: replies have no tensors.
    """

    @property
    def run(self) -> str: ...

    @property
    def tensors_stay(self) -> bool: ...

    def carrier(self, sessions: Mapping[str, Session], clients: Members) -> Ask:
        """What carries the steps of ``sessions`` to the clients and their answers back."""
        ...


@dataclass
class Simulated:
    """All clients' sides in this process, with keys of their own that last as long as the process."""

    settings: SecureAggregationSettings
    run: str = "simulation"
    tensors_stay: bool = False
    noise: SumNoise | None = None
    _known: dict[ClientId, Identity] = field(default_factory=dict)

    def carrier(self, sessions: Mapping[str, Session], clients: Members) -> Ask:
        """What takes the steps to the clients' sides in this process."""
        if not {*clients.replies} <= {*self._known}:
            self._known = identities({*clients.replies, *self._known})
        return self.ask({client: self._party(client, clients) for client in sorted(clients.replies)})

    def ask(self, parties: Mapping[ClientId, Party]) -> Ask:
        """What carries the steps to the clients."""
        return in_process(parties)

    def _party(self, client: ClientId, clients: Members) -> Party:
        update = update_of(clients.replies[client], clients.starts[client], self.settings.clip, self.noise)
        sent = clients.begun[client]

        def admit(session: Session) -> None:
            uniform = session.most_examples == 0
            check_session(self.settings, session, self.run, session.rnd, uniform, sent, self.noise)

        def vector(session: Session) -> Integers:
            return vector_of(update, client, session, self.noise)

        return Party(client, self._known[client], vector, admit)


def noise_of(method: Method, source: Noise | None = None) -> SumNoise | None:
    """The noise of the secure sums of a run of ``method``, drawn from ``source``; None where they have none."""
    return sum_noise(method.plan.privacy, method.releases(), method.plan.rounds, source)


def simulated(method: Method) -> Simulated:
    """The secure sums of a run of ``method``, all of whose clients are in this process."""
    plan = method.plan
    return Simulated(plan.secure, noise=noise_of(method, noise_from(plan.privacy.noise_source, plan.seed)))


def summed(
    method: Method,
    opener: Sums,
    groups: Sequence[Group],
    replies: Mapping[ClientId, Reply],
    starts: Mapping[ClientId, Tensors],
    instructions: Mapping[ClientId, Instruction],
    examples: Mapping[ClientId, int],
    rnd: int,
) -> Agreed:
    """Open the sum of every group, and give its mean to its members, that have as many ``examples``."""
    settings, uniform = method.plan.secure, method.weighting == "uniform"
    sent = {c: begun(instructions[c], starts[c], method.instructs_alike) for c in replies}
    clients = Members(rnd, replies, starts, sent, examples)
    noise = noise_of(method)
    sessions = sessions_of(settings, groups, clients, uniform, opener.run, noise)
    changed, done = applied(sessions, sums(sessions, opener.carrier(sessions, clients)), clients, noise)
    steps = {client: step for of in done.values() for client, step in (of.vanished or {}).items()}
    failed = {c: f"gone before the step {steps.get(c, 'values')!r} of its secure sum" for c in replies.keys() - changed}
    not_opened = [
        f"the sum over {', '.join(of.members)} was not opened: {of.error}. What they share stays as it was"
        for of in done.values()
        if of.error
    ]
    not_opened += [f"tensors of {c} are in no secure sum, and stay as they were" for c in in_no_sum(groups, replies)]
    return Agreed(changed, failed, sums=done, notes=not_opened, once=_shortened(settings, done))


def _shortened(settings: SecureAggregationSettings, done: Mapping[str, Sum]) -> dict[str, str]:
    number, among = sum(of.shortened for of in done.values()), sum(len(of.survivors) for of in done.values())
    subject = "updates are shortened before they are added up"
    of_round = f"{number} of {among} of this round were longer than [secure_aggregation] clip = {settings.clip:g}"
    return {subject: f"{subject}: {of_round}; if they are honest, raise it"} if number else {}


def check_start(method: Method, clients: Sequence[ClientInfo], state: object, rnd: int) -> None:
    """Raises :class:`CoterieError` where a sum could overflow, or one of round ``rnd`` could never be opened.

    And where the grid is too coarse for a client's noise.
    """
    settings, noise = method.plan.secure, noise_of(method)
    check_members(settings, len(clients))
    if any(not of.optional for c in clients for of in method.expects_info(state, c, rnd).values()):
        return  # who is in which group is known once clients have replied
    replies = {c.id: _with_zeros(Reply(num_examples=c.num_train), method.expects(state, c, rnd)) for c in clients}
    groups = method.groups(state, replies, {c.id: label_space(c) for c in clients})
    if fault := too_small(settings, groups):
        raise CoterieError(fault)
    for members in {len(group.members) for group in groups}:
        if noise:
            noise.check(members, needed_of(members, settings.threshold, settings.min_group), settings.bits)


def tensors_stay(sums: Sums | None) -> bool:
    """Whether replies come without tensors, which their clients keep."""
    return sums is not None and sums.tensors_stay


def received(sums: Sums | None, method: Method, delivery: Delivery) -> Delivery:
    """``delivery``; where updates are hidden, with nothing in a reply's ``info`` but what the server needs."""
    if sums is None or delivery.reply is None:
        return delivery
    return replace(delivery, reply=without_statistics(delivery.reply, method.releases()))


def filled(sums: Sums | None, reply: Reply, expected: Mapping[Key, tuple[int, ...]]) -> Reply:
    """``reply``; where its client keeps the tensors, with zeros of their shapes."""
    return _with_zeros(reply, expected) if tensors_stay(sums) else reply


def _with_zeros(reply: Reply, expected: Mapping[Key, tuple[int, ...]]) -> Reply:
    return replace(reply, tensors={key: torch.zeros(shape) for key, shape in expected.items()})


def findings(method: Method, state: object) -> Sequence[Finding]:
    """What the method found, without what nobody can know of hidden updates: what averaging A and B apart loses."""
    everything = method.describe(state)
    if not method.plan.secure.enabled:
        return everything
    return [each for each in everything if not isinstance(each, AggregationError)]
