"""FedEx-LoRA (arXiv 2410.09432, ACL 2025): A and B are averaged, and what that loses is added to the base.

A <- sum p_i A_i, B <- sum p_i B_i with p_i = n_i / sum n, and W_0 <- W_0 + s (sum p_i B_i A_i - B A) (section 4 of the
paper): the next round starts from the exact mean of the products.

Here the base stays as it is: what would be added to it is the folded expert R, which nobody trains and which sees no
dropout. As sum p_i B_i A_i - B A = sum p_i (B_i - B)(A_i - A), R grows by r ranks for each client of a round, up to
min(d_out, d_in). So checkpoints, bundles, exported adapters and sites hold the whole result.

Differs from the paper: clients weigh by their rows, not alike. The server sends all of R, and not the last round's part
alone, so that a client that missed rounds has it too. ``folded_rank`` bounds it by SVD, at the price of exactness.
Differs from the published code (commit 683a3f3): it adds the residual's transpose to the weight, which fits GPT-2's
Conv1D; for Linear layers, as in RoBERTa, that is not the residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.methods.base import Method
from coterie.methods.findings import AggregationError, Finding, Values
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
from coterie.methods.products import FoldingSettings, as_lora, folded, largest_rank, products_of, summed
from coterie.ops.lowrank import stacked
from coterie.ops.mean import mean, relative_error
from coterie.requests import ClientProgram, Train
from coterie.types import (
    FOLDED,
    BaseSpec,
    ClientId,
    ClientInfo,
    Instruction,
    Personal,
    Reply,
    Tensors,
)


@dataclass(frozen=True)
class FedExLoRAState:
    """The mean A and B; R, the expert that stands for what was added to the base; the shared heads if there are any.

    ``error`` is what averaging A and B separately would have lost in the last round: what R gained.
    """

    lora: Tensors
    folded: Tensors
    heads: Heads
    error: float = 0.0


@dataclass(frozen=True)
class FedExLoRA(Method[FedExLoRAState]):
    """A <- sum p_i A_i, B <- sum p_i B_i, R <- R + sum p_i (B_i - B)(A_i - A)."""

    settings: FoldingSettings

    name = "fedex_lora"
    title = "FedEx-LoRA"
    paper = "arXiv 2410.09432 (ACL 2025)"
    summary = "averages A and B, and folds the residual mean(BA) - mean(B) mean(A) into the base"
    no_rules = "it folds what averaging A and B apart loses into the base, which a rule would leave at 0"
    Settings = FoldingSettings
    State = FedExLoRAState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedExLoRAState:
        return FedExLoRAState(start_lora(base, self.plan), {}, start_heads(base, self.plan, clients))

    def configure(
        self, state: FedExLoRAState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        return {c.id: Instruction({**state.lora, **state.folded, **state.heads.of(c.id)}) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        trained = yield Train(bank, frozenset(k for k in bank.tensors if k.expert != FOLDED), self.plan.optim)
        return settle(self.plan, trained, me, personal, travels=lora_of(trained.tensors))

    def expects(self, state: FedExLoRAState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(state.lora, state.heads.of(me.id))

    def aggregate(self, state: FedExLoRAState, replies: Mapping[ClientId, Reply], rnd: int) -> FedExLoRAState:
        weight = weights_of(replies)
        loras, share = [lora_of(replies[c].tensors) for c in weight], list(weight.values())
        lora = mean(loras, share)
        apart = [{key: value - lora[key] for key, value in upload.items()} for upload in loras]
        residual = summed(apart, [w / sum(share) for w in share])
        return FedExLoRAState(
            lora=lora,
            folded=folded(state.folded, residual, self.settings.folded_rank),
            heads=mean_heads(state.heads, replies, weight),
            error=relative_error(mean_error(loras, share)),
        )

    def experts(self, state: FedExLoRAState) -> Mapping[str, Tensors]:
        lora, old = products_of(state.lora), products_of(state.folded)
        whole = (
            {module: stacked([product, old[module]], [1.0, 1.0]) for module, product in lora.items()} if old else lora
        )
        return {"global": as_lora(whole)}

    def describe(self, state: FedExLoRAState) -> Sequence[Finding]:
        return [AggregationError(state.error), Values({"folded_rank": largest_rank(state.folded)})]


METHOD = FedExLoRA
