"""Both halves of a method without a model: rounds over made-up training, with all that an engine would check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from coterie import codec
from coterie.engines.bank_checks import bank_fault
from coterie.engines.checks import fault_of
from coterie.ops.streams import stream
from coterie.requests import Answer, ClientProgram, Observe, Observed, Program, Request, Score, Scored, Train, Trained
from coterie.types import (
    NO_EXPERT,
    Bank,
    BaseSpec,
    ClientInfo,
    ClientResult,
    HeadParameter,
    Instruction,
    Key,
    Part,
    Personal,
    Reply,
    Target,
)

BASE = BaseSpec((Target("q", 6, 5), Target("v", 7, 8)), (HeadParameter("score.weight", (-1, 6), "normal"),))
CLIENTS = tuple(
    ClientInfo(f"client-{i}", 10 + 3 * i, labels=("yes", "no") if i < 3 else ("a", "b", "c")) for i in range(4)
)
R = TypeVar("R")
Training = Callable[[Train, ClientInfo], Trained]
Scoring = Callable[[Score, ClientInfo], list[Scored]]
Observing = Callable[[Observe, ClientInfo], Observed]


def moved(request: Train, client: ClientInfo) -> Trained:
    """As if trained: every trainable tensor moves at random, by the client's name."""
    tensors = {}
    for key in sorted(request.trainable):
        value = request.bank.tensors[key]
        tensors[key] = value + 0.3 * torch.randn(value.shape, generator=stream(3, client.id, str(key)))
    return Trained(tensors, 1.0, client.num_train, 100, 5)


def alike(request: Score, client: ClientInfo) -> list[Scored]:
    """As if every bank had the same loss."""
    return [Scored(1.0, {}, client.num_train) for _ in request.banks]


def observed(request: Observe, client: ClientInfo) -> Observed:
    """As if the client's rows had these directions."""
    assert request.what == ("directions",)
    widths = {key.module: value.shape[1] for key, value in request.bank.tensors.items() if key.part is Part.A}
    directions = {
        Key(module, NO_EXPERT, Part.EMBEDDING): torch.rand(width, generator=stream(4, client.id, module))
        for module, width in widths.items()
    }
    return Observed({}, 10, directions=directions)


def still(request: Train, client: ClientInfo) -> Trained:
    """As if trained with a learning rate of zero."""
    return Trained({key: request.bank.tensors[key] for key in request.trainable}, 1.0, client.num_train, 100, 5)


def driven(
    program: Program[R],
    client: ClientInfo,
    train: Training = moved,
    score: Scoring = alike,
    observe: Observing | None = None,
) -> tuple[R, list[Request]]:
    """What a program returns, and what it asked for."""
    asked: list[Request] = []
    answer: Answer | None = None
    while True:
        try:
            request = program.send(answer)
        except StopIteration as stop:
            return stop.value, asked
        asked.append(request)
        match request:
            case Train():
                assert request.trainable
                answer = train(request, client)
            case Score():
                answer = score(request, client)
            case Observe():
                answer = (observe or observed)(request, client)


def finished(program: ClientProgram, client: ClientInfo, train: Training = moved) -> tuple[ClientResult, Train]:
    """What a program that asks for one training returns, and what it asked for."""
    result, (request,) = driven(program, client, train)
    assert isinstance(request, Train)
    return result, request


class Play:
    """A federation of ``clients`` by hand. ``state`` and ``personal`` are what a crash after each round would leave.

    ``asked`` has what each client's program asked for in its last round.
    """

    def __init__(self, method: Any, clients: Sequence[ClientInfo] = CLIENTS) -> None:
        self.method, self.clients = method, {c.id: c for c in clients}
        self.state = method.init(BASE, clients)
        self.personal: dict[str, Personal] = {}
        self.asked: dict[str, list[Request]] = {}
        self.rnd = 0

    def round(
        self,
        train: Training = moved,
        only: Sequence[str] = (),
        score: Scoring = alike,
        observe: Observing | None = None,
    ) -> dict[str, Reply]:
        """One round over ``only`` (all): every reply is checked as an engine does; returns what was sent."""
        self.rnd += 1
        cohort = [c for c in self.clients.values() if not only or c.id in only]
        replies: dict[str, Reply] = {}
        for client, ins in self.method.configure(self.state, cohort, self.rnd).items():
            me = self.clients[client]
            sent = codec.decode(Instruction, codec.encode(ins))
            program = self.method.client(sent, me, self.own(me))
            result, self.asked[client] = driven(program, me, train, score, observe)
            expected = self.method.expects(self.state, me, self.rnd)
            info = self.method.expects_info(self.state, me, self.rnd)
            assert fault_of(result.reply, expected, 1e4, me.num_train, info) is None
            replies[client] = codec.decode(Reply, codec.encode(result.reply))
            start = self.method.started_from(BASE, self.state, me, sent, replies[client])
            for key, value in replies[client].tensors.items():
                if key.part is Part.EMBEDDING:  # measured, not trained
                    continue
                assert start[key].shape == value.shape
                assert train is not still or torch.equal(start[key], value), f"{key} did not start there"
            self.personal[client] = codec.decode(Personal, codec.encode(result.personal))
        state = self.method.aggregate(self.state, replies, self.rnd)
        turned = self.method.aggregate(self.state, dict(reversed(list(replies.items()))), self.rnd)
        assert codec.encode(turned) == codec.encode(state), "the order of the replies must not matter"
        self.state = codec.decode(self.method.State, codec.encode(state))
        return replies

    def own(self, me: ClientInfo) -> Personal:
        return self.personal.get(me.id) or self.method.begin(BASE, me)

    def banks(self, score: Scoring = alike) -> dict[str, Bank]:
        """What each client evaluates with now."""
        instructions = self.method.configure(self.state, list(self.clients.values()), self.rnd + 1)
        programs = {c: self.method.choose(instructions[c], me, self.own(me)) for c, me in self.clients.items()}
        banks = {c: driven(program, self.clients[c], score=score)[0] for c, program in programs.items()}
        for client, bank in banks.items():
            assert bank_fault(bank, BASE, self.clients[client].labels) is None
        return banks


def parts(tensors: Mapping[Key, Tensor]) -> set[Part]:
    return {key.part for key in tensors}


def products(tensors: Mapping[Key, Tensor], scaling: float = 1.0) -> dict[str, Tensor]:
    """``scaling`` * sum over experts of B A, by module, in float64: what a bank with gate 1 adds to the base."""
    found: dict[str, Tensor] = {}
    for key, a in tensors.items():
        if key.part is Part.A:
            product = scaling * tensors[key._replace(part=Part.B)].double() @ a.double()
            found[key.module] = found.get(key.module, torch.zeros(())) + product
    return found


def mean_of_products(replies: Mapping[str, Reply], scaling: Mapping[str, float]) -> dict[str, Tensor]:
    """sum_i p_i s_i B_i A_i by module, p_i by examples: what exact averaging makes."""
    total = sum(reply.num_examples for reply in replies.values())
    found: dict[str, Tensor] = {}
    for client, reply in replies.items():
        for module, product in products(reply.tensors, scaling[client] * reply.num_examples / total).items():
            found[module] = found.get(module, torch.zeros(())) + product
    return found
