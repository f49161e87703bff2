"""Local: every client fine-tunes one LoRA on its own data, and nothing but metrics travels. The lower reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.methods.base import Method
from coterie.methods.parts import Shapes, start_head, start_lora, statistics
from coterie.methods.releases import Release
from coterie.requests import ClientProgram, Train
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, ClientResult, Instruction, Personal, Reply


@dataclass(frozen=True)
class LocalState:
    """The server keeps nothing."""


@dataclass(frozen=True)
class Local(Method[LocalState]):
    """Every client alone: A, B and the head are personal."""

    name = "local"
    title = "Local"
    paper = "-"
    summary = "every client alone"
    no_rules = "nothing is averaged"
    State = LocalState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> LocalState:
        start_lora(base, self.plan)  # raises for a base without targets
        return LocalState()

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        return Personal({**start_lora(base, self.plan), **start_head(base, self.plan, me)})

    def configure(self, state: LocalState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return {client.id: Instruction() for client in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        trained = yield Train(self.bank(ins, me, personal), frozenset(personal.tensors), self.plan.optim)
        return ClientResult(Reply({}, me.num_train, statistics(trained)), Personal(trained.tensors))

    def expects(self, state: LocalState, me: ClientInfo, rnd: int) -> Shapes:
        return {}

    def releases(self) -> Sequence[Release]:
        return ()

    def aggregate(self, state: LocalState, replies: Mapping[ClientId, Reply], rnd: int) -> LocalState:
        return state

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        return Bank(personal.tensors, scaling=self.plan.scaling, dropout=self.plan.dropout)


METHOD = Local
