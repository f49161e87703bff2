"""FedIT (arXiv 2305.05644): one LoRA for all clients; A and B are averaged separately, weighted by examples.

This is federated averaging (FedAvg) of a LoRA, as in the authors' code (JayZhang42/FederatedGPT-Shepherd, bcffa00).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.methods.base import Method
from coterie.methods.findings import AggregationError, Finding
from coterie.methods.parts import (
    Heads,
    Shapes,
    lora_of,
    mean_error,
    mean_heads,
    settle,
    shapes_of,
    start_heads,
    start_lora,
    weights_of,
)
from coterie.ops.mean import mean, relative_error
from coterie.requests import ClientProgram, Train
from coterie.types import BaseSpec, ClientId, ClientInfo, Instruction, Personal, Reply, Tensors


@dataclass(frozen=True)
class FedITState:
    """The global A and B, the shared heads if there are any, and the error of the last averaging."""

    lora: Tensors
    heads: Heads
    error: float = 0.0


@dataclass(frozen=True)
class FedIT(Method[FedITState]):
    """A <- sum p_i A_i, B <- sum p_i B_i, with p_i = n_i / sum n."""

    name = "fedit"
    title = "FedIT"
    paper = "arXiv 2305.05644"
    summary = "averages A and B, weighted by examples"
    State = FedITState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedITState:
        return FedITState(start_lora(base, self.plan), start_heads(base, self.plan, clients))

    def configure(self, state: FedITState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return {c.id: Instruction({**state.lora, **state.heads.of(c.id)}) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim)
        return settle(self.plan, trained, me, personal, travels=lora_of(bank.tensors))

    def expects(self, state: FedITState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(state.lora, state.heads.of(me.id))

    def aggregate(self, state: FedITState, replies: Mapping[ClientId, Reply], rnd: int) -> FedITState:
        weight = weights_of(replies)
        uploads = [lora_of(replies[c].tensors) for c in weight]
        return FedITState(
            lora=mean(uploads, list(weight.values())),
            heads=mean_heads(state.heads, replies, weight),
            error=relative_error(mean_error(uploads, list(weight.values()))),
        )

    def experts(self, state: FedITState) -> Mapping[str, Tensors]:
        return {"global": state.lora}

    def describe(self, state: FedITState) -> Sequence[Finding]:
        return [AggregationError(state.error)]


METHOD = FedIT
