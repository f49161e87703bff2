"""Local: every client fine-tunes one LoRA on its own data, and nothing but metrics travels. The lower reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.methods.base import MethodSettings, Plan
from coterie.methods.findings import Finding
from coterie.methods.parts import start_head, start_lora, statistics
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientProgram,
    ClientResult,
    Instruction,
    Key,
    Personal,
    Reply,
    Tensors,
    Train,
)


class LocalSettings(MethodSettings):
    """Local has no settings."""


@dataclass(frozen=True)
class LocalState:
    """Nothing is kept on the server."""


@dataclass(frozen=True)
class Local:
    """Every client alone: A, B and the head are personal."""

    settings: LocalSettings
    plan: Plan

    name = "local"
    title = "Local"
    paper = "-"
    summary = "every client alone"
    evaluates = "received"
    newcomers = ""
    Settings = LocalSettings
    State = LocalState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> LocalState:
        start_lora(base, self.plan)
        return LocalState()

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        return Personal({**start_lora(base, self.plan), **start_head(base, self.plan, me)})

    def configure(self, state: LocalState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return {client.id: Instruction() for client in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        trained = yield Train(self.bank(ins, me, personal), frozenset(personal.tensors), self.plan.optim)
        return ClientResult(Reply({}, me.num_train, statistics(trained)), Personal(trained.tensors))

    def expects(self, state: LocalState, me: ClientInfo, rnd: int) -> Mapping[Key, tuple[int, ...]]:
        return {}

    def aggregate(self, state: LocalState, replies: Mapping[ClientId, Reply], rnd: int) -> LocalState:
        return state

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        return Bank(personal.tensors, scaling=self.plan.scaling, dropout=self.plan.dropout)

    def experts(self, state: LocalState) -> Mapping[str, Tensors]:
        return {}

    def describe(self, state: LocalState) -> Sequence[Finding]:
        return []


METHOD = Local
