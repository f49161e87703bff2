"""FDLoRA (arXiv 2406.07925): a personal and a global LoRA on every client, fused by two weights that it searches for.

1. Every client trains its personal LoRA (A_p, B_p) alone. The global one starts as their mean.
2. Rounds: a client trains the global LoRA (A_s, B_s) from where the server has it, and sends it. The server moves along
   the mean change, with Nesterov's momentum:
   d = mean_i(theta_i) - theta,   v <- mu v + d,   theta <- theta + eta (d + mu v)
   Every ``sync`` rounds a client's personal LoRA becomes the global one as it has just trained it.
3. To use both: A = w_1 A_p + w_2 A_s and B = w_1 B_p + w_2 B_s, with the w_1 and w_2 of the least loss on a few
   training rows plus penalty * (|w_1| + |w_2|), found without gradients.

No code is published, and the paper's text was not at hand: stages and figures are as two implementations by others
describe them. Differs from these: eta = 1 and mu = 0 are our defaults, which is averaging (they have 0.001 and 0.5,
with which the global LoRA hardly moves); the weights are found by a compass search (there, Nelder-Mead or a library's),
and before every evaluation (there, at the end). Each side has a head; the two are fused with the same weights, and the
global side's is averaged if heads are shared. A client that missed stage 1 trains its personal LoRA in the first round
that it takes part in.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import Field

from coterie.methods.base import Method, returning
from coterie.methods.findings import AggregationError, Finding
from coterie.methods.parts import (
    Heads,
    Shapes,
    head_of,
    lora_of,
    lora_shapes,
    mean_error,
    mean_heads,
    numbered_head,
    of_both,
    one_head,
    own_copy,
    shapes_of,
    start_head,
    start_heads,
    start_lora,
    statistics,
    weights_of,
)
from coterie.methods.plan import MethodSettings
from coterie.methods.releases import Release, head_release
from coterie.ops.mean import mean, relative_error
from coterie.requests import BankProgram, ClientProgram, Score, Scored, Train
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientResult,
    Instruction,
    Personal,
    Reply,
    Tensors,
)

PERSONAL, GLOBAL = 0, 1  # the two sides' numbers in what a client keeps
Weights = tuple[float, float]
START, STEP = (0.5, 0.5), 0.25


class FDLoRASettings(MethodSettings):
    """FDLoRA's settings."""

    sync: int = Field(
        10, ge=0, description="the trained global LoRA replaces the personal one every this many rounds; 0: never"
    )
    outer_rate: float = Field(1.0, gt=0, description="eta: the server's step along the mean change; 1: averaging")
    outer_momentum: float = Field(0.0, ge=0, lt=1, description="mu: the server's momentum (Nesterov)")
    examples: int = Field(32, ge=0, description="training rows that the fusion weights are searched on; 0: all")
    search_steps: int = Field(5, ge=0, description="steps of that search; 0: both weights are 0.5")
    penalty: float = Field(0.05, ge=0, description="what each unit of a weight adds to the loss in that search")


@dataclass(frozen=True)
class FDLoRAState:
    """The global LoRA, empty before stage 1 is over, its momentum, and the shared heads if there are any."""

    base: BaseSpec
    lora: Tensors = field(default_factory=dict)
    momentum: Tensors = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    error: float | None = None


