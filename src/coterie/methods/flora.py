"""FLoRA (arXiv 2409.05976, NeurIPS 2024): the clients' LoRAs are stacked, so their sum is exact, and go into the base.

1. Each round every client trains a fresh LoRA of its own rank r_i, A random and B = 0, on the model so far.
2. Server: A = [p_1 A_1; p_2 A_2; ...] and B = [B_1, B_2, ...], so that B A = sum p_i B_i A_i without an error
   (section 3 of the paper), p_i = n_i / sum n, each product on its own scale s_i = alpha / r_i.
3. The product is added to the base, and the next round starts from there.

Here the base stays as it is: what would be added to it is the folded expert R, which nobody trains and which sees no
dropout. R <- R + sum p_i s_i B_i A_i, kept as factors of at most min(d_out, d_in) ranks. So checkpoints, bundles,
exported adapters and sites hold the whole result.

Differs from the paper: the server sends all of R, which grows by sum r_i ranks a round, and not the last round's stack
alone, so that a client that missed rounds has it too. ``folded_rank`` bounds it, at the price of exactness.
Differs from the published code (commit 7bea158): the fresh A is the same for all clients of a round, from the run's
seed; there each client draws its own. Where ranks differ, it fixes alpha = 2 r_i for every client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.methods.base import Method
from coterie.methods.findings import AggregationError, Finding, Values
from coterie.methods.parts import (
    Heads,
    Shapes,
    lora_of,
    lora_shapes,
    mean_heads,
    settle,
    shapes_of,
    start_heads,
    start_lora,
    weights_of,
)
from coterie.methods.products import FoldingSettings, folded, largest_rank, summed
from coterie.methods.ranks import Ranks, on_server, rank_of, rescaled, start_ranks
from coterie.requests import ClientProgram, Train
from coterie.types import (
    FOLDED,
    BaseSpec,
    ClientId,
    ClientInfo,
    Instruction,
    Personal,
    Reply,
    Target,
    Tensors,
)


@dataclass(frozen=True)
class FLoRAState:
    """R, the expert that stands for what was added to the base; empty before the first round."""

    base: BaseSpec
    ranks: Ranks
    heads: Heads
    folded: Tensors


@dataclass(frozen=True)
class FLoRA(Method[FLoRAState]):
    """R <- R + sum p_i s_i B_i A_i; every round starts from a fresh LoRA."""

    settings: FoldingSettings

    name = "flora"
    title = "FLoRA"
    paper = "arXiv 2409.05976 (NeurIPS 2024)"
    summary = "stacks all clients' A and B, an exact sum, and folds it into the base each round"
    no_rules = "it stacks the clients' A and B instead of averaging them"
    mixed_ranks = True
    Settings = FoldingSettings
    State = FLoRAState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FLoRAState:
        start_lora(base, self.plan)  # raises for a base without targets
        return FLoRAState(base, start_ranks(self.plan, clients), start_heads(base, self.plan, clients), {})

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        sizes = {t.name: [t.d_in, t.d_out] for t in base.targets}
        return replace(super().begin(base, me), info={"sizes": sizes})

    def configure(self, state: FLoRAState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        sent = {c.id: {**state.folded, **state.heads.of(c.id)} for c in clients}
        return {c: Instruction(tensors, {"round": rnd, "rank": state.ranks.of(c)}) for c, tensors in sent.items()}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        model, fresh = self.bank(ins, me, personal), self._fresh(ins, personal)
        scaling = self.plan.alpha / rank_of(fresh)
        bank = replace(model, tensors={**rescaled(model.tensors, model.scaling / scaling), **fresh}, scaling=scaling)
        trained = yield Train(bank, frozenset(k for k in bank.tensors if k.expert != FOLDED), self.plan.optim)
        return settle(self.plan, trained, me, personal, travels=fresh)

    def expects(self, state: FLoRAState, me: ClientInfo, rnd: int) -> Shapes:
        lora = lora_shapes(state.base, replace(self.plan, rank=state.ranks.of(me.id)))
        return lora | shapes_of(state.heads.of(me.id))

    def started_from(
        self, base: BaseSpec, state: FLoRAState, me: ClientInfo, ins: Instruction, reply: Reply
    ) -> Tensors:
        return {**ins.tensors, **self._fresh(ins, self.begin(base, me))}

    def aggregate(self, state: FLoRAState, replies: Mapping[ClientId, Reply], rnd: int) -> FLoRAState:
        weight = weights_of(replies)
        loras = [on_server(lora_of(replies[c].tensors), self.plan) for c in weight]
        stack = summed(loras, [w / sum(weight.values()) for w in weight.values()])
        return replace(
            state,
            folded=folded(state.folded, stack, self.settings.folded_rank),
            heads=mean_heads(state.heads, replies, weight),
        )

    def experts(self, state: FLoRAState) -> Mapping[str, Tensors]:
        return {"global": lora_of(state.folded, FOLDED, new=0)} if state.folded else {}

    def describe(self, state: FLoRAState) -> Sequence[Finding]:
        exact = AggregationError(0.0)  # it stacks A and B; what ``folded_rank`` cuts off is no error of averaging
        return [exact, Values({"folded_rank": largest_rank(state.folded)})]

    def _fresh(self, ins: Instruction, personal: Personal) -> Tensors:
        """The LoRA that the round starts from: the same for all clients of the round with this rank."""
        base = BaseSpec(tuple(Target(name, d_in, d_out) for name, (d_in, d_out) in personal.info["sizes"].items()))
        rnd, plan = int(ins.info["round"]), replace(self.plan, rank=int(ins.info["rank"]))
        return start_lora(base, plan, 0, *([rnd] if rnd > 1 else []))  # in round 1 from the A of all other methods


METHOD = FLoRA
