"""FedDPA (arXiv 2403.19211, NeurIPS 2024): a global LoRA and a local one, weighted for each row by similarity.

    training the local LoRA:   y = W0 x + s ((1 - b) B_g A_g x + b B_l A_l x), the global one frozen
    training the global LoRA:  y = W0 x + s B_g A_g x, then averaged as in FedIT
    using both:                y = W0 x + s ((1 - a) B_g A_g x + a B_l A_l x),  a = scale * 1/S sum_s cos(h, h_s)

a is the instance-wise weight: h represents the row, h_s one of S rows of the client's training data. This is FedDPA-T,
where both LoRAs train in every round; b is its updating weight.

Differs from the paper and its published code (commit cf638c1):
- h is, in each module, the mean over the row's tokens of that module's input (of a row to complete, over its prompt)
  in the mixed model, so that each module has an a of its own. There, h is the last hidden state of the last token with
  the local LoRA alone, in a forward pass before the one that is used, and all modules share one a. A negative mean of
  cosines counts as 0 here.
- h_s are of S rows drawn once a round, in the mixture with b; there, drawn anew for every row that is evaluated.
- The local LoRA trains in the first round too, beside a global one without effect; there, from the second on. It starts
  from the same A.
- The means are weighted by examples; in the published code they are not.
- There is a head: it trains with the side that it stays with. A personal one trains with the local LoRA and is frozen
  while the global one trains; a shared one the other way round. The published code generates text and has none.
- FedDPA-F, which starts the local LoRA from the final global one, is not offered.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from coterie.methods.base import Method, Onboarded
from coterie.methods.findings import AggregationError, Finding
from coterie.methods.parts import (
    Heads,
    Shapes,
    lora_of,
    mean_error,
    mean_heads,
    of_both,
    own_copy,
    router_of,
    settle,
    shapes_of,
    start_head,
    start_heads,
    start_lora,
    weights_of,
    with_head,
)
from coterie.methods.plan import MethodSettings
from coterie.ops.mean import mean, relative_error
from coterie.requests import BankProgram, ClientProgram, Observe, Observed, Program, Train
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    GateSpec,
    Instruction,
    Key,
    Part,
    Personal,
    Reply,
    Tensors,
)

GLOBAL, LOCAL = 0, 1  # the two experts of a client's bank


class FedDPASettings(MethodSettings):
    """FedDPA's settings; the defaults are the published code's."""

    local_weight: float = Field(0.5, gt=0, le=1, description="b: weight of the local LoRA while it trains")
    scale: float = Field(0.5, gt=0, le=1, description="largest weight of the local LoRA when both are used")
    instances: int = Field(5, ge=0, description="S: training rows that a row is compared with; 0: all")


@dataclass(frozen=True)
class FedDPAState:
    """The global A and B, the shared heads if there are any, and the error of the last averaging."""

    lora: Tensors
    heads: Heads
    error: float | None = None


@dataclass(frozen=True)
class FedDPA(Method[FedDPAState]):
    """The method; see the module's docstring."""

    settings: FedDPASettings

    name = "feddpa"
    title = "FedDPA"
    paper = "arXiv 2403.19211 (NeurIPS 2024)"
    summary = "a global LoRA and a local one, weighted for each row by its similarity to local data"
    Settings = FedDPASettings
    State = FedDPAState
    beyond_training = "train twice in a round, and measure what their rows look like"

    # server ----------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedDPAState:
        return FedDPAState(start_lora(base, self.plan, GLOBAL), start_heads(base, self.plan, clients))

    def configure(self, state: FedDPAState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return {c.id: Instruction({**state.lora, **state.heads.of(c.id)}) for c in clients}

    def expects(self, state: FedDPAState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(state.lora, state.heads.of(me.id))

    def aggregate(self, state: FedDPAState, replies: Mapping[ClientId, Reply], rnd: int) -> FedDPAState:
        weight = weights_of(replies)
        uploads = [lora_of(replies[c].tensors) for c in weight]
        return FedDPAState(
            lora=mean(uploads, list(weight.values())),
            heads=mean_heads(state.heads, replies, weight),
            error=relative_error(mean_error(uploads, list(weight.values()))),
        )

    def experts(self, state: FedDPAState) -> Mapping[str, Tensors]:
        return {"global": state.lora}

    def describe(self, state: FedDPAState) -> Sequence[Finding]:
        return [AggregationError(state.error)]

    # client ----------------------------------------------------------------------------------------------------------

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        return Personal({**start_lora(base, self.plan, LOCAL), **super().begin(base, me).tensors})

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        head_is = LOCAL if self.plan.head == "personal" else GLOBAL
        local = yield Train(
            self._mixture(ins, personal), self._keys(LOCAL, head_is, ins, personal), self.plan.optim, "local"
        )
        personal = replace(personal, tensors={**personal.tensors, **local.tensors})
        tensors = with_head(lora_of(ins.tensors), ins, personal)
        alone = Bank(tensors, scaling=self.plan.scaling, dropout=self.plan.dropout)
        trained = yield Train(alone, self._keys(GLOBAL, head_is, ins, personal), self.plan.optim)
        kept = yield from self._with_references(ins, personal)
        return settle(self.plan, of_both(local, trained), me, kept, travels=lora_of(trained.tensors))

    def after_training(self, ins: Instruction, me: ClientInfo, personal: Personal, trained: Bank) -> BankProgram:
        """The mixture, with the global LoRA as the client has trained it."""
        return self.choose(own_copy(ins, trained), me, personal)

    def onboard(self, welcome: Any, base: BaseSpec, me: ClientInfo) -> Program[Onboarded]:
        """The mixture with a local LoRA at its start, which trains with the head; the references are measured first."""
        own = self.begin(base, me)
        personal = replace(own, tensors={**start_head(base, self.plan, me), **own.tensors})
        kept = yield from self._with_references(welcome, personal)
        return Onboarded(self.bank(welcome, me, kept), frozenset(with_head(lora_of(own.tensors), welcome, personal)))

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        references, local = router_of(personal.tensors), lora_of(personal.tensors)
        if not references:  # the client has not trained yet
            references, local = {}, {}
        gate = GateSpec("similarity", {"scale": self.settings.scale}) if references else GateSpec()
        tensors = with_head({**lora_of(ins.tensors), **local, **references}, ins, personal)
        return Bank(tensors, gate, self.plan.scaling, self.plan.dropout)

    def _with_references(self, ins: Instruction, personal: Personal) -> Generator[Observe, Observed, Personal]:
        """``personal`` with the directions of S training rows in each module."""
        rows = yield Observe(self._mixture(ins, personal), "train", ("directions",), examples=self.settings.instances)
        references = {key._replace(part=Part.ROUTER): h.unsqueeze(0) for key, h in rows.directions.items()}
        return replace(personal, tensors={**personal.tensors, **references})

    def _mixture(self, ins: Instruction, personal: Personal) -> Bank:
        """Both LoRAs with the weights 1 - b and b: as scale s b, and the frozen B_g times (1 - b) / b."""
        b = self.settings.local_weight
        frozen = {k: v * ((1 - b) / b) if k.part is Part.B else v for k, v in lora_of(ins.tensors).items()}
        tensors = with_head({**frozen, **lora_of(personal.tensors)}, ins, personal)
        return Bank(tensors, scaling=self.plan.scaling * b, dropout=self.plan.dropout)

    def _keys(self, side: int, head_is: int, ins: Instruction, personal: Personal) -> frozenset[Key]:
        """What trains with a side: its LoRA, and the head if it stays there."""
        of = lora_of(personal.tensors if side == LOCAL else ins.tensors)
        return frozenset(with_head(of, ins, personal) if side == head_is else of)


METHOD = FedDPA
