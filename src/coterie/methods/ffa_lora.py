"""FFA-LoRA (arXiv 2403.12313, ICLR 2024): A stays at its random start; only B is trained, sent and averaged.

B <- sum p_i B_i with p_i = n_i / sum n, and A = A_0 from the run's seed. With one A for all, the mean of the products
is the product of the means, sum p_i B_i A_0 = (sum p_i B_i) A_0 (section 4 of the paper): averaging loses nothing.

Differs from the paper: clients weigh by their rows. The paper leaves out alpha / r, which only scales the learning rate
here; it stays, so that settings mean the same in all methods.
No code of the authors was at hand. The switch ``freeze_A`` in FedSA-LoRA's published code (commit fc276b5) computes the
same, with A_0 from a global random state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coterie.methods.base import Method, Onboarded
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
from coterie.requests import ClientProgram, Program, Train
from coterie.types import BaseSpec, ClientId, ClientInfo, Instruction, Part, Personal, Reply, Tensors


@dataclass(frozen=True)
class FFALoRAState:
    """The A that never changes, the global B, and the shared heads if any."""

    a: Tensors
    b: Tensors
    heads: Heads


@dataclass(frozen=True)
class FFALoRA(Method[FFALoRAState]):
    """B <- sum p_i B_i; A is a function of the run's seed, so every client makes it for itself."""

    name = "ffa_lora"
    title = "FFA-LoRA"
    paper = "arXiv 2403.12313 (ICLR 2024)"
    summary = "freezes A at its random start; trains and averages B"
    State = FFALoRAState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FFALoRAState:
        lora = start_lora(base, self.plan)
        return FFALoRAState(part_of(lora, Part.A), part_of(lora, Part.B), start_heads(base, self.plan, clients))

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        return Personal({**part_of(start_lora(base, self.plan), Part.A), **super().begin(base, me).tensors})

    def configure(self, state: FFALoRAState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return {c.id: Instruction({**state.b, **state.heads.of(c.id)}) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        trained = yield Train(bank, frozenset(k for k in bank.tensors if k.part is not Part.A), self.plan.optim)
        return settle(self.plan, trained, me, personal, travels=lora_of(trained.tensors))

    def onboard(self, welcome: Any, base: BaseSpec, me: ClientInfo) -> Program[Onboarded]:
        """As for others, but A stays as it is."""
        joined = yield from super().onboard(welcome, base, me)
        return replace(joined, trainable=frozenset(k for k in joined.trainable if k.part is not Part.A))

    def releases(self) -> Sequence[Release]:
        return (Release("B"), *head_release(self.plan.head == "shared"))

    def expects(self, state: FFALoRAState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(state.b, state.heads.of(me.id))

    def aggregate(self, state: FFALoRAState, replies: Mapping[ClientId, Reply], rnd: int) -> FFALoRAState:
        weight = weights_of(replies)
        b = mean([lora_of(replies[c].tensors) for c in weight], list(weight.values()))
        return FFALoRAState(state.a, b, mean_heads(state.heads, replies, weight))

    def experts(self, state: FFALoRAState) -> Mapping[str, Tensors]:
        return {"global": {**state.a, **state.b}}

    def describe(self, state: FFALoRAState) -> Sequence[Finding]:
        return [AggregationError(0.0)]  # exact: all clients have one A


METHOD = FFALoRA
