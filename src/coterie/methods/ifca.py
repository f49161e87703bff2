"""IFCA (arXiv 2006.04088, NeurIPS 2020): K LoRAs; each client takes the one that fits its rows best, and trains it.

    k_i = argmin_k loss_i(A_k, B_k),   A_k <- sum p_i A_i,  B_k <- sum p_i B_i  over the clients with k_i = k,

p_i = n_i / sum n within the cluster (Algorithm 1, option II: model averaging). All K LoRAs go to everyone, a client
sends back one and says which. It chooses again before every evaluation, by the loss on its training rows.

Differs from the paper: there, K models start at random, and their losses tell them apart at once; LoRAs start with
B = 0 and have one loss. A tie is drawn by the run's seed and the client, so the first clusters are random. Each LoRA
has an A of its own. A client compares the LoRAs through its head: a shared one belongs to a cluster and a label space,
and each LoRA is compared with its own; a personal one was trained with the LoRA that the client had, and favours it.
The authors' code (jichan3751/ifca, 97db9d1) averages without weights, its clients being of one size, and chooses a
test client's model by the loss on its test labels; here test rows choose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from pydantic import Field

from coterie.methods.base import Method
from coterie.methods.findings import AggregationError, Clusters, Finding, Notes
from coterie.methods.parts import (
    Heads,
    Shapes,
    head_of,
    lora_of,
    lora_shapes,
    mean_error,
    mean_heads,
    numbered_head,
    one_head,
    settle,
    shapes_of,
    start_heads,
    start_lora,
    weights_of,
    with_head,
)
from coterie.methods.plan import MethodSettings
from coterie.methods.releases import SERVER, Release, head_release
from coterie.methods.robust import Group, grouped
from coterie.ops.mean import mean, relative_error
from coterie.ops.streams import stream
from coterie.requests import BankProgram, ClientProgram, Score, Scored, Train
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, Instruction, Personal, Range, Reply, Tensors

NOTE = (
    "ifca compares its LoRAs through each client's personal head, which favours the one that it was trained with: the "
    'clusters may stay as they were drawn. Set [task] head = "shared"'
)


class IFCASettings(MethodSettings):
    """IFCA's settings."""

    clusters: int = Field(4, ge=1, description="K: LoRAs; each client trains the one with the lowest loss")
    examples: int = Field(0, ge=0, description="training rows that a client compares them on; 0: all")


@dataclass(frozen=True)
class IFCAState:
    """The K LoRAs (experts 0..K-1), which one each client took last, and the shared heads by LoRA and label space."""

    base: BaseSpec
    loras: Tensors
    members: Mapping[ClientId, int] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    error: float | None = None