@dataclass(frozen=True)
class FDLoRA(Method[FDLoRAState]):
    """The method; see the module's docstring."""

    settings: FDLoRASettings

    name = "fdlora"
    title = "FDLoRA"
    paper = "arXiv 2406.07925"
    summary = "a personal and a global LoRA, fused by two weights that each client searches for"
    Settings = FDLoRASettings
    State = FDLoRAState
    beyond_training = "train twice in some rounds"

    # server ----------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FDLoRAState:
        start_lora(base, self.plan)  # refuses a base without targets
        return FDLoRAState(base, heads=start_heads(base, self.plan, clients))

    def configure(self, state: FDLoRAState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        due = bool(self.settings.sync) and rnd % self.settings.sync == 0
        return {c.id: Instruction({**state.lora, **state.heads.of(c.id)}, {"sync": due}) for c in clients}

    def releases(self) -> Sequence[Release]:
        return (Release("A and B; in round 1 of its personal LoRA"), *head_release(self.plan.head == "shared"))

    def expects(self, state: FDLoRAState, me: ClientInfo, rnd: int) -> Shapes:
        return lora_shapes(state.base, self.plan) | shapes_of(state.heads.of(me.id))

    def aggregate(self, state: FDLoRAState, replies: Mapping[ClientId, Reply], rnd: int) -> FDLoRAState:
        weight = weights_of(replies, "uniform")
        uploads = [lora_of(replies[c].tensors) for c in weight]
        average = mean(uploads, list(weight.values()))
        lora, momentum = self._outer_step(state, average) if state.lora else (average, {})
        return replace(
            state,
            lora=lora,
            momentum=momentum,
            heads=mean_heads(state.heads, replies, weight),
            error=relative_error(mean_error(uploads, list(weight.values()))),
        )

    def experts(self, state: FDLoRAState) -> Mapping[str, Tensors]:
        return {"global": state.lora} if state.lora else {}

    def describe(self, state: FDLoRAState) -> Sequence[Finding]:
        return [AggregationError(state.error)]

    def _outer_step(self, state: FDLoRAState, average: Tensors) -> tuple[Tensors, Tensors]:
        """The global LoRA after the server's step, and its momentum."""
        rate, mu = self.settings.outer_rate, self.settings.outer_momentum
        change = {key: average[key] - value for key, value in state.lora.items()}
        momentum = {key: mu * state.momentum[key] + d if state.momentum else d for key, d in change.items()}
        lora = {key: value + rate * (change[key] + mu * momentum[key]) for key, value in state.lora.items()}
        return lora, momentum

    @property
    def weighting(self) -> Literal["uniform"]:
        return "uniform"

    # client ----------------------------------------------------------------------------------------------------------

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        """The personal side at its start: LoRA and head."""
        return Personal(
            {**start_lora(base, self.plan, PERSONAL), **numbered_head(start_head(base, self.plan, me), PERSONAL)}
        )

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        received, sides, before = lora_of(ins.tensors), dict(personal.tensors), None
        if "trained" not in personal.info:  # stage 1
            bank = self._bank(_side(sides, PERSONAL))
            trained = before = yield Train(
                bank, frozenset(bank.tensors), self.plan.optim, "personal" if received else "train"
            )
            sides |= _numbered(trained.tensors, PERSONAL)
            if not received and self.plan.head == "personal":
                sides |= numbered_head(trained.tensors, GLOBAL)
        if received:
            bank = self._bank(self._global(ins, sides))
            trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim)
            if self.plan.head == "personal":
                sides |= numbered_head(trained.tensors, GLOBAL)
            if ins.info["sync"]:
                sides |= _numbered(trained.tensors, PERSONAL)
        head = head_of(trained.tensors) if self.plan.head == "shared" else {}
        done = of_both(before, trained) if before and received else trained
        reply = Reply({**lora_of(trained.tensors), **head}, me.num_train, statistics(done))
        info = {"trained": True, "global": bool(received)}
        return ClientResult(reply, replace(personal, tensors=sides, info=info))

    def after_training(self, ins: Instruction, me: ClientInfo, personal: Personal, trained: Bank) -> BankProgram:
        """Both sides, with the global one as the client has trained it; after stage 1 the personal side alone."""
        if not personal.info.get("global", True):
            return returning(trained)
        return self.choose(own_copy(ins, trained), me, personal)

    def choose(self, ins: Instruction, me: ClientInfo, personal: Personal) -> BankProgram:
        if not lora_of(ins.tensors) or "trained" not in personal.info:
            return self.bank(ins, me, personal)
        weights = yield from self._search(ins, personal)
        return self._fused(ins, personal, weights)

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        """Both sides with the weights that the search starts from; one side where the other is not there yet."""
        if not lora_of(ins.tensors):
            return self._bank(_side(personal.tensors, PERSONAL))
        return self._fused(ins, personal, START if "trained" in personal.info else (0.0, 1.0))

    def _bank(self, tensors: Tensors) -> Bank:
        return Bank(tensors, scaling=self.plan.scaling, dropout=self.plan.dropout)

    def _global(self, ins: Instruction, kept: Tensors) -> Tensors:
        """The global side: the LoRA that was received and its head, at first the personal side's."""
        head = head_of(ins.tensors) or head_of(_side(kept, GLOBAL)) or head_of(_side(kept, PERSONAL))
        return {**lora_of(ins.tensors), **head}

    def _fused(self, ins: Instruction, personal: Personal, weights: Weights) -> Bank:
        """w_1 times the personal side plus w_2 times the global one, tensor by tensor."""
        own, shared = _side(personal.tensors, PERSONAL), self._global(ins, personal.tensors)
        return self._bank({key: weights[0] * own[key] + weights[1] * shared[key] for key in shared})

    def _search(self, ins: Instruction, personal: Personal) -> Generator[Score, list[Scored], Weights]:
        """The weights of the least penalised loss: a step goes to the best of four neighbours, or halves its size."""
        at, step, least = START, STEP, None
        for number in range(self.settings.search_steps):
            around = [(at[0] + dx * step, at[1] + dy * step) for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))]
            tried = around if number else [at, *around]
            scores = yield Score([self._fused(ins, personal, w) for w in tried], "train", self.settings.examples)
            costs = [
                scored.loss + self.settings.penalty * (abs(w[0]) + abs(w[1]))
                for scored, w in zip(scores, tried, strict=True)
            ]
            if least is None:
                least, costs, tried = costs[0], costs[1:], tried[1:]
            best = min(range(len(costs)), key=costs.__getitem__)
            if costs[best] < least:
                at, least = tried[best], costs[best]
            else:
                step /= 2
        return at


def _side(tensors: Tensors, number: int) -> Tensors:
    """One side of what a client keeps: its LoRA as expert 0, its head as the head."""
    return {**lora_of(tensors, number, new=0), **head_of(one_head(tensors, number))}


def _numbered(tensors: Tensors, number: int) -> Tensors:
    """A side as a client keeps it."""
    return {**lora_of(tensors, 0, new=number), **numbered_head(tensors, number)}


METHOD = FDLoRA
