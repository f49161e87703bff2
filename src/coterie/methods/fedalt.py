"""FedALT (arXiv 2503.11880, AAAI 2026): each client's LoRA, beside a frozen mean of the others', mixed per token.

    y = W0 x + s (g_1 B_i A_i x + g_2 B_row A_row x),  g = softmax(R x)
    A_row = 1/(K-1) sum_{j != i} A_j,  B_row = 1/(K-1) sum_{j != i} B_j

"Row" is the rest of the world: the other K-1 of K clients. A client keeps training its own LoRA (A_i, B_i), which no
average ever overwrites, and the mixer R [2, d_in] of every target; the rest of the world is frozen. Only A_i and B_i
are sent.

Differs from the paper and its published code (commit 8be3dde): every client's A starts from the run's seed (there,
each from a random one); before anything was averaged, the rest of the world is the client's own A with B = 0 (there, a
random A with B = 0: the same output), and nothing is sent for it; of a client that misses a round, the others average
what it sent last; a client that is alone has no rest of the world, and no mixer: it trains as ``local`` does.
The aggregation error is that of the mean over all clients, each of whom receives a mean over all but itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from coterie.methods.base import Method
from coterie.methods.findings import AggregationError, Finding
from coterie.methods.parts import (
    Heads,
    Shapes,
    head_of,
    lora_of,
    lora_shapes,
    mean_error,
    mean_heads,
    router_of,
    settle,
    shapes_of,
    start_heads,
    start_lora,
    start_router,
    weights_of,
    with_head,
)
from coterie.ops.mean import mean, relative_error
from coterie.requests import ClientProgram, Train
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, GateSpec, Instruction, Part, Personal, Reply, Tensors

OWN, REST = 0, 1  # the two experts of a client's bank


@dataclass(frozen=True)
class FedALTState:
    """The LoRA that each client sent last, and the shared heads if any."""

    base: BaseSpec
    clients: tuple[ClientId, ...]
    loras: Mapping[ClientId, Tensors] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    error: float | None = None


@dataclass(frozen=True)
class FedALT(Method[FedALTState]):
    """The method; see the module's docstring."""

    name = "fedalt"
    title = "FedALT"
    paper = "arXiv 2503.11880 (AAAI 2026)"
    summary = "each client's LoRA beside a frozen mean of the others', mixed per token"
    no_rules = "its clients receive means over everyone but themselves, of what each one sent last"
    State = FedALTState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedALTState:
        start_lora(base, self.plan)  # refuses a base without targets
        heads = start_heads(base, self.plan, clients)
        return FedALTState(base, tuple(sorted(c.id for c in clients)), heads=heads)

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        head = super().begin(base, me).tensors
        return Personal({**start_lora(base, self.plan), **start_router(base, self.plan, 2), **head})

    def configure(self, state: FedALTState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return {c.id: self._instruction(state, c.id) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        trainable = frozenset(key for key in bank.tensors if key.expert != REST)
        trained = yield Train(bank, trainable, self.plan.optim)
        own = lora_of(trained.tensors)
        return settle(self.plan, trained, me, personal, travels=own, stays=own | router_of(trained.tensors))

    def expects(self, state: FedALTState, me: ClientInfo, rnd: int) -> Shapes:
        return lora_shapes(state.base, self.plan) | shapes_of(state.heads.of(me.id))

    def started_from(
        self, base: BaseSpec, state: FedALTState, me: ClientInfo, ins: Instruction, reply: Reply
    ) -> Tensors:
        return {**self.begin(base, me).tensors, **state.loras.get(me.id, {}), **head_of(ins.tensors)}

    def aggregate(self, state: FedALTState, replies: Mapping[ClientId, Reply], rnd: int) -> FedALTState:
        loras = {**state.loras, **{c: lora_of(replies[c].tensors) for c in sorted(replies)}}
        everyone = [loras[c] for c in sorted(loras)]
        return replace(
            state,
            loras=loras,
            heads=mean_heads(state.heads, replies, weights_of(replies)),
            error=relative_error(mean_error(everyone, [1.0] * len(everyone))),
        )

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        scaling, dropout, own = self.plan.scaling, self.plan.dropout, lora_of(personal.tensors)
        if not ins.info["others"]:
            return Bank(with_head(own, ins, personal), scaling=scaling, dropout=dropout)
        rest = lora_of(ins.tensors) or _without_effect(lora_of(own, OWN, new=REST))
        tensors = with_head({**own, **rest, **router_of(personal.tensors)}, ins, personal)
        return Bank(tensors, GateSpec("softmax"), scaling, dropout)

    def experts(self, state: FedALTState) -> Mapping[str, Tensors]:
        """The mean of all clients' LoRAs: the rest of the world for a client that joins them."""
        return {"everyone": _mean([state.loras[c] for c in sorted(state.loras)])} if state.loras else {}

    def describe(self, state: FedALTState) -> Sequence[Finding]:
        return [AggregationError(state.error)]

    def _instruction(self, state: FedALTState, client: ClientId) -> Instruction:
        others = [state.loras[c] for c in sorted(state.loras) if c != client]
        rest = lora_of(_mean(others), OWN, new=REST) if others else {}
        known = bool(others) or any(c != client for c in state.clients)
        return Instruction({**rest, **state.heads.of(client)}, {"others": known})


def _mean(loras: Sequence[Tensors]) -> Tensors:
    return mean(loras, [1.0] * len(loras))


def _without_effect(lora: Tensors) -> Tensors:
    """``lora`` with B = 0."""
    return {key: torch.zeros_like(value) if key.part is Part.B else value for key, value in lora.items()}


METHOD = FedALT
