"""RoLoRA (arXiv 2502.01755, NeurIPS 2025): A and B are trained and averaged in alternate rounds, the other one frozen.

Odd rounds: B <- sum p_i B_i with the common A frozen. Even rounds: A <- sum p_i A_i with the common B frozen.
p_i = n_i / sum n. In each round one of the two is the same for all clients, so averaging loses nothing; over two rounds
both learn. B comes first: it starts at zero, and until it moves A has no gradient.

Differs from the paper: the server sends A and B in every round, so that a client that missed a round has both; the
paper sends the one that changed. The head trains in every round.
No code of the authors was at hand; this follows the paper.
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
    mean_heads,
    part_of,
    settle,
    shapes_of,
    start_heads,
    start_lora,
    weights_of,
)
from coterie.methods.releases import Release, head_release
from coterie.ops.mean import mean
from coterie.requests import ClientProgram, Train
from coterie.types import BaseSpec, ClientId, ClientInfo, Instruction, Part, Personal, Reply, Tensors


@dataclass(frozen=True)
class RoLoRAState:
    """The global A and B, and the shared heads if any."""

    lora: Tensors
    heads: Heads


@dataclass(frozen=True)
class RoLoRA(Method[RoLoRAState]):
    """B <- sum p_i B_i in odd rounds, A <- sum p_i A_i in even ones."""

    name = "rolora"
    title = "RoLoRA"
    paper = "arXiv 2502.01755 (NeurIPS 2025)"
    summary = "trains and averages A and B in alternate rounds"
    State = RoLoRAState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> RoLoRAState:
        return RoLoRAState(start_lora(base, self.plan), start_heads(base, self.plan, clients))

    def configure(self, state: RoLoRAState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        info = {"train": _turn(rnd).value}
        return {c.id: Instruction({**state.lora, **state.heads.of(c.id)}, info) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank, turn = self.bank(ins, me, personal), Part(ins.info["train"])
        trainable = frozenset(key for key in bank.tensors if key.part in (turn, Part.HEAD))
        trained = yield Train(bank, trainable, self.plan.optim)
        return settle(self.plan, trained, me, personal, part_of(trained.tensors, turn))

    def releases(self) -> Sequence[Release]:
        return (Release("B in odd rounds, A in even ones"), *head_release(self.plan.head == "shared"))

    def expects(self, state: RoLoRAState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(part_of(state.lora, _turn(rnd)), state.heads.of(me.id))

    def aggregate(self, state: RoLoRAState, replies: Mapping[ClientId, Reply], rnd: int) -> RoLoRAState:
        weight = weights_of(replies)
        new = mean([lora_of(replies[c].tensors) for c in weight], list(weight.values()))
        return RoLoRAState({**state.lora, **new}, mean_heads(state.heads, replies, weight))

    def experts(self, state: RoLoRAState) -> Mapping[str, Tensors]:
        return {"global": state.lora}

    def describe(self, state: RoLoRAState) -> Sequence[Finding]:
        return [AggregationError(0.0)]  # exact: in each round all clients have the same A, or the same B


def _turn(rnd: int) -> Part:
    """What is trained in round ``rnd`` (the first is 1)."""
    return Part.B if rnd % 2 else Part.A


METHOD = RoLoRA