@dataclass(frozen=True)
class IFCA(Method[IFCAState]):
    """The method; see the module's docstring."""

    settings: IFCASettings

    name = "ifca"
    title = "IFCA"
    paper = "arXiv 2006.04088 (NeurIPS 2020)"
    summary = "K LoRAs; each client trains the one that fits its rows best, averaged in clusters"
    Settings = IFCASettings
    State = IFCAState
    beyond_training = "choose a cluster by the losses of their rows"

    # server ----------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> IFCAState:
        loras: Tensors = {}
        for k in self._all:
            apart = ("cluster", k) if k else ()  # the first A is that of the other methods
            loras = {**loras, **start_lora(base, self.plan, k, *apart)}
        by_space = start_heads(base, self.plan, clients)
        values = {_named(k, space): head for space, head in by_space.values.items() for k in self._all}
        return IFCAState(base, loras, heads=Heads(values, by_space.group))

    def configure(self, state: IFCAState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return {c.id: Instruction({**state.loras, **self._heads_for(state, c.id)}) for c in clients}

    def expects(self, state: IFCAState, me: ClientInfo, rnd: int) -> Shapes:
        return lora_shapes(state.base, self.plan) | shapes_of(one_head(self._heads_for(state, me.id), 0))

    def expects_info(self, state: IFCAState, me: ClientInfo, rnd: int) -> Mapping[str, Range]:
        return {"cluster": Range(high=self.settings.clusters - 1, whole=True)}

    def started_from(self, base: BaseSpec, state: IFCAState, me: ClientInfo, ins: Instruction, reply: Reply) -> Tensors:
        k = int(reply.info["cluster"])
        return {**lora_of(ins.tensors, k, new=0), **one_head(head_of(ins.tensors), k)}

    def releases(self) -> Sequence[Release]:
        why, other = "it averages by the LoRA that each client took", '[method] name = "fedit"'
        taken = Release("the number of its LoRA", "info", "each", SERVER, names=("cluster",), why=why, instead=other)
        lora = Release("A and B of the LoRA that it took")
        return (lora, taken, *head_release(self.plan.head == "shared"))

    def groups(
        self, state: IFCAState, replies: Mapping[ClientId, Reply], spaces: Mapping[ClientId, str]
    ) -> Sequence[Group]:
        return grouped(replies, {c: str(int(replies[c].info["cluster"])) for c in replies}, spaces)

    def aggregate(self, state: IFCAState, replies: Mapping[ClientId, Reply], rnd: int) -> IFCAState:
        weight, took = weights_of(replies), {c: int(replies[c].info["cluster"]) for c in sorted(replies)}
        loras, errors = dict(state.loras), []
        for k in sorted({*took.values()}):
            members = [c for c in took if took[c] == k]
            uploads, weights = [lora_of(replies[c].tensors) for c in members], [weight[c] for c in members]
            loras |= lora_of(mean(uploads, weights), 0, new=k)
            errors += mean_error(uploads, weights)
        in_cluster = {c: _named(took[c], state.heads.group[c]) for c in took if c in state.heads.group}
        heads = mean_heads(Heads(state.heads.values, in_cluster), replies, weight)
        return replace(
            state,
            loras=loras,
            members={**state.members, **took},
            heads=replace(state.heads, values=heads.values),
            error=relative_error(errors),
        )

    def experts(self, state: IFCAState) -> Mapping[str, Tensors]:
        return {f"expert-{k}": lora_of(state.loras, k, new=0) for k in self._all}

    def describe(self, state: IFCAState) -> Sequence[Finding]:
        personal = bool(state.base.head) and self.plan.head == "personal" and self.settings.clusters > 1
        clusters = [Clusters(dict(state.members))] if state.members else []
        return [*clusters, AggregationError(state.error), *([Notes([NOTE])] if personal else [])]

    # client ----------------------------------------------------------------------------------------------------------

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        banks = self._candidates(ins, personal)
        k = yield from self._least(banks, me)
        trained = yield Train(banks[k], frozenset(banks[k].tensors), self.plan.optim)
        kept = replace(personal, info={**personal.info, "cluster": k})
        result = settle(self.plan, trained, me, kept, lora_of(trained.tensors))
        return replace(result, reply=replace(result.reply, info={**result.reply.info, "cluster": k}))

    def choose(self, ins: Instruction, me: ClientInfo, personal: Personal) -> BankProgram:
        banks = self._candidates(ins, personal)
        k = yield from self._least(banks, me)
        return banks[k]

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        """The bank of the LoRA that the client chose last."""
        return self._candidates(ins, personal)[personal.info.get("cluster", 0)]

    @property
    def _all(self) -> range:
        return range(self.settings.clusters)

    def _heads_for(self, state: IFCAState, client: ClientId) -> Tensors:
        """The shared heads of the client's label space, numbered by their LoRA; none if heads are personal."""
        if client not in state.heads.group:
            return {}
        space = state.heads.group[client]
        heads = [numbered_head(state.heads.values[_named(k, space)], k) for k in self._all]
        return {key: value for head in heads for key, value in head.items()}

    def _candidates(self, ins: Instruction, personal: Personal) -> list[Bank]:
        banks = []
        for k in self._all:
            received = Instruction(one_head(head_of(ins.tensors), k))
            tensors = with_head(lora_of(ins.tensors, k, new=0), received, personal)
            banks.append(Bank(tensors, scaling=self.plan.scaling, dropout=self.plan.dropout))
        return banks

    def _least(self, banks: Sequence[Bank], me: ClientInfo) -> Generator[Score, list[Scored], int]:
        """The number of the bank with the least loss; a tie is drawn."""
        if len(banks) == 1:
            return 0
        scores = yield Score(banks, "train", self.settings.examples)
        losses = [math.inf if math.isnan(scored.loss) else scored.loss for scored in scores]
        tied = [k for k, loss in enumerate(losses) if loss == min(losses)]
        return tied[int(torch.randint(len(tied), (1,), generator=stream(self.plan.seed, "tie", me.id)))]


def _named(k: int, space: str) -> str:
    return f"{k}:{space}"


METHOD = IFCA
