"""FlexLoRA (arXiv 2402.11505, NeurIPS 2024): clients of different ranks; the server averages their products.

1. Client i of rank r_i trains A_i [r_i, d_in], B_i [d_out, r_i] with the scale s_i = alpha / r_i.
2. Server: W = sum p_i s_i B_i A_i with p_i = n_i / sum n, and its singular value decomposition W = U S V^T.
3. To a client of rank r: B = U_r S_r / s, A = V_r^T, the nearest matrix of rank r to W (section 3 of the paper).

W is never formed: the decomposition comes from QR of the stacked factors (:mod:`coterie.ops.lowrank`), and the server
keeps its leading part, as many ranks as the largest client has. The aggregation error is 0, because A and B are never
averaged separately; all that a round loses is the cut (``cut_error``). What FedIT would have lost on the same replies
is not reported: beside the other methods' errors it would read as FlexLoRA's.

Differs from the published code (branch FlexLoRA of alibaba/FederatedScope, commit 1cb1ab7): it forms the full W and its
full decomposition, and fixes alpha = 16. Its clients draw different A at the start; here they have the first rows of
one A. It halves the learning rate after 15 rounds, which is a setting of ``[train]`` here.
Ours: where a round's clients have fewer ranks in all than the largest client, the missing rows of V^T are the previous
A's directions with B = 0, so that they can learn.
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
    mean_heads,
    settle,
    shapes_of,
    start_heads,
    start_lora,
    weights_of,
    with_head,
)
from coterie.methods.products import as_lora, summed, total_norm
from coterie.methods.ranks import Ranks, at_client, on_server, rank_of, start_ranks
from coterie.ops.lowrank import Product, stacked, truncated
from coterie.requests import ClientProgram, Train
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    Instruction,
    Personal,
    Reply,
    Tensors,
)


@dataclass(frozen=True)
class FlexLoRAState:
    """The leading part of W as B = U S / s and A = V^T, the clients' ranks, the shared heads if there are any.

    ``cut`` is ||W - s B A|| / ||W||, what keeping the leading part alone lost in the last round.
    """

    lora: Tensors
    ranks: Ranks
    heads: Heads
    cut: float = 0.0


@dataclass(frozen=True)
class FlexLoRA(Method[FlexLoRAState]):
    """W = sum p_i s_i B_i A_i, cut by SVD to each client's rank."""

    name = "flexlora"
    title = "FlexLoRA"
    paper = "arXiv 2402.11505 (NeurIPS 2024)"
    summary = "averages the products B A and cuts them by SVD to each client's rank"
    no_rules = "it averages products of clients with different ranks"
    mixed_ranks = True
    State = FlexLoRAState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FlexLoRAState:
        ranks = start_ranks(self.plan, clients)
        lora = start_lora(base, replace(self.plan, rank=ranks.largest))
        return FlexLoRAState(lora, ranks, start_heads(base, self.plan, clients))

    def configure(
        self, state: FlexLoRAState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        return {c.id: Instruction({**self._lora(state, c.id), **state.heads.of(c.id)}) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim)
        return settle(self.plan, trained, me, personal, travels=lora_of(bank.tensors))

    def expects(self, state: FlexLoRAState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(self._lora(state, me.id), state.heads.of(me.id))

    def aggregate(self, state: FlexLoRAState, replies: Mapping[ClientId, Reply], rnd: int) -> FlexLoRAState:
        weight = weights_of(replies)
        loras: list[Tensors] = [on_server(lora_of(replies[c].tensors), self.plan) for c in weight]
        share = [w / sum(weight.values()) for w in weight.values()]
        if sum(map(rank_of, loras)) < state.ranks.largest:
            loras, share = [*loras, state.lora], [*share, 0.0]
        whole = summed(loras, share)
        kept = {module: truncated(product, state.ranks.largest) for module, product in whole.items()}
        return FlexLoRAState(as_lora(kept), state.ranks, mean_heads(state.heads, replies, weight), _lost(whole, kept))

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        lora = lora_of(ins.tensors)
        scaling = self.plan.alpha / rank_of(lora)
        return Bank(with_head(lora, ins, personal), scaling=scaling, dropout=self.plan.dropout)

    def experts(self, state: FlexLoRAState) -> Mapping[str, Tensors]:
        return {"global": state.lora}

    def describe(self, state: FlexLoRAState) -> Sequence[Finding]:
        return [AggregationError(0.0), Values({"cut_error": state.cut})]

    def _lora(self, state: FlexLoRAState, client: ClientId) -> Tensors:
        """What ``client`` is sent: the leading ranks, as many as it has."""
        return at_client(state.lora, self.plan, state.ranks.of(client))


def _lost(whole: Mapping[str, Product], kept: Mapping[str, Product]) -> float:
    """||whole - kept|| / ||whole||."""
    norm = total_norm(whole)
    return (
        total_norm({m: stacked([product, kept[m]], [1.0, -1.0]) for m, product in whole.items()}) / norm
        if norm
        else 0.0
    )


METHOD = FlexLoRA
