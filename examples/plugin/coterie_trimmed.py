"""Trimmed mean (arXiv 1803.01498, on LoRA): of every number, the largest and the smallest are left out of the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from coterie import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientProgram,
    Instruction,
    Method,
    MethodSettings,
    Personal,
    Reply,
    Tensors,
    Train,
)
from coterie.methods.parts import (
    Heads,
    Shapes,
    lora_of,
    mean_heads,
    settle,
    shapes_of,
    start_heads,
    start_lora,
    weights_of,
    with_head,
)


class TrimmedSettings(MethodSettings):
    """The keys of ``[method]``, beside its name."""

    trim: float = Field(0.1, ge=0, lt=0.5, description="the share of replies to leave out at each end")


@dataclass(frozen=True)
class TrimmedState:
    """The global A and B, and the shared heads if there are any."""

    lora: Tensors
    heads: Heads


@dataclass(frozen=True)
class Trimmed(Method[TrimmedState]):
    """A and B of a round are the trimmed means of what the clients sent, each number by itself."""

    settings: TrimmedSettings

    name = "trimmed"
    title = "Trimmed mean"
    paper = "arXiv 1803.01498"
    summary = "averages A and B without the extremes of every number"
    Settings = TrimmedSettings
    State = TrimmedState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> TrimmedState:
        return TrimmedState(start_lora(base, self.plan), start_heads(base, self.plan, clients))

    def configure(self, state: TrimmedState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return {c.id: Instruction({**state.lora, **state.heads.of(c.id)}) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim)
        return settle(self.plan, trained, me, personal, travels=lora_of(trained.tensors))

    def expects(self, state: TrimmedState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(state.lora, state.heads.of(me.id))

    def aggregate(self, state: TrimmedState, replies: Mapping[ClientId, Reply], rnd: int) -> TrimmedState:
        uploads = [replies[c].tensors for c in sorted(replies)]
        out = int(self.settings.trim * len(uploads))
        lora = {}
        for key in state.lora:
            ordered = torch.stack([upload[key] for upload in uploads]).sort(dim=0).values
            lora[key] = ordered[out : len(uploads) - out].mean(dim=0)
        return TrimmedState(lora, mean_heads(state.heads, replies, weights_of(replies, "uniform")))

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        tensors = with_head(lora_of(ins.tensors), ins, personal)
        return Bank(tensors, scaling=self.plan.scaling, dropout=self.plan.dropout)

    def experts(self, state: TrimmedState) -> Mapping[str, Tensors]:
        return {"global": state.lora}
