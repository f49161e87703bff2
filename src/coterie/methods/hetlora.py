"""HetLoRA (arXiv 2401.06432, EMNLP 2024): clients of different ranks; A and B are zero-padded, and weigh by their norm.

1. Distribution by truncation: a client of rank r gets the first r ranks of the global A and B.
2. Rank self-pruning: with the last ranks, those from gamma r on, the client's loss is
   task + lambda sum over modules of ||B_last|| ||A_last||. If that sum is smaller after training than before it, the
   client keeps only its first gamma r ranks from then on (``prune`` is gamma, ``penalty`` is lambda).
3. Sparsity-weighted aggregation: A and B are padded with zeros to the largest rank and averaged with weights
   ||s_i B_i A_i|| / sum_j ||s_j B_j A_j||, Frobenius norms over all modules.

Differs from the paper: it has no scale alpha / r; here clients of different ranks have different scales, and what is
padded, averaged and truncated is on one scale. Whether a client prunes depends only on what it was sent and what it
sends, so the server decides it, with the same result. Ranks that no client of a round has keep their values; padding
would set them to zero. Of three clients or more none weighs more than half. Heads, which the paper does not have,
weigh by rows.
No code of the authors was at hand: the defaults gamma = 0.99 and lambda = 0.01 are not verified. FlexLoRA's published
code has a ``heterolora.py`` that pads, weighs by rows and does not prune: ``weighting = "examples"`` and ``prune = 1``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

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
    with_head,
)
from coterie.methods.plan import MethodSettings
from coterie.methods.products import products_of, total_norm
from coterie.methods.ranks import Ranks, at_client, first_ranks, on_server, padded_to, rank_of, start_ranks
from coterie.ops.mean import mean, relative_error, share_limit
from coterie.requests import ClientProgram, LastRanks, Train
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    Instruction,
    Key,
    Part,
    Personal,
    Reply,
    Tensors,
)

_LARGEST_SHARE = 0.5  # of a mean, for one client of three or more, however large its product is


class HetLoRASettings(MethodSettings):
    """HetLoRA's settings."""

    prune: float = Field(
        0.99, gt=0, le=1, description="share of its ranks that a client keeps if its last ranks shrink; 1: no pruning"
    )
    penalty: float = Field(0.01, ge=0, description="weight of the last ranks' norm in the loss, where ranks are pruned")
    weighting: Literal["norm", "examples"] = Field(
        "norm", description="clients weigh by the norm of their product B A, or by their training rows"
    )


@dataclass(frozen=True)
class HetLoRAState:
    """The global A and B of the largest rank, each client's rank now, the shared heads, the last averaging's error."""

    lora: Tensors
    ranks: Ranks
    heads: Heads
    error: float = 0.0


@dataclass(frozen=True)
class HetLoRA(Method[HetLoRAState]):
    """A <- sum w_i pad(A_i), B <- sum w_i pad(B_i), w_i ~ ||s_i B_i A_i||; a client of rank r has the first r ranks."""

    settings: HetLoRASettings

    name = "hetlora"
    title = "HetLoRA"
    paper = "arXiv 2401.06432 (EMNLP 2024)"
    summary = "pads A and B to the largest rank, weighs clients by norm, truncates, prunes ranks"
    no_rules = "its clients have different ranks, and it weighs them by their norms"
    mixed_ranks = True
    Settings = HetLoRASettings
    State = HetLoRAState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> HetLoRAState:
        ranks = start_ranks(self.plan, clients)
        lora = start_lora(base, replace(self.plan, rank=ranks.largest))
        return HetLoRAState(lora, ranks, start_heads(base, self.plan, clients))

    def configure(self, state: HetLoRAState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return {c.id: Instruction({**self._lora(state, c.id), **state.heads.of(c.id)}) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank, kept = self.bank(ins, me, personal), self._kept(rank_of(ins.tensors))
        last = LastRanks(self.settings.penalty, kept) if kept < rank_of(ins.tensors) else None
        trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim, last_ranks=last)
        return settle(self.plan, trained, me, personal, travels=lora_of(bank.tensors))

    def expects(self, state: HetLoRAState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(self._lora(state, me.id), state.heads.of(me.id))

    def aggregate(self, state: HetLoRAState, replies: Mapping[ClientId, Reply], rnd: int) -> HetLoRAState:
        loras = {c: self._pruned(state, c, lora_of(replies[c].tensors)) for c in sorted(replies)}
        by_client = {**state.ranks.by_client, **{c: rank_of(lora) for c, lora in loras.items()}}
        largest = max(by_client.values())
        ranks = Ranks(by_client, min(state.ranks.later, largest))
        weight, rank = self._weights(loras, replies), max(map(rank_of, loras.values()))
        padded = [padded_to(lora, rank) for lora in loras.values()]
        return HetLoRAState(
            lora=first_ranks(_above(mean(padded, weight), state.lora, rank), largest),
            ranks=ranks,
            heads=mean_heads(state.heads, replies, weights_of(replies)),
            error=relative_error(mean_error(padded, weight)),
        )

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        lora = lora_of(ins.tensors)
        scaling = self.plan.alpha / rank_of(lora)
        return Bank(with_head(lora, ins, personal), scaling=scaling, dropout=self.plan.dropout)

    def experts(self, state: HetLoRAState) -> Mapping[str, Tensors]:
        return {"global": state.lora}

    def describe(self, state: HetLoRAState) -> Sequence[Finding]:
        return [AggregationError(state.error), Values({"ranks": dict(state.ranks.by_client)})]

    def _lora(self, state: HetLoRAState, client: ClientId) -> Tensors:
        """What ``client`` is sent: the first of the global ranks, as many as it has."""
        return at_client(state.lora, self.plan, state.ranks.of(client))

    def _kept(self, rank: int) -> int:
        """How many of ``rank`` ranks remain after pruning."""
        return max(1, int(self.settings.prune * rank))

    def _pruned(self, state: HetLoRAState, client: ClientId, lora: Tensors) -> Tensors:
        """What ``client`` sent, on the server's scale, without its last ranks if these shrank in training."""
        kept, whole = self._kept(rank_of(lora)), on_server(lora, self.plan)
        shrank = _last_norm(lora, kept) < _last_norm(self._lora(state, client), kept)
        return first_ranks(whole, kept) if shrank else whole

    def _weights(self, loras: Mapping[ClientId, Tensors], replies: Mapping[ClientId, Reply]) -> list[float]:
        """A weight for each of ``loras``; all alike where every one would be zero."""
        if self.settings.weighting == "examples":
            return list(weights_of(replies).values())
        norms = [total_norm(products_of(lora)) for lora in loras.values()]
        limit = share_limit(norms, _LARGEST_SHARE) if len(norms) > 2 else math.inf
        weights = [min(norm, limit) for norm in norms]
        return weights if any(weights) else [1.0] * len(norms)


def _last_norm(lora: Tensors, kept: int) -> float:
    """sum over modules of ||B_last|| ||A_last||, the ranks from ``kept`` on; 0 if there are none."""
    pairs = products_of(lora).values()
    return sum(float(b[:, kept:].double().norm() * a[kept:].double().norm()) for b, a in pairs)


def _above(lora: Tensors, before: Tensors, rank: int) -> dict[Key, Tensor]:
    """``lora`` of ``rank``, and above it the further ranks of ``before``."""
    side = {Part.A: 0, Part.B: 1}
    above = {key: value.tensor_split([rank], side[key.part])[1] for key, value in before.items()}
    return {key: torch.cat([value, above[key]], side[key.part]) for key, value in lora.items()}


METHOD = HetLoRA
