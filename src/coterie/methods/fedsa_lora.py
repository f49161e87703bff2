"""FedSA-LoRA (arXiv 2410.01463, ICLR 2025): clients train A and B; A is averaged, each client keeps its own B.

A <- sum p_i A_i with p_i = n_i / sum n. The paper finds that the clients' A become similar and carry what is common,
while their B stay apart and carry what is each client's own (section 3).

Differs from the paper: nothing that is known. The head stays on the client unless ``[task] head`` is ``shared``, as it
does in the published runs on GLUE.
Differs from the published code (commit fc276b5): one A for all at the start comes from the run's seed; there from the
server's first model. Its runs on GLUE take 10 steps of SGD a round, batches of 128, learning rate 0.02.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.methods.base import Method
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
class FedSALoRAState:
    """The global A and the shared heads if any. The server never sees a B."""

    a: Tensors
    heads: Heads


@dataclass(frozen=True)
class FedSALoRA(Method[FedSALoRAState]):
    """A <- sum p_i A_i; B_i and, by default, the head stay with client i."""

    name = "fedsa_lora"
    title = "FedSA-LoRA"
    paper = "arXiv 2410.01463 (ICLR 2025)"
    summary = "trains A and B; averages A, keeps B on the client"
    State = FedSALoRAState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedSALoRAState:
        a = part_of(start_lora(base, self.plan), Part.A)
        return FedSALoRAState(a, start_heads(base, self.plan, clients))

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        return Personal({**part_of(start_lora(base, self.plan), Part.B), **super().begin(base, me).tensors})

    def configure(
        self, state: FedSALoRAState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        return {c.id: Instruction({**state.a, **state.heads.of(c.id)}) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim)
        travels, stays = part_of(trained.tensors, Part.A), part_of(trained.tensors, Part.B)
        return settle(self.plan, trained, me, personal, travels, stays)

    def releases(self) -> Sequence[Release]:
        return (Release("A"), *head_release(self.plan.head == "shared"))

    def expects(self, state: FedSALoRAState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(state.a, state.heads.of(me.id))

    def aggregate(self, state: FedSALoRAState, replies: Mapping[ClientId, Reply], rnd: int) -> FedSALoRAState:
        weight = weights_of(replies)
        a = mean([lora_of(replies[c].tensors) for c in weight], list(weight.values()))
        return FedSALoRAState(a, mean_heads(state.heads, replies, weight))

    def experts(self, state: FedSALoRAState) -> Mapping[str, Tensors]:
        return {}  # there is no B to go with A; each client's LoRA is in its bundle


METHOD = FedSALoRA
